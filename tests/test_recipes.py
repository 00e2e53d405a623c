"""Recipes of the papers, and the options of `train` that they brought along."""

import functools
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from robustkern.cli import main
from robustkern.training import Options, train
from robustkern.training.adversarial import adversarial_training
from robustkern.training.checkpoint import load_checkpoint
from robustkern.training.models import MODELS
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.recipes import RECIPES, from_recipe
from robustkern.training.schedules import Schedule


def options_of(name):
    return from_recipe(name, {"init": "clean.pt"})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name):
    options = options_of(name)
    assert options.model in MODELS
    assert name.endswith(f"-{options.model}-{options.data}")
    Schedule.parse("lr", options.lr)
    adversarial_training(options.adversarial, (3, 32, 32))
    penalty = ScheduledPenalty(
        options.penalties, (3, 32, 32), model=nn.Identity(), images=torch.rand(2, 3, 32, 32)
    ).penalty
    start = RECIPES[name].start
    assert (penalty is None) == name.startswith(
        ("clean-", "pgd-", "weak-pgd-", "fgsm-rs-resnet18-")
    )
    assert (start is None) == ("cure" not in name)
    if start is not None:
        clean = options_of(start)
        for field in ("data", "model", "per_image"):
            assert getattr(clean, field) == getattr(options, field)
        assert not clean.penalties
        cure = options_of(name.removeprefix("fgsm-rs-").removeprefix("lazy-"))
        for field in ("epochs", "optimizer", "lr", "weight_decay"):
            assert getattr(cure, field) == getattr(options, field)


@pytest.mark.parametrize(
    ("name", "weights", "lengths"),
    [
        ("cure-resnet18-cifar10", {0: 4, 19: 4}, {0: 0, 2.5: 0.75, 5: 1.5, 19: 1.5}),
        ("cure-wideresnet28x10-cifar10", {0: 8, 19: 8}, {0: 0, 5: 1.5, 19: 1.5}),
        (
            "cure-resnet18-svhn",
            {0: 4, 9.998: 4, 10: 8, 14.998: 8, 15: 12, 19.9: 12},
            {0: 1.25, 19: 1.25},
        ),
    ],
)
def test_cure_is_the_papers(name, weights, lengths):
    options = options_of(name)
    scheduled = ScheduledPenalty(options.penalties, (3, 32, 32))
    for epoch, weight in weights.items():
        scheduled.set_epoch(epoch)
        assert scheduled.penalty.weight == pytest.approx(weight), epoch
    for epoch, length in lengths.items():
        scheduled.set_epoch(epoch)
        assert scheduled.penalty.h == pytest.approx(length), epoch
    lr = Schedule.parse("lr", options.lr)
    assert (options.epochs, options.optimizer, lr(0), lr(20)) == (20, "adam", 1e-4, 1e-6)
    assert (scheduled.penalty.direction, scheduled.penalty.squared) == ("sign", True)


def test_sgr_standardizes_each_image_and_augments():
    for source in ("sign", "pgd"):
        options = options_of(f"sgr-{source}-carlini-cifar10")
        assert (options.per_image, options.crop, options.flip) == (True, 4, True)
        assert options.penalties[0]["source"] == source
    for name, eps in {"weak-pgd": 4 / 255, "pgd": 8 / 255}.items():
        options = options_of(f"{name}-carlini-cifar10")
        assert (options.per_image, options.crop, options.flip) == (True, 4, True)
        assert options.adversarial == {"name": "pgd", "eps": eps, "steps": 7}


