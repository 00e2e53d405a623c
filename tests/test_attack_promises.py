"""What every attack that starts from the samples classified right promises."""

import math
import re
import sys
from functools import partial

import pytest
import torch
from networks import random_state
from torch import nn
from torch.nn import functional as F

from robustkern import evaluation

# Small versions of those within a radius, and of those that look for the nearest input.
WITHIN = {
    "apgd": {"eps": 0.1, "steps": 5},
    "apgd-l1": {"eps": 2.0, "p": 1, "steps": 5},
    "apgd-dlr": {"eps": 0.5, "p": 2, "steps": 5, "loss": "dlr", "restarts": 2},
    "fab": {"eps": 0.1, "steps": 5},
    "fab-l2": {"eps": 0.5, "p": 2, "steps": 5, "restarts": 2},
    "square": {"eps": 0.15, "queries": 20},
    "square-l2": {"eps": 0.6, "p": 2, "queries": 20},
    "autoattack": {"eps": 0.3},
    "spsa": {"eps": 0.2, "steps": 5, "directions": 128, "chunk": 200, "step_size": 0.05},
}
NEAREST = {
    "deepfool": {"steps": 10},
    "carlini_wagner": {"steps": 20, "searches": 4, "initial_const": 1.0},
    "boundary": {"steps": 20},
    "hop_skip_jump": {"steps": 2, "evaluations": 10},
    "evasive_carlini_wagner": {"steps": 15, "searches": 3, "initial_const": 1.0},
    "subspace_deepfool": {"steps": 10, "dim": 20},
}
ALL = [*WITHIN, *NEAREST]
OURS = ["spsa", "evasive_carlini_wagner"]
SEEDED = ["apgd", "apgd-l1", "square", "square-l2", "spsa"]
SEEDED += ["boundary", "hop_skip_jump", "subspace_deepfool"]


class Fragile(nn.Module):
    """Batch norm of which one is frozen, and an error at a chosen call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        with torch.device("cpu"):
            self.norm, self.frozen = nn.BatchNorm2d(2), nn.BatchNorm2d(2).eval()
            self.first, self.last = nn.Conv2d(2, 8, 3), nn.Linear(128, 4)
        self.to(torch.get_default_device())
        self.calls, self.fail_at = 0, None

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("broken model")
        hidden = self.first(self.frozen(self.norm(inputs))).tanh()
        return 4 * self.last(hidden.flatten(1))


def make(name):
    kind = name.partition("-")[0]
    if kind not in OURS:
        module = "pyautoattack" if name in WITHIN else "foolbox"
        pytest.importorskip(module, exc_type=ImportError)
    attack = getattr(evaluation, kind)
    return partial(attack, **WITHIN.get(name) or NEAREST[name])


def batch(samples=12, wrong=(2, 7)):
    """Inputs with black and white among them, and labels that are the model's but for some."""
    model = Fragile().train()
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    inputs = torch.rand(samples, 2, 6, 6, generator=generator)
    inputs[0], inputs[1, :, 3:], inputs[1, :, :3] = 0.25, 0, 1
    with torch.no_grad():
        targets = model.eval()(inputs).argmax(1)
    model.train()
    model.frozen.eval()
    targets[list(wrong)] = (targets[list(wrong)] + 1) % 4
    model.calls = 0
    return model, inputs, targets


def predictions(model, inputs):
    with evaluation.evaluating(model), torch.no_grad():
        return model(inputs).argmax(1)


@pytest.mark.parametrize("name", ALL)
def test_they_stay_in_range_and_leave_the_misclassified(name):
    attack = make(name)
    model, inputs, targets = batch()
    kept = inputs.clone()
    found = attack(model, inputs, targets)
    assert torch.equal(inputs, kept)
    assert found.dtype == inputs.dtype
    assert not found.requires_grad
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found[[2, 7]], inputs[[2, 7]])
    broken = predictions(model, found) != targets
    assert broken.sum() > 2
    moved = (found != inputs).flatten(1).any(1)
    assert not moved[[2, 7]].any()
    if name in WITHIN:
        length = (found - inputs).flatten(1).norm(WITHIN[name].get("p", math.inf), dim=1)
        assert length.max() <= WITHIN[name]["eps"] * (1 + 1e-5)
    if name != "spsa":
        assert torch.equal(moved, broken & ~(predictions(model, inputs) != targets))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fails", [False, True])
