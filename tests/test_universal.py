"""Universal perturbations."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustkern.evaluation import universal

NORMS = [1, 2, math.inf]


def one_sided(p):
    """A linear network, inputs on one side of its plane, and their distances to it."""
    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    slope = (model.weight[1] - model.weight[0]).detach()
    inputs = 0.45 + 0.1 * torch.rand(40, 8)
    model.bias.data = torch.stack([(inputs @ slope).max() + 0.02, torch.tensor(0.0)])
    distances = (model.bias.data[0] - inputs @ slope) / slope.norm({1: math.inf, 2: 2}.get(p, 1))
    return model, inputs, torch.zeros(40, dtype=torch.int64), distances


@pytest.mark.parametrize("p", NORMS)
def test_it_fools_what_lies_within_its_radius(p):
    model, inputs, targets, distances = one_sided(p)
    for share in (0.25, 0.75):
        eps = distances.quantile(share).item()
        seen = []
        found = universal(
            model, inputs, targets, eps, p=p, epochs=20, batch_size=16, advance=seen.append
        )
        assert found.shape == (8,)
        assert not found.requires_grad
        assert torch.linalg.vector_norm(found, p) <= eps * (1 + 1e-5)
        moved = (inputs + found).clamp(0, 1)
        fooled = (model(moved).argmax(1) != targets).float().mean().item()
        assert fooled == pytest.approx(share, abs=0.03)
        assert seen[:3] == [16, 16, 8]
        assert sum(seen) == 40 * 20


def test_what_is_fooled_has_no_say():
    model, inputs, targets, distances = one_sided(math.inf)
    near = distances < distances.median()
    assert torch.equal(
        universal(model, inputs, targets.masked_fill(near, 1), 0.3, batch_size=40, epochs=1),
        universal(model, inputs[~near], targets[~near], 0.3, batch_size=40, epochs=1),
    )
    wrong = torch.ones_like(targets)
    assert (universal(model, inputs, wrong, 0.3) == 0).all()


def test_it_is_seeded_and_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).train()
    inputs = torch.rand(30, 6)
    targets = torch.arange(30) % 3
    model[1].weight.grad = torch.full_like(model[1].weight, 7.0)
    random, mean = torch.get_rng_state(), model[0].running_mean.clone()

    def call(seed=None):
        generator = None if seed is None else torch.Generator(inputs.device).manual_seed(seed)
        return universal(
            model, inputs, targets, 0.2, p=2, epochs=1, batch_size=5, generator=generator
        )

    assert torch.equal(call(), call(0))
    assert not torch.equal(call(0), call(1))
    with torch.inference_mode():
        assert torch.equal(call(), call(0))
    assert all(module.training for module in model.modules())
    assert (model[1].weight.grad == 7).all()
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].running_mean, mean)


BAD = {
    "model": (TypeError, "model must be a torch.nn.Module, got function"),
    "empty": (ValueError, "inputs must hold at least one sample, got shape (0, 8)"),
    "range": (ValueError, "inputs must lie in [0, 1], got values from 0 to 2"),
    "eps": (ValueError, "eps must be finite and not negative, got -0.1"),
    "p": (ValueError, "p must be 1, 2 or inf, got 3"),
    "epochs": (ValueError, "epochs and batch_size must be at least 1, got 0 and 128"),
    "step_size": (ValueError, "step_size must be positive and finite, got 0.0"),
    "labels": (
        ValueError,
        "targets must lie in [0, 2), the model's classes, got values from 2 to 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    model, inputs, targets, _ = one_sided(2)
    options = {"eps": 0.1}
    if case == "model":
        model = F.relu
    elif case == "empty":
        inputs, targets = inputs[:0], targets[:0]
    elif case == "range":
        inputs = torch.tensor([0.0, 2.0]).repeat(40, 4)
    elif case == "labels":
        targets = targets + 2
    else:
        options |= {case: {"eps": -0.1, "p": 3, "epochs": 0, "step_size": 0.0}[case]}
    kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{re.escape(f'universal: {message}')}$"):
        universal(model, inputs, targets, **options)