def test_weights_of_total_variation_and_lipschitz():
    def weights(name):
        return [p["weight"] for p in options_of(f"{name}-resnext34-cifar10").penalties]

    assert weights("tv") == weights("l1-tv") == ["0.01"]
    assert options_of("l1-tv-resnext34-cifar10").penalties[0]["p"] == 1
    assert weights("tv-lipschitz") == ["0.01", "0.1"]
    assert weights("medium-tv-lipschitz") == ["0.1", "0.1"]
    assert weights("strong-tv-lipschitz") == ["0.1", "1"]


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A small file of images, with a small network `tiny:make` for it."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), np.arange(40) % 4
    path = tmp_path / "images.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    module = types.ModuleType("tiny")
    module.make = lambda shape, classes: nn.Sequential(
        nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
    )
    monkeypatch.setitem(sys.modules, "tiny", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


def options_for(images, folder, **more):
    return Options(
        data=str(images), model="tiny:make", batch_size=16, device="cpu", output=str(folder), **more
    )


def test_a_recipe_trains_and_what_is_given_holds(images, tmp_path):
    given = ["--data", str(images), "--model", "tiny:make", "--device", "cpu", "--epochs", "1"]
    clean, cure = tmp_path / "clean", tmp_path / "cure"
    recipe = ["train", "--recipe", "clean-resnet18-cifar10"]
    assert main([*recipe, *given, "--no-flip", "--output", str(clean)]) == 0
    options = load_checkpoint(clean / "checkpoint.pt")["options"]
    expected = {**options_of("clean-resnet18-cifar10").__dict__, "model": "tiny:make", "epochs": 1}
    expected |= {"data": str(images), "flip": False, "device": "cpu", "output": str(clean)}
    assert options == {**expected, "init": None}

    recipe = ["train", "--recipe", "cure-resnet18-cifar10", "--init", f"{clean}/checkpoint.pt"]
    penalty = ["--penalty", "gn", "--weight", "0.5"]
    assert main([*recipe, *given, *penalty, "--output", str(cure)]) == 0
    options = load_checkpoint(cure / "checkpoint.pt")["options"]
    assert options["penalties"] == [{"name": "gn", "weight": "0.5"}]
    assert (options["optimizer"], options["lr"]) == ("adam", "0:0.0001,20:0.000001")
    assert RECIPES["cure-resnet18-cifar10"].options["penalties"][0]["name"] == "cure"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cure", f"train: recipe must be one of {', '.join(RECIPES)}, got cure"),
        (
            "cure-resnet18-svhn",
            "train: init must be given with the recipe cure-resnet18-svhn, the checkpoint of a "
            "network trained by the recipe clean-resnet18-svhn, got None",
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_named(tmp_path, capsys, name, message):
    output = tmp_path / "run"
    assert main(["train", "--recipe", name, "--output", str(output)]) == 2
    assert capsys.readouterr().err.strip() == f"robustkern train: error: {message}"
    assert not output.exists()


def test_help_names_every_recipe(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert set(RECIPES) <= lines


def test_a_network_of_another_normalization_is_refused(images, tmp_path):
    checkpoint = train(options_for(images, tmp_path / "a", epochs=1))
    options = options_for(images, tmp_path / "b", epochs=1, init=str(checkpoint), per_image=True)
    message = "train: per_image must be as the network of the checkpoint was made, False, got True"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(options)


@pytest.mark.parametrize("option", ["compile", "channels_last"])
def test_a_network_learns_the_same_however_it_is_computed(images, tmp_path, monkeypatch, option):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    changes = {"epochs": 2, "penalties": [{"name": "gn", "weight": "0.1"}]}
    plain = load_checkpoint(train(options_for(images, tmp_path / "plain", **changes)))
    assert not compiled
    path = train(options_for(images, tmp_path / "other", **changes, **{option: True}))
    other = load_checkpoint(path)
    # Once for batches of 16, once for the last, of 8.
    assert len(compiled) == (2 if option == "compile" else 0)
    weights = other["trainer"]["model"]
    assert list(weights) == list(plain["trainer"]["model"])
    for name, value in plain["trainer"]["model"].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    kept = weights["1.0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert kept == (option == "channels_last")
    for field in ("forward_passes", "backward_passes"):
        assert [r[field] for r in other["log"]] == [r[field] for r in plain["log"]]


def test_a_run_stops_when_its_time_is_up_and_goes_on(images, tmp_path):
    whole = load_checkpoint(train(options_for(images, tmp_path / "whole", epochs=3)))
    options = options_for(images, tmp_path / "pieces", epochs=3)
    for resume, seconds, done in ((False, 0, 1), (True, 0, 1), (True, 60, 3)):
        path = train(options, resume=resume, seconds=seconds)
        assert len(json.loads((path.parent / "log.json").read_text())["epochs"]) == done
    pieces = load_checkpoint(path)
    for name, value in whole["trainer"]["model"].items():
        assert torch.equal(pieces["trainer"]["model"][name], value), name