def test_they_leave_everything_as_they_found_it(name, fails):
    attack = make(name)
    model, inputs, targets = batch()
    inputs.requires_grad_()
    model.first.bias.requires_grad_(False)
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)
    model.fail_at = 4 if fails else None
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    random, trace = random_state(), sys.gettrace()
    if fails:
        with pytest.raises(RuntimeError, match=r"^broken model$"):
            attack(model, inputs, targets)
    else:
        attack(model, inputs, targets)
    assert model.calls >= 4
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["first.bias"]
    assert (model.first.weight.grad == 7).all()
    assert all(value.grad is None for key, value in model.named_parameters() if key[:4] == "last")
    assert inputs.requires_grad
    assert inputs.grad is None
    assert torch.equal(random_state(), random)
    assert sys.gettrace() is trace
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key]), key


@pytest.mark.parametrize("name", ALL)
def test_two_calls_agree_and_another_seed_does_not(name):
    attack = make(name)
    model, inputs, targets = batch()

    def call(seed=None):
        if seed is None:
            return attack(model, inputs, targets)
        generator = torch.Generator(inputs.device).manual_seed(seed)
        return attack(model, inputs, targets, generator=generator)

    first = call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    if name in SEEDED:
        assert torch.equal(call(5), call(5))
        assert not torch.equal(call(5), call(6))


@pytest.mark.parametrize("name", [name for name in ALL if name != "autoattack"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_they_need_no_grad_mode_of_the_caller(name, mode):
    attack = make(name)
    model, inputs, targets = batch()
    expected = attack(model, inputs, targets)
    with mode():
        found = attack(model, inputs.clone(), targets.clone())
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in ALL if name != "autoattack"])
def test_double_precision_and_channels_last(name):
    attack = make(name)
    model, inputs, targets = batch()
    model = model.double()
    inputs = inputs.double().contiguous(memory_format=torch.channels_last)
    found = attack(model, inputs, targets)
    assert found.dtype == torch.float64
    assert found.min() >= 0
    assert found.max() <= 1
    if name in WITHIN:
        length = (found - inputs).flatten(1).norm(WITHIN[name].get("p", math.inf), dim=1)
        assert length.max() <= WITHIN[name]["eps"] * (1 + 1e-12)
    assert (predictions(model, found) != targets).sum() > 2


@pytest.mark.parametrize("name", ALL)
def test_low_precision(name):
    attack = make(name)
    model, inputs, _ = batch()
    model, inputs = model.bfloat16(), inputs.bfloat16()
    targets = predictions(model, inputs)
    found = attack(model, inputs, targets)
    assert found.dtype == torch.bfloat16
    assert found.min() >= 0
    assert found.max() <= 1
    assert (predictions(model, found) != targets).sum() > 2
    if name in WITHIN:
        change = (found.double() - inputs.double()).flatten(1)
        length = change.norm(WITHIN[name].get("p", math.inf), dim=1)
        assert length.max() <= WITHIN[name]["eps"] * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ifgsm", "pgd", "spsa", "universal"])
def test_short_steps_are_not_rounded_away(name, dtype):
    options = {"spsa": {"steps": 20, "step_size": 1e-3}}.get(name, {})
    if name == "pgd":
        options = {"random_start": False}
    model, inputs, _ = batch()
    model, inputs = model.to(dtype), (0.5 + inputs / 2.5).to(dtype)
    targets = predictions(model, inputs)
    found = getattr(evaluation, name)(model, inputs, targets, 4 / 255, **options)
    if name == "universal":
        found = inputs + found
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert (found.float() - inputs).abs().mean() > 0.5 * 4 / 255


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_do(name):
    attack = make(name)
    model, inputs, targets = batch()
    assert attack(model, inputs[:0], targets[:0]).shape == (0, 2, 6, 6)
    assert model.calls == 0
    wrong = (predictions(model, inputs) + 1) % 4
    model.calls = 0
    assert torch.equal(attack(model, inputs, wrong), inputs)
    assert model.calls == 1
    if name in WITHIN:
        assert torch.equal(attack(model, inputs, targets, eps=0.0), inputs)


