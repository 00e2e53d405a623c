"""The rest of a training loop around `backward`."""

import pytest
import torch
from agreement import PENALTY, assert_near, exact
from networks import batch, gradient, smooth
from torch import nn

import robustkern


@pytest.mark.setting(
    "gradient accumulation",
    group="training loop",
    note="divide the gradients, not the loss: the penalty is one of the loss's gradients",
)
def test_accumulation():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    plain, of_penalty = exact(model, inputs, targets)
    for half in (slice(0, 3), slice(3, 6)):
        robustkern.backward(model, inputs[half], targets[half], PENALTY)
    assert_near(gradient(model) / 2 - plain, of_penalty)


@pytest.mark.setting("gradient clipping", group="training loop")
def test_clipping():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    plain, of_penalty = exact(model, inputs, targets)
    robustkern.backward(model, inputs, targets, PENALTY)
    length = (plain + of_penalty).norm()
    found = nn.utils.clip_grad_norm_(model.parameters(), length.item() / 3)
    torch.testing.assert_close(found, length, rtol=1e-4, atol=0)
    assert_near(3 * gradient(model) - plain, of_penalty)


@pytest.mark.setting("fused and foreach optimizers", group="training loop")
@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_optimizers(kind):
    inputs, targets = batch()
    weights = []
    for options in ({kind: True}, {"foreach": False}):
        model = smooth(dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            robustkern.backward(model, inputs, targets, PENALTY)
            optimizer.step()
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights)
