"""Schedules, penalties from options, the trainer, and runs that are interrupted."""

import copy
import dataclasses
import functools
import json
import re
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern import functional
from robustkern.evaluation import accuracy, deepfool_source, fgsm_source, pgd, pgd_source
from robustkern.training import Dataset, Options, Trainer, load, train
from robustkern.training.checkpoint import load_checkpoint
from robustkern.training.models import Normalize, ResNet, pixel_statistics
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.schedules import Schedule
from robustkern.training.session import find_device
from robustkern.training.trainer import augment

NOTHING = ScheduledPenalty([], (1, 8, 8))
ALL = [
    {"name": "cure", "weight": "0:0,2:0.4", "h": "0:0.1,2:0.5", "direction": "gaussian"},
    {"name": "anchored-cure", "weight": "0.1", "h": "0.5", "norm": True, "every": 2},
    {"name": "gn", "weight": "0.1"},
    {"name": "tv", "weight": "0.1", "p": 1.0, "every": 3},
    {"name": "lipschitz", "weight": "0.01", "p": float("inf")},
    {"name": "llr", "weight": "0.3", "mu": 0.2, "eps": 0.05, "steps": 1},
    {"name": "sgr", "weight": "0.1", "update_every": 3, "decay": 0.2},
    {"name": "none"},
]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def small(digits):
    return digits.first(100, 50)


def network(width=4, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        Normalize([0.3], [0.4]), nn.Dropout(dropout), ResNet(width, (1, 1), channels=1, classes=10)
    )


