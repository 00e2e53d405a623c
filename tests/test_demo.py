"""The demonstration, in small."""

import json
import math
import re
import sys

import pytest
import torch

from robustkern import reference
from robustkern.cli import main
from robustkern.evaluation import RobustAccuracy
from robustkern.training import demo as module
from robustkern.training.data import load
from robustkern.training.demo import Result, Settings, demo, demo_table

SMALL = Settings(
    train_images=128,
    test_images=20,
    width=4,
    clean_epochs=1,
    epochs=1,
    pgd_steps=2,
    timing_rounds=3,
)
METHODS = ["before fine-tuning", "no penalty", "CURE, naive", "CURE", "anchored CURE", "GN", "SGR"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "results"
    return folder, demo(output=folder, settings=SMALL)


def test_every_method_has_its_row(run):
    _, results = run
    assert [result.method for result in results] == METHODS
    plain = results[1]
    assert (plain.plain_steps, results[2].naive_steps) == (1, 1)
    assert results[0].plain_steps is None
    for result in results:
        assert result.accuracy.eps == (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
    for result in results[2:]:
        assert result.plain_steps > 1


def test_results_and_plot_are_saved(run):
    folder, results = run
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "demo.png"]
    image = (folder / "demo.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000
    content = json.loads((folder / "demo.json").read_text())
    assert [row["method"] for row in content["results"]] == METHODS
    assert content["results"][3]["accuracy"]["pgd"] == list(results[3].accuracy.pgd)
    assert content["settings"]["width"] == 4
    assert {"robustkern", "torch", "machine"} <= set(content["versions"])


def test_a_seed_gives_the_same_networks_again(run, tmp_path):
    _, results = run
    again = demo(output=tmp_path, settings=SMALL)
    other = demo(output=tmp_path, settings=SMALL, seed=1)
    assert [r.accuracy for r in again] == [r.accuracy for r in results]
    assert [r.accuracy for r in other] != [r.accuracy for r in results]


def test_all_methods_start_alike_and_see_the_same_batches():
    images = load("digits").first(128, 20)
    clean = module._clean_network(images, 0, SMALL, lambda _: None)
    before = {name: value.clone() for name, value in clean.state_dict().items()}
    trainers = module._trainers(clean, images, 0.1, 0, SMALL)
    assert list(trainers) == METHODS[1:]
    orders = []
    for method, trainer in trainers.items():
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, before[name]), (method, name)
        orders.append(torch.randperm(128, generator=trainer.batches))
        trainer.model.train()
        trainer.penalty.set_epoch(0)
        trainer.step(torch.arange(32))
    assert all(torch.equal(order, orders[0]) for order in orders)
    for name, value in clean.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_naive_is_the_authors_structure_at_the_weight_and_h_of_cure():
    images = load("digits").first(128, 20)
    clean = module._clean_network(images, 0, SMALL, lambda _: None)
    trainers = module._trainers(clean, images, 0.1, 0, SMALL)
    cure = trainers["CURE"]
    cure.penalty.set_epoch(3)
    penalty = cure.penalty.penalty
    assert (penalty.weight, penalty.squared) == (0.5, False)
    assert penalty.h == pytest.approx(0.1 * math.sqrt(64))
    x, y = images.x_train[:32], images.y_train[:32]
    clean.train().zero_grad()
    naive = trainers["CURE, naive"]
    naive.model.train()
    naive.penalty.set_epoch(3)
    loss, _ = naive.backward(x, y)
    expected = reference.authors_cure_backward(clean, x, y, weight=penalty.weight, h=penalty.h)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(naive.model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_table():
    accuracy = RobustAccuracy(0.9751, (1 / 255, 2 / 255, 0.1), (0.9, 0.8, 0.7), (0.9, 0.6, 0.25))
    rows = [Result("start", None, None, accuracy), Result("CURE", 4.04, 0.55, accuracy)]
    assert demo_table(rows, 20).splitlines() == [
        "| fine-tuned with | step, in plain steps | faster than naive | clean accuracy "
        "| PGD-20 at 2/255 | PGD-20 at 0.1 |",
        "|:----------------|---------------------:|------------------:|---------------:"
        "|----------------:|--------------:|",
        "| start           |                      |                   |          97.5% "
        "|           60.0% |         25.0% |",
        "| CURE            |                  4.0 |              1.8x |          97.5% "
        "|           60.0% |         25.0% |",
    ]


def test_a_missing_matplotlib_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("worked first"))
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
    message = (
        "robustkern demo: error: matplotlib.figure cannot be imported; "
        'install it with: pip install "robustkern[plots]"'
    )
    assert capsys.readouterr().err.strip() == message


def test_an_unwritable_folder_is_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("worked first"))
    folder = tmp_path / "file" / "demo"
    message = f"demo: output folder {folder} must be writable, got Not a directory"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        demo(output=folder)