BAD = {
    "model": (TypeError, "model must be a torch.nn.Module, got function"),
    "dtype": (TypeError, "inputs must be a floating-point tensor, got torch.int64"),
    "length": (ValueError, "targets must have inputs' length, got (12, 2, 6, 6) and (11,)"),
    "range": (ValueError, "inputs must lie in [0, 1], got values from 0 to 2"),
    "labels": (
        ValueError,
        "targets must lie in [0, 4), the model's classes, got values from 0 to 4",
    ),
    "kind": (ValueError, "targets must be (N,) int64, got (12,) torch.float32"),
    "outputs": (
        ValueError,
        "model must return (N, classes) of at least two classes, "
        "got (12, 2, 6, 6) for (12, 2, 6, 6)",
    ),
    "tuple": (TypeError, "model must return a tensor, got tuple"),
    "list": (TypeError, "targets must be a tensor, got list"),
    "nan": (ValueError, "model must return finite outputs, got infinite ones or NaN"),
    "one class": (
        ValueError,
        "model must return (N, classes) of at least two classes, got (12, 1) for (12, 2, 6, 6)",
    ),
}


@pytest.mark.parametrize("name", [name for name in ALL if "-" not in name])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(name, case):
    attack = make(name)
    model, inputs, targets = batch()
    if case == "model":
        model = F.relu
    elif case == "dtype":
        inputs = inputs.long()
    elif case == "length":
        targets = targets[:-1]
    elif case == "range":
        inputs = inputs * 2 / inputs.max()
    elif case == "labels":
        targets = torch.arange(12) % 5
    elif case == "kind":
        targets = targets.float()
    elif case == "list":
        targets = targets.tolist()
    elif case == "nan":
        model.last.bias.data[1] = torch.nan
    elif case == "one class":
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 1))
    elif case == "outputs":
        model = nn.Identity()
    else:

        class Pair(nn.Flatten):
            def forward(self, inputs):
                return super().forward(inputs), None

        model = Pair()
    kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{re.escape(f'{name}: {message}')}$"):
        attack(model, inputs, targets)


EPS = "eps must be finite and not negative, got -0.1"
OPTIONS = [
    *[(name, {"eps": -0.1}, EPS) for name in ("apgd", "fab", "square", "autoattack", "spsa")],
    ("apgd", {"loss": "hinge"}, "loss must be 'ce' or 'dlr', got 'hinge'"),
    ("apgd", {"steps": 0}, "steps and restarts must be at least 1, got 0 and 1"),
    ("apgd", {"p": 3}, "p must be 1, 2 or inf, got 3"),
    ("fab", {"restarts": 0}, "steps and restarts must be at least 1, got 5 and 0"),
    ("square", {"queries": 0}, "queries and restarts must be at least 1, got 0 and 1"),
    ("autoattack", {"version": "fast"}, "version must be 'standard', 'plus' or 'rand', got 'fast'"),
    ("deepfool", {"p": 1}, "p must be 2 or inf, got 1"),
    ("deepfool", {"steps": 0}, "steps must be at least 1 and candidates at least 2, got 0 and 10"),
    ("carlini_wagner", {"searches": 0}, "steps and searches must be at least 1, got 20 and 0"),
    ("boundary", {"steps": 0}, "steps must be at least 1, got 0"),
    ("hop_skip_jump", {"p": 1}, "p must be 2 or inf, got 1"),
    ("hop_skip_jump", {"steps": 0}, "steps and evaluations must be at least 1, got 0 and 10"),
    (
        "spsa",
        {"chunk": 1},
        "steps and directions must be at least 1 and chunk at least 2, got 5, 128 and 1",
    ),
    ("spsa", {"delta": 0.0}, "delta and step_size must be positive and finite, got 0.0 and 0.05"),
    (
        "evasive_carlini_wagner",
        {"weight": -1.0},
        "weight and threshold must be finite and not negative, got -1.0 and 0.0",
    ),
    (
        "evasive_carlini_wagner",
        {"steps": 0},
        "steps and searches must be at least 1, got 0 and 3",
    ),
    (
        "evasive_carlini_wagner",
        {"shift": 0.0},
        "step_size, initial_const and shift must be positive and finite, got 0.01, 1.0 and 0.0",
    ),
    ("subspace_deepfool", {"dim": 73}, "dim must be from 1 to 72, got 73"),
    (
        "subspace_deepfool",
        {"candidates": 1},
        "steps must be at least 1 and candidates at least 2, got 10 and 1",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS)
def test_bad_options_are_named(name, options, message):
    attack = make(name)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}: {message}')}$"):
        attack(*batch(), **options)


@pytest.mark.parametrize("name", [name for name in ALL if "-" not in name and name not in OURS])
def test_a_missing_library_is_named(name, monkeypatch):
    attack = make(name)
    module = "pyautoattack" if name in WITHIN else "foolbox"
    monkeypatch.setitem(sys.modules, module, None)
    message = (
        f'{name}: {module} cannot be imported; install it with: pip install "robustkern[eval]"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        attack(*batch())
