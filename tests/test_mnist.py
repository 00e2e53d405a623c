"""bench/mnist.py: how the weights of the committed evaluation are chosen."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


def test_the_weight_that_is_right_most_often_is_chosen():
    from mnist import best

    assert best({4.0: 0.5, 2.0: 0.5, 1.0: 0.4}) == 2.0


def test_weights_are_chosen_on_images_that_no_network_saw(tmp_path, monkeypatch):
    import mnist
    import torch

    from robustkern.training.data import Dataset

    x = torch.arange(8.0).reshape(8, 1, 1, 1) / 8
    data = Dataset("few", x, torch.arange(8) % 2, x, torch.arange(8) % 2)
    monkeypatch.setattr(mnist, "load", lambda name: data)
    monkeypatch.setattr(mnist, "HELD_OUT", 2)
    monkeypatch.setattr(mnist, "finished", lambda folder, **options: (folder, options))
    monkeypatch.setattr(mnist, "load_checkpoint", lambda path: path)
    monkeypatch.setattr(mnist, "restore_model", lambda content: content)
    asked = []

    def accuracy(network, images, labels, attack):
        asked.append((network, images, labels))
        return 0.5

    monkeypatch.setattr(mnist, "accuracy", accuracy)
    common = {"data": "few.npz", "train_size": 5, "epochs": 1}
    found = mnist.held_out_accuracies(
        tmp_path, mnist.METHODS["TV+Lipschitz"], tmp_path / "start", **common
    )
    assert found == dict.fromkeys(mnist.METHODS["TV+Lipschitz"].weights, 0.5)
    for weight, ((folder, options), images, labels) in zip(found, asked, strict=True):
        assert folder == tmp_path / f"{weight:g}"
        assert options["train_size"] == 5
        assert [each["weight"] for each in options["penalties"]] == [f"{weight:g}", "0.01"]
        assert torch.equal(images, x[5:7])
        assert labels.tolist() == [1, 0]


def test_too_few_images_are_refused_at_once(tmp_path, monkeypatch, capsys):
    import mnist

    x, y = np.zeros((1_500, 2, 2), np.uint8), np.arange(1_500) % 2
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setattr(
        sys, "argv", ["mnist.py", "--data", str(tmp_path / "few.npz"), "--train-size", "600"]
    )
    with pytest.raises(SystemExit):
        mnist.main()
    assert (
        "1000 training images more than --train-size, got 1500 and 600" in capsys.readouterr().err
    )
