"""AutoAttack and its parts, and those of pyautoattack's that they are."""

import logging
import math
import re
import sys

import pytest
import torch
from torch import nn

from robustkern.evaluation import apgd, autoattack, fab, square

pyautoattack = pytest.importorskip("pyautoattack", exc_type=ImportError)
from pyautoattack.autopgd_base import APGDAttack  # noqa: E402
from pyautoattack.fab_pt import FABAttack_PT  # noqa: E402
from pyautoattack.square import SquareAttack  # noqa: E402

PARTS = [apgd, fab, square]
NORMS = {1: "L1", 2: "L2", math.inf: "Linf"}


def network(classes=6, samples=12):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.Tanh(), nn.Linear(32, classes))
    model = model.eval().requires_grad_(False)
    inputs = torch.rand(samples, 1, 6, 6)
    model[3].bias -= model(inputs).mean(0)  # so that there are several classes
    return model, inputs, model(inputs).argmax(1)


def theirs(attack, model, inputs, targets, eps, p):
    options = {"norm": NORMS[p], "eps": eps, "seed": 0, "device": inputs.device}
    if attack is apgd:
        library = APGDAttack(model, n_iter=10, n_restarts=2, **options)
    elif attack is fab:
        library = FABAttack_PT(model, n_iter=10, n_restarts=2, **options)
    else:
        library = SquareAttack(model, n_queries=50, n_restarts=2, resc_schedule=False, **options)
    return library.perturb(inputs.clone(), targets)


@pytest.mark.parametrize("attack", PARTS)
@pytest.mark.parametrize(("p", "eps"), [(1, 0.6), (2, 0.2), (math.inf, 0.04)])
def test_the_parts_are_pyautoattack_s(attack, p, eps):
    model, inputs, targets = network()
    count = {"queries": 50} if attack is square else {"steps": 10}
    found = attack(model, inputs, targets, eps, p=p, restarts=2, **count)
    expected = theirs(attack, model, inputs, targets, eps, p)
    broken = model(found).argmax(1) != targets
    assert broken.any()
    assert not broken.all()
    assert torch.equal(model(expected).argmax(1) != targets, broken)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classes", "eps"), [(4, 0.08), (12, 0.15)])
def test_autoattack_is_pyautoattack_s(classes, eps):
    model, inputs, targets = network(classes, samples=6)
    found = autoattack(model, inputs, targets, eps)
    library = pyautoattack.AutoAttack(model, eps=eps, seed=0, version="standard")
    targeted = min(9, classes - 1)
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = targeted
    trace = sys.gettrace()
    try:
        expected, _ = library.run_standard_evaluation(inputs, targets)
    finally:
        sys.settrace(trace)
    assert (found != inputs).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_autoattack_of_a_single_sample_and_in_its_versions():
    model, inputs, targets = network(samples=1)
    for version in ("standard", "plus", "rand"):
        found = autoattack(model, inputs, targets, 0.3, version=version)
        assert model(found).argmax(1) != targets


@pytest.mark.parametrize("traced", [False, True])
def test_a_debugger_s_trace_is_given_back(traced):
    model, inputs, targets = network(samples=1)

    def trace(frame, event, argument):
        return None

    before = sys.gettrace()
    try:
        sys.settrace(trace if traced else None)
        autoattack(model, inputs, targets, 0.3)
        assert sys.gettrace() is (trace if traced else None)
    finally:
        sys.settrace(before)


class Remembering(nn.Module):
    """Keeps what it returns, as a network under CUDA graphs does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.kept = model, []

    def forward(self, inputs):
        self.kept.append(self.model(inputs))
        return self.kept[-1]


@pytest.mark.parametrize("attack", PARTS)
def test_the_outputs_are_not_written_into(attack):
    model, inputs, targets = network()
    kept = Remembering(model)
    attack(kept, inputs, targets, 0.03, **({"queries": 20} if attack is square else {}))
    assert all(outputs.isfinite().all() for outputs in kept.kept)


def test_zero_gradients_are_logged(caplog):
    model = nn.Sequential(nn.Flatten(), nn.Hardtanh(2.0, 3.0), nn.Linear(36, 4))
    inputs = torch.rand(3, 1, 6, 6)
    targets = model(inputs).argmax(1)
    with caplog.at_level(logging.WARNING, "auto-attack"):
        found = apgd(model, inputs, targets, 0.1, loss="dlr", steps=2)
    assert "3 points with zero gradient" in caplog.text
    assert torch.equal(found, inputs)


@pytest.mark.parametrize("attack", [apgd, fab, square])
def test_two_classes_will_do(attack):
    model, inputs, targets = network(classes=2)
    found = attack(model, inputs, targets, 0.2)
    assert (model(found).argmax(1) != targets).sum() > 6


@pytest.mark.parametrize("attack", [apgd, fab])
def test_inputs_need_not_be_images(attack):
    model, inputs, targets = network()
    model[0] = nn.Identity()
    flat = inputs.flatten(1)
    found = attack(model, flat, targets, 0.2)
    assert (model(found).argmax(1) != targets).sum() > 6


BAD = [
    (apgd, {"loss": "dlr"}, "apgd: model must return 3 classes or more, got 2"),
    (autoattack, {}, "autoattack: model must return 4 classes or more, got 2"),
    (square, {"inputs": (2, 36)}, "square: inputs must be (N, C, H, W), got (2, 36)"),
    (autoattack, {"inputs": (2, 36)}, "autoattack: inputs must be (N, C, H, W), got (2, 36)"),
    (
        square,
        {"inputs": (2, 1, 4, 9), "p": 2},
        "square: inputs must be 5 pixels or more each way for p = 2, got (2, 1, 4, 9)",
    ),
]


@pytest.mark.parametrize(("attack", "options", "message"), BAD)
def test_what_the_library_cannot_do_is_named(attack, options, message):
    model, inputs, targets = network(classes=2)
    options = dict(options)
    if "inputs" in options:
        inputs = torch.rand(options.pop("inputs"))
        targets = targets[:2]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attack(model, inputs, targets, 0.1, **options)
