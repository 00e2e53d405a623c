"""The covariance command."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from robustkern.cli import main
from robustkern.training.checkpoint import load_checkpoint
from robustkern.training.covariance import covariance_report, covariance_table
from robustkern.training.data import load
from robustkern.training.session import Options, train

PICTURES = ["accuracy.png", "functions.png", "matrices.png", "samples.png"]
SMALL = ["--test-size", "24", "--draws", "3", "--eps", "0.1,0.3,3/5", "--decay-lengths", "1,4"]
NOISE = {"name": "lrc", "eps": 0.3, "decay_length": 2.0}


@pytest.fixture(autouse=True)
def path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"train_size": 256, "test_size": 20, "epochs": 2, "device": "cpu"}
    return [
        train(Options(output=str(folder / name), **sizes, **more))
        for name, more in (("plain", {}), ("noisy", {"adversarial": NOISE}))
    ]


def test_pictures_and_numbers(runs, tmp_path, capsys):
    output = tmp_path / "found"
    command = ["covariance", *map(str, runs), *SMALL, "--device", "cpu", "--output", str(output)]
    assert main(command) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted([*PICTURES, "covariance.json"])
    for name in PICTURES:
        image = (output / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 5_000
    content = json.loads((output / "covariance.json").read_text())
    assert list(content["networks"]) == list(map(str, runs))
    assert (content["attack_eps"], content["test_images"], content["draws"]) == (0.1, 24, 3)
    assert (content["eps_of_decay_lengths"], content["decay_length_of_eps"]) == (0.3, 4.0)
    data = []
    for network in content["networks"].values():
        covariances, accuracy = network["covariances"], network["lrc_accuracy"]
        assert {"data", "FGSM", "PGD"} <= set(covariances)
        data.append(covariances["data"])
        assert covariances["FGSM"]["within"] != covariances["data"]["within"]
        # Every pixel moves by eps, unless the edge of [0, 1] holds it.
        assert 0 < covariances["FGSM"]["within"][0] <= 0.01 + 1e-6
        assert len(accuracy["eps"]) == 3
        assert accuracy["eps"][0] >= accuracy["eps"][2]
        assert accuracy["eps"][1] == accuracy["decay_lengths"][1]
    assert data[0] == data[1]
    assert data[0]["between"] is None
    images = load("digits").x_test[:24]
    variance = (images - images.mean(0)).square().mean().item()
    assert data[0]["within"][0] == pytest.approx(variance, rel=1e-5)
    table, place = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert table == covariance_table(content)
    assert place == f"pictures and numbers are in {output}"


def test_samples_show_the_noise_and_the_attacks(runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "robustkern.training.covariance._plot_samples", lambda rows, *_: drawn.update(rows)
    )
    monkeypatch.setitem(sys.modules, "foolbox", None)
    covariance_report(
        runs, test_size=8, attack_eps=0.1, eps=[0.2], decay_lengths=[1.0, 4.0], draws=1,
        device="cpu", output=tmp_path,
    )  # fmt: skip
    attacked = ["FGSM, plain", "PGD, plain", "FGSM, noisy", "PGD, noisy"]
    assert list(drawn) == ["clean", "noise, 1 px", "noise, 4 px", *attacked]
    clean = drawn["clean"]
    assert torch.equal(clean, load("digits").x_test[:8])
    for name in attacked:
        assert (drawn[name] - clean).abs().max() == pytest.approx(0.1)
    assert not torch.equal(drawn["FGSM, plain"], drawn["FGSM, noisy"])
    assert (drawn["noise, 1 px"] - clean).abs().max() > 0.2


def test_batches_change_nothing_and_colour_has_curves_between_channels(tmp_path):
    digits = load("digits").first(200, 60)
    tint = torch.tensor([1.0, 0.8, 0.5]).view(3, 1, 1)
    arrays = {name: getattr(digits, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    path = tmp_path / "colour.npz"
    np.savez(path, **{k: (v * tint if k[0] == "x" else v).numpy() for k, v in arrays.items()})
    run = train(Options(data=str(path), output=str(tmp_path / "run"), epochs=1, device="cpu"))
    found = []
    for size in (7, 30):
        content = covariance_report(
            [run], test_size=30, batch_size=size, attack_eps=0.05, eps=[0.2], decay_lengths=[2.0],
            draws=2, device="cpu", output=tmp_path / f"{size}",
        )  # fmt: skip
        found.append(content["networks"][str(run)]["covariances"])
    for source in ("data", "FGSM", "PGD"):
        for curve in ("within", "between"):
            torch.testing.assert_close(
                *(torch.tensor(f[source][curve]) for f in found), rtol=0.02, atol=1e-5
            )
    # The channels of the data differ by a factor only.
    data = found[0]["data"]
    ratio = (0.8 + 0.5 + 0.4) / (1 + 0.64 + 0.25)
    assert data["between"][0] / data["within"][0] == pytest.approx(ratio, rel=1e-4)


def test_without_foolbox_there_is_no_deepfool(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    content = covariance_report(
        runs[:1], test_size=8, eps=[0.2], decay_lengths=[2.0], draws=1, device="cpu",
        output=tmp_path,
    )  # fmt: skip
    (network,) = content["networks"].values()
    assert list(network["covariances"]) == ["data", "FGSM", "PGD"]


@pytest.mark.parametrize(
    ("checkpoint", "option", "message"),
    [
        ("none.pt", "--seed=1", "load_checkpoint: checkpoint none.pt does not exist"),
        (None, "--draws=0", "lrc: draws must be at least 1, got 0"),
        (
            None,
            "--decay-lengths=-1",
            "CovarianceFunction.exponential: decay_length must be positive and finite, got -1.0",
        ),
    ],
)
def test_errors_are_named(runs, tmp_path, capsys, checkpoint, option, message):
    command = ["covariance", checkpoint or str(runs[0]), *SMALL, option]
    assert main([*command, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"robustkern covariance: error: {message}")


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^covariance_report: checkpoints must not be empty, got"):
        covariance_report([], output=tmp_path)


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["covariance", "--help"])
    assert exit.value.code == 0
    for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)[2:]:
        assert len(re.sub(r"[-A-Z_{},\[\]a-z0-9]+", "x", entry).split()) > 2, entry


def test_a_checkpoint_older_than_an_option_is_resumed(tmp_path):
    sizes = {"train_size": 64, "test_size": 20, "device": "cpu", "output": str(tmp_path)}
    path = train(Options(epochs=1, **sizes))
    content = torch.load(path, weights_only=True)
    del content["options"]["adversarial"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"^train: adversarial must be .* made with, None, got "):
        train(Options(epochs=2, adversarial=NOISE, **sizes), resume=True)
    assert len(load_checkpoint(train(Options(epochs=2, **sizes), resume=True))["log"]) == 2
    content["options"]["penalties"] = []  # of the command line, before there were recipes
    torch.save(content, path)
    assert len(load_checkpoint(train(Options(epochs=2, **sizes), resume=True))["log"]) == 2
