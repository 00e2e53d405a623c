"""The perturbations that SGR may learn its covariance from."""

import copy
import math
import re
import sys

import pytest
import torch
from networks import batch, random_state, smooth
from torch import nn

import robustkern
from robustkern import SGR, CovarianceFunction
from robustkern.evaluation import (
    deepfool_source,
    fgsm,
    fgsm_source,
    gradient_source,
    pgd,
    pgd_source,
)

KINDS = ["fgsm", "pgd", "deepfool"]


ALL = [*KINDS, "gradient"]


def make(kind, model):
    if kind == "gradient":
        return gradient_source(model)
    if kind == "deepfool":
        pytest.importorskip("foolbox", exc_type=ImportError)
        return deepfool_source(model, steps=5, candidates=3)
    return fgsm_source(model, 0.1) if kind == "fgsm" else pgd_source(model, 0.1, steps=3)


def recorded(source, given):
    def recording(inputs, gradient):
        given.append(source(inputs, gradient))
        return given[-1]

    return recording


def predicted(model, inputs):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(inputs).argmax(1)


@pytest.mark.parametrize("kind", KINDS)
def test_they_attack_the_predicted_labels_and_stay_in_range(kind):
    model = smooth(torch.float32)
    inputs, _ = batch(torch.float32, samples=12)
    inputs[0], inputs[1] = 0, 1
    found = make(kind, model)(inputs, torch.full_like(inputs, torch.nan))
    assert found.shape == inputs.shape
    assert found.dtype == inputs.dtype
    assert not found.requires_grad
    assert found.abs().max() > 0
    adversarial = inputs + found
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    labels = predicted(model, inputs)
    if kind == "fgsm":
        expected = fgsm(model, inputs, labels, 0.1)
    elif kind == "pgd":
        expected = pgd(model, inputs, labels, 0.1, steps=3, random_start=False)
    else:
        # From a corner of [0, 1] it may take more steps.
        assert (predicted(model, adversarial) != labels)[2:].all()
        return
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", [2, math.inf])
def test_deepfool_finds_the_distance_to_a_linear_boundary(p):
    pytest.importorskip("foolbox", exc_type=ImportError)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model[1].weight.data.mul_(0.1)
    model[1].bias.data.zero_()
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    inputs = 0.5 + 0.05 * torch.randn(8, 3, 2, 2).clamp(-2, 2)
    model[1].bias.data[0] = (inputs.flatten(1) @ w).median()
    margin = (inputs.flatten(1) @ w - model[1].bias.data[0]).abs()
    distance = margin / w.norm(2 if p == 2 else 1)
    found = deepfool_source(model, p=p, overshoot=0.0)(inputs, inputs).flatten(1).norm(p, dim=1)
    torch.testing.assert_close(found, distance, rtol=0.02, atol=3e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("method", ["batch", "eval", "double_backward", "first_order"])
def test_within_a_step_they_leave_everything_as_it_was(kind, method):
    """A step with the source is one whose covariance got the same perturbations from elsewhere."""
    inputs, targets = batch()
    results, given = [], []
    for own in (True, False):
        model = smooth()
        model.insert(0, nn.BatchNorm2d(3).double().eval())  # frozen
        model[1].bias.requires_grad_(False)
        model[1].weight.grad = torch.full_like(model[1].weight, 3.0)
        source = recorded(make(kind, model), given) if own else lambda inputs, gradient: given[0]
        covariance = CovarianceFunction(3, 8, 8)
        penalty = SGR(1.0, covariance, source)
        torch.manual_seed(5)
        if method in ("batch", "eval"):
            robustkern.backward(model, inputs, targets, penalty, batch_norm=method)
        else:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            (loss + penalty(model, inputs, targets, method=method)).backward()
        results.append(
            {
                "random": random_state(),
                "modes": [module.training for module in model.modules()],
                "requires_grad": [p.requires_grad for p in model.parameters()],
                "covariance": covariance.values,
                **dict(model.named_buffers()),
                **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
            }
        )
    own, foreign = results
    assert not own["modes"][1]
    assert own["modes"][2]
    assert not all(own["requires_grad"])
    assert own.pop("1.bias.grad") is None
    assert foreign.pop("1.bias.grad") is None
    assert own["covariance"].abs().max() > 0
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, foreign[name]), name
        else:
            assert value == foreign[name], name


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_everything_as_it_was(kind):
    model = smooth(torch.float32)
    source = make(kind, model)
    inputs, _ = batch(torch.float32)
    random = random_state()
    with pytest.raises(ValueError, match=r"inputs must lie in \[0, 1\], got values from"):
        source(inputs * 2, inputs)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(random_state(), random)


@pytest.mark.parametrize("kind", ALL)
def test_sgr_learns_their_covariance(kind):
    model = smooth(torch.float32, dropout=0.0)
    inputs, targets = batch(torch.float32)
    penalty = SGR(1.0, CovarianceFunction(3, 8, 8), make(kind, model))
    robustkern.backward(model, inputs, targets, penalty)
    expected = CovarianceFunction(3, 8, 8)
    # By the running statistics that the clean pass has moved.
    expected.update(make(kind, model)(inputs, inputs))
    torch.testing.assert_close(penalty.covariance.values, expected.values)
    by_sign = SGR(1.0, CovarianceFunction(3, 8, 8))
    robustkern.backward(model, inputs, targets, by_sign)
    assert not torch.allclose(penalty.covariance.values, by_sign.covariance.values)


def test_true_labels_do_not_leak():
    model = smooth(torch.float32, dropout=0.0)
    inputs, targets = batch(torch.float32)
    found = []
    for labels in (targets, (targets + 1) % 5):
        penalty = SGR(1.0, CovarianceFunction(3, 8, 8), fgsm_source(copy.deepcopy(model), 0.1))
        robustkern.backward(copy.deepcopy(model), inputs, labels, penalty)
        found.append(penalty.covariance.values)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1}, "p must be 2 or inf, got 1"),
        ({"steps": 0}, "steps must be at least 1 and candidates at least 2, got 0 and 10"),
        ({"candidates": 1}, "steps must be at least 1 and candidates at least 2, got 50 and 1"),
    ],
)
def test_deepfool_names_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'deepfool_source: {message}')}$"):
        deepfool_source(nn.Flatten(), **options)


@pytest.mark.parametrize("source", [fgsm_source, pgd_source])
@pytest.mark.parametrize("eps", [-1.0, torch.nan, torch.inf])
def test_a_bad_eps_is_named_at_once(source, eps):
    message = f"{source.__name__}: eps must be finite and not negative, got {eps}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        source(nn.Linear(2, 2), eps)


def test_without_foolbox_deepfool_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    message = (
        "deepfool_source: foolbox cannot be imported; install it with: "
        'pip install "robustkern[eval]"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        deepfool_source(nn.Flatten())


@pytest.mark.parametrize("sign", [True, False])
def test_gradient_source_is_the_gradient_at_the_predicted_labels(sign):
    model = smooth(torch.float32)
    inputs, _ = batch(torch.float32, samples=12)
    found = gradient_source(model, sign=sign)(inputs, torch.full_like(inputs, torch.nan))
    leaf = inputs.clone().requires_grad_()
    outputs = copy.deepcopy(model).eval()(leaf)
    loss = nn.functional.cross_entropy(outputs, predicted(model, inputs), reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, expected.sign() if sign else expected)