def same(a, b):
    """Bitwise equality of nested state."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", [0.5, 0.5, 0.5]), ("1:0,3:4", [0, 2, 4]), ("0:1,2:0,4:8", [0.5, 0, 8])],
)
def test_schedules_are_piecewise_linear(text, expected):
    schedule = Schedule.parse("h", text)
    assert [schedule(epoch) for epoch in (1, 2, 9)] == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1,2", "0:1,0:2", "2:1,1:2", "0:1:2", "-1", "0:nan", "inf", "0:1,"]
)
def test_a_bad_schedule_is_named(text):
    message = (
        "Schedule: lr must be a number or EPOCH:VALUE,EPOCH:VALUE,... with rising epochs, "
        f"finite and not negative, got {text}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Schedule.parse("lr", text)


def test_penalties_from_options():
    scheduled = ScheduledPenalty(ALL, (1, 8, 8))
    cure, lazy_anchored, gn, lazy_tv, lipschitz, llr, sgr = scheduled.penalty.terms
    assert isinstance(cure, robustkern.CURE)
    assert (cure.direction, cure.squared, cure.anchored) == ("gaussian", True, False)
    assert (lazy_anchored.every, lazy_tv.every) == (2, 3)
    anchored, tv = lazy_anchored.penalty, lazy_tv.penalty
    assert (anchored.squared, anchored.anchored) == (False, True)
    assert (gn.p, gn.power, tv.p, tv.power) == (2, 2, 1, 1)
    assert lipschitz.p == float("inf")
    assert (llr.mu, llr.eps, llr.steps) == (0.2, 0.05, 1)
    assert (sgr.update_every, sgr.covariance.decay, sgr.source) == (3, 0.2, "sign")
    scheduled.set_epoch(1)
    assert [cure.weight, cure.h, anchored.weight, gn.weight] == pytest.approx([0.2, 0.3, 0.1, 0.1])
    assert ScheduledPenalty([{"name": "none"}], (1, 8, 8)).penalty is None
    assert isinstance(ScheduledPenalty([{"name": "gn"}], (1, 8, 8)).penalty, nn.Module)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "ridge"},
            "ScheduledPenalty: penalty must be one of none, cure, anchored-cure, gn, tv, "
            "lipschitz, llr, sgr, got ridge",
        ),
        (
            {"name": "gn", "p": 2.0, "h": "1"},
            "ScheduledPenalty: penalty gn takes the options weight, every, got p, h",
        ),
    ],
)
def test_a_bad_penalty_is_named(spec, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ScheduledPenalty([spec], (1, 8, 8))


def attack(source):
    if source == "deepfool":
        pytest.importorskip("foolbox", exc_type=ImportError)
    return source


@pytest.mark.parametrize("source", ["fgsm", "pgd", "deepfool"])
def test_sgr_learns_from_an_attack_of_the_model_in_training(small, source):
    model, inputs = network(), small.x_train[:8]
    expected = {
        "fgsm": lambda: fgsm_source(model, 0.05),
        "pgd": lambda: pgd_source(model, 0.05),
        "deepfool": lambda: deepfool_source(model),
    }
    spec = {"name": "sgr", "source": attack(source), "attack_eps": 0.05}
    penalty = ScheduledPenalty([spec], small.shape, model=model).penalty
    for parameter in model.parameters():  # it attacks what the model has become
        parameter.data.mul_(1.1)
    penalty.points(inputs, torch.full_like(inputs, torch.nan))
    found = functional.autocovariance(expected[source]()(inputs, inputs))
    assert torch.equal(penalty.covariance.values, found)


@pytest.mark.parametrize("variance", [0.25, "data"])
def test_sgr_is_standardized(small, variance):
    spec = {"name": "sgr", "standardize": variance}
    penalty = ScheduledPenalty([spec], small.shape, images=small.x_train).penalty
    penalty.points(small.x_train, small.x_train)
    expected = small.x_train.var(0, correction=0).mean().item() if variance == "data" else variance
    assert penalty.covariance.dense().diagonal().mean().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"source": "pgd"}, "model must be given for source pgd, got None"),
        ({"standardize": "data"}, "images must be given for standardize data, got None"),
    ],
)
def test_what_sgr_lacks_is_named(option, message):
    with pytest.raises(ValueError, match=f"^ScheduledPenalty: {message}$"):
        ScheduledPenalty([{"name": "sgr", **option}], (1, 8, 8))


def test_augment_shifts_and_mirrors():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 2, 5, 6) + 1
    shifted = augment(images, 1, True, generator)
    padded = F.pad(images, (1, 1, 1, 1))
    found = set()
    for image, around in zip(shifted, padded, strict=True):
        options = {
            (dy, dx, mirrored): around[:, dy : dy + 5, dx : dx + 6]
            for dy in range(3)
            for dx in range(3)
            for mirrored in (False, True)
        }
        matches = [
            key for key, view in options.items() if image.equal(view.flip(2) if key[2] else view)
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) == 18
    assert augment(images, 0, False, generator) is images


def test_a_plain_epoch_is_the_loop_that_one_would_write(small):
    trainer = Trainer(
        network(), small, NOTHING, optimizer="sgd", lr=Schedule(((0, 0.1), (1, 0.0))), seed=3
    )
    model = copy.deepcopy(trainer.model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for number, index in enumerate(order.split(64)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - number / 2)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(small.x_train[index]), small.y_train[index])
        loss.backward()
        optimizer.step()
        total += len(index) * loss.item()
    seen = []
    record = trainer.run_epoch(seen.append)
    assert same(trainer.model.state_dict(), model.state_dict())
    assert record.loss == pytest.approx(total / 100)
    assert (record.penalty, record.epoch, seen) == (0, 1, [64, 36])
    assert record.clean_accuracy == accuracy(model, small.x_test, small.y_test)


def test_a_penalized_step_uses_the_engine(small):
    penalty = ScheduledPenalty([{"name": "cure", "weight": "0.3", "h": "0.5"}], small.shape)
    trainer = Trainer(network(), small, penalty, batch_norm="eval", shift=1e-3)
    model = copy.deepcopy(trainer.model)
    index = torch.arange(32)
    penalty.set_epoch(0)
    trainer.model.train()
    loss, value = trainer.step(index)
    step = robustkern.backward(
        model.train(),
        small.x_train[:32],
        small.y_train[:32],
        robustkern.CURE(0.3, 0.5),
        batch_norm="eval",
        shift=1e-3,
    )
    assert (loss, value) == (step.loss.double(), step.penalty.double())
    for (name, ours), theirs in zip(
        trainer.model.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["none", "gn", "sgr"])
def test_every_precision_learns(digits, precision, name):
    weight = {} if name == "none" else {"weight": "0.1"}
    penalty = ScheduledPenalty([{"name": name, **weight}], digits.shape)
    data = digits.first(256, 50)
    trainer = Trainer(
        network(), data, penalty, precision=precision, lr=Schedule.parse("lr", "0.01")
    )
    dtype = torch.float64 if precision == "float64" else torch.float32
    first = trainer.run_epoch()
    assert all(parameter.dtype == dtype for parameter in trainer.model.parameters())
    assert trainer.scaler.is_enabled() == (precision == "float16")
    for _ in range(6):
        last = trainer.run_epoch()
    assert last.loss < 0.85 * first.loss
    assert (last.penalty > 0) == (name != "none")


def test_cure_makes_a_network_robust(digits):
    data = digits.first(None, 150)

    def fit(model, penalty, epochs):
        trainer = Trainer(model, data, penalty, crop=1, lr=Schedule.parse("lr", "0:0.002,10:0"))
        for _ in range(epochs):
            clean = trainer.run_epoch().clean_accuracy
        attack = functools.partial(pgd, eps=0.1, steps=10)
        return clean, accuracy(model, data.x_test, data.y_test, attack=attack)

    torch.manual_seed(0)
    model = nn.Sequential(Normalize(*pixel_statistics(data.x_train)), ResNet(16, (1, 1), 1))
    fit(model, NOTHING, 5)
    plain_clean, plain_robust = fit(copy.deepcopy(model), NOTHING, 10)
    specs = [{"name": "anchored-cure", "weight": "0.1", "h": "0.8"}]
    clean, robust = fit(model, ScheduledPenalty(specs, data.shape), 10)
    assert plain_clean > 0.9
    assert clean > 0.85
    assert robust > plain_robust + 0.15


def test_a_loss_that_is_no_number_ends_the_run(small):
    trainer = Trainer(network(), small, NOTHING)
    next(trainer.model.parameters()).data.fill_(float("nan"))
    message = (
        "Trainer: loss, penalty and the norm of the network must stay finite, got nan, 0.0 and nan "
        "in epoch 1; try a smaller learning rate or weight"
    )
    with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
        trainer.run_epoch()


def test_a_last_step_out_of_all_bounds_ends_the_run(small):
    lr = Schedule.parse("lr", "1e38")
    trainer = Trainer(
        network(), small, NOTHING, optimizer="sgd", lr=lr, batch_size=len(small.x_train)
    )
    with pytest.raises(FloatingPointError, match=r"got \d\.\d+, 0\.0 and inf in epoch 1"):
        trainer.run_epoch()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"optimizer": "lbfgs"}, "Trainer: optimizer must be one of adam, sgd, got lbfgs"),
        (
            {"precision": "int8"},
            "Trainer: precision must be one of float32, bfloat16, float16, float64, got int8",
        ),
        (
            {"batch_size": 0},
            "Trainer: batch_size must be at least 1 and crop at least 0, got 0 and 0",
        ),
        ({"crop": -1}, "Trainer: batch_size must be at least 1 and crop at least 0, got 64 and -1"),
    ],
)
def test_a_bad_option_is_named(small, option, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Trainer(network(), small, NOTHING, **option)


@pytest.mark.parametrize("more", [{"norm": False}, {"norm": True, "direction": "gradient"}])
def test_the_naive_cure_refuses_what_the_authors_do_not_compute(small, more):
    spec = {"name": "cure", **more}
    message = "NaiveCURETrainer: penalty must be the norm of CURE along the sign, not anchored, got"
    with pytest.raises(ValueError, match=f"^{message}"):
        NaiveCURETrainer(network(), small, ScheduledPenalty([spec], (1, 8, 8)))


def test_the_naive_cure_refuses_scaled_losses(small):
    penalty = ScheduledPenalty([{"name": "cure", "norm": True}], (1, 8, 8))
    with pytest.raises(ValueError, match=r"^NaiveCURETrainer: precision must not be float16"):
        NaiveCURETrainer(network(), small, penalty, precision="float16")


def test_the_naive_cure_refuses_what_has_no_double_backward(small):
    penalty = ScheduledPenalty([{"name": "cure", "weight": "1", "norm": True}], (1, 8, 8))
    message = r"^NaiveCURETrainer: model must not be compiled, .* got OptimizedModule$"
    with pytest.raises(ValueError, match=message):
        NaiveCURETrainer(torch.compile(network()), small, penalty)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_trainer_goes_on_bit_for_bit(small, precision):
    def trainer():
        return Trainer(
            network(dropout=0.2),
            small,
            ScheduledPenalty(ALL, small.shape),
            optimizer="sgd",
            crop=1,
            flip=True,
            precision=precision,
            batch_size=30,
        )

    whole = trainer()
    torch.manual_seed(5)
    whole.run_epoch()
    saved = copy.deepcopy(whole.state_dict())
    expected = [whole.run_epoch(), whole.run_epoch()]
    resumed = trainer()
    torch.manual_seed(6)
    resumed.load_state_dict(saved)
    got = [resumed.run_epoch(), resumed.run_epoch()]
    assert same(resumed.state_dict(), whole.state_dict())
    for a, b in zip(expected, got, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)


@pytest.fixture
def dropout_factory(monkeypatch):
    module = types.ModuleType("dropout_factory")
    module.make = lambda shape, classes: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, classes)
    )
    monkeypatch.setitem(sys.modules, "dropout_factory", module)


def options(folder, **changes):
    run = Options(
        train_size=120,
        test_size=40,
        model="dropout_factory:make",
        penalties=ALL,
        lr="0:0.01,4:0.001",
        crop=1,
        epochs=4,
        output=str(folder),
        device="cpu",
    )
    return dataclasses.replace(run, **changes)


@pytest.mark.usefixtures("dropout_factory")
@pytest.mark.parametrize("source", ["fgsm", "pgd", "deepfool"])
@pytest.mark.parametrize("precision", ["float32", "float16", "float64"])
def test_a_run_with_an_attack_as_source_is_resumed(tmp_path, source, precision):
    sgr = {"name": "sgr", "source": attack(source), "standardize": "data", "update_every": 3}
    changes = {"penalties": [sgr], "epochs": 2, "precision": precision}
    whole = load_checkpoint(train(options(tmp_path / "whole", **changes)))
    train(options(tmp_path / "parts", **(changes | {"epochs": 1})))
    parts = load_checkpoint(train(options(tmp_path / "parts", **changes), resume=True))
    assert same(parts["trainer"], whole["trainer"])
    assert parts["trainer"]["penalty"]["covariance.updates"] > 0


@pytest.mark.usefixtures("dropout_factory")
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = load_checkpoint(train(options(tmp_path / "whole")))
    train(options(tmp_path / "parts", epochs=1))
    train(options(tmp_path / "parts", epochs=2), resume=True)
    torch.rand(7)
    parts = load_checkpoint(train(options(tmp_path / "parts"), resume=True))
    assert same(parts["trainer"], whole["trainer"])
    for a, b in zip(parts["log"], whole["log"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    other = load_checkpoint(train(options(tmp_path / "other", seed=1)))
    assert not same(other["trainer"]["model"], whole["trainer"]["model"])


@pytest.mark.usefixtures("dropout_factory")
def test_a_crash_while_writing_leaves_the_last_epoch(tmp_path, monkeypatch):
    train(options(tmp_path, epochs=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("robustkern.training.checkpoint.torch.save", crash)
        with pytest.raises(OSError, match=r"^disk full$"):
            train(options(tmp_path), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(load_checkpoint(train(options(tmp_path), resume=True))["log"]) == 4


@pytest.mark.usefixtures("dropout_factory")
def test_log(tmp_path):
    train(options(tmp_path / "run", epochs=2))
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    assert [record["epoch"] for record in log["epochs"]] == [1, 2]
    measured = {"loss", "penalty", "clean_accuracy", "forward_passes", "backward_passes"}
    assert set(log["epochs"][0]) == {"epoch", "seconds", *measured}
    assert log["versions"]["robustkern"] == robustkern.__version__
    threads = torch.get_num_threads()
    assert log["versions"]["machine"].endswith(f" {threads} thread" + "s" * (threads > 1))
    assert log["options"]["penalties"] == ALL


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(tmp_path):
    first = train(Options(train_size=64, test_size=20, epochs=1, output=str(tmp_path / "a")))
    second = train(
        Options(
            train_size=64,
            test_size=20,
            epochs=1,
            lr="0",
            init=str(first),
            output=str(tmp_path / "b"),
        )
    )
    weights = [load_checkpoint(path)["trainer"]["model"] for path in (first, second)]
    assert same(*weights)


@pytest.mark.usefixtures("dropout_factory")
@pytest.mark.parametrize("case", ["options", "model", "shape", "existing", "corrupt", "missing"])
def test_a_run_that_cannot_go_on_is_named_and_left_alone(tmp_path, case):
    path = train(options(tmp_path / "run", epochs=1))
    message, changes, resume = {
        "options": (
            "train: lr must be what the resumed run was made with, 0:0.01,4:0.001, got 0.5",
            {"lr": "0.5"},
            True,
        ),
        "model": (
            "train: model must be that of the checkpoint, dropout_factory:make, got cnn",
            {"model": "cnn", "init": str(path), "output": str(tmp_path / "new")},
            False,
        ),
        "shape": (
            "train: data images must fit the checkpoint's network, made for images of shape "
            "(1, 8, 8) and 10 classes, got (1, 8, 9) and 10",
            {
                "data": str(tmp_path / "images.npz"),
                "init": str(path),
                "output": str(tmp_path / "new"),
            },
            False,
        ),
        "existing": (
            f"train: output folder {tmp_path / 'run'} must not hold a run, got checkpoint.pt; "
            "choose another, or --resume",
            {},
            False,
        ),
        "corrupt": (f"load_checkpoint: checkpoint {path} cannot be read, got EOFError", {}, True),
        "missing": (
            f"load_checkpoint: checkpoint {tmp_path / 'new' / 'checkpoint.pt'} does not exist",
            {"output": str(tmp_path / "new")},
            True,
        ),
    }[case]
    if case == "corrupt":
        path.write_bytes(b"")
    if case == "shape":
        import numpy as np

        x, y = np.zeros((10, 8, 9), np.uint8), np.arange(10)
        np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{re.escape(message)}$"):
        train(options(tmp_path / "run", **changes), resume=resume)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_a_run_goes_on_with_the_trainer_that_began_it(tmp_path):
    run = Options(
        train_size=64,
        test_size=20,
        epochs=1,
        penalties=[{"name": "cure", "norm": True}],
        output=str(tmp_path),
        device="cpu",
    )
    train(run, trainer_type=NaiveCURETrainer)
    more = dataclasses.replace(run, epochs=2)
    message = "train: trainer_type must be what the resumed run was made with, NaiveCURETrainer"
    with pytest.raises(ValueError, match=f"^{message}, got Trainer$"):
        train(more, resume=True)
    log = load_checkpoint(train(more, resume=True, trainer_type=NaiveCURETrainer))["log"]
    assert [epoch["forward_passes"] for epoch in log] == [5, 5]


@pytest.mark.parametrize("wrong", ["naive", Dataset])
def test_a_trainer_type_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match=r"^train: trainer_type must be Trainer or a kind of it"):
        train(Options(output=str(tmp_path / "run")), trainer_type=wrong)
    assert not (tmp_path / "run").exists()


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^train: epochs must be at least 1, got 0$"):
        train(Options(epochs=0, output=str(tmp_path)))
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "run"
    message = f"train: output folder {folder} must be writable, got Not a directory"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        train(Options(output=str(folder)))
    message = "find_device: device nonsense must be usable here, got: "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.+"):
        find_device("nonsense")


def test_a_missing_tqdm_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    message = 'tqdm cannot be imported; install it with: pip install "robustkern[train]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        train(Options(train_size=64, output=str(tmp_path)))


def test_a_data_set_says_its_shape(small):
    assert isinstance(small, Dataset)
    assert (small.shape, small.classes) == ((1, 8, 8), 10)


def test_an_overflow_that_the_scaler_handles_does_not_end_the_run(small):
    penalty = ScheduledPenalty([{"name": "gn", "weight": "0.01"}], small.shape)
    trainer = Trainer(network(), small, penalty, precision="float16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    record = trainer.run_epoch()
    assert trainer.scaler.get_scale() < 2.0**30
    assert record.penalty >= 0


def test_a_checkpoint_without_its_optimizer_is_named(tmp_path):
    options = Options(train_size=64, test_size=20, epochs=1, output=str(tmp_path))
    path = train(options)
    content = torch.load(path, weights_only=True)
    del content["trainer"]["optimizer"]
    torch.save(content, path)
    before = path.read_bytes()
    message = f"train: checkpoint {path} must hold the state of this run, got KeyError('optimizer')"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(options, resume=True)
    assert path.read_bytes() == before
