"""Half precision: autocast, scaled losses that overflow, and models in bfloat16."""

import copy

import pytest
import torch
from agreement import PENALTY, assert_near, exact
from networks import batch, gradient, smooth

import robustkern


def truth():
    """The gradients of the loss and the penalty in float64."""
    return exact(smooth(dropout=0.0), *batch(samples=16))


@pytest.mark.setting("autocast", group="precision", note="to bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    plain, of_penalty = truth()
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32, samples=16)
    with torch.autocast(inputs.device.type, dtype):
        step = robustkern.backward(model, inputs, targets, PENALTY)
    assert step.outputs.dtype == dtype
    assert gradient(model).dtype == torch.float32
    assert_near(gradient(model).double() - plain, of_penalty, dtype)


@pytest.mark.setting("models in bfloat16", group="precision")
def test_a_model_in_bfloat16():
    plain, of_penalty = truth()
    model, (inputs, targets) = (
        smooth(torch.bfloat16, dropout=0.0),
        batch(torch.bfloat16, samples=16),
    )
    robustkern.backward(model, inputs, targets, PENALTY)
    assert gradient(model).dtype == torch.bfloat16
    assert_near(gradient(model).double() - plain, of_penalty, torch.bfloat16)


@pytest.mark.setting(
    "autocast to float16 with GradScaler",
    group="precision",
    note="an overflow in any pass skips the step",
)
def test_the_scale_comes_down_until_no_pass_overflows():
    plain, of_penalty = truth()
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32, samples=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(list(model.parameters()))
    scaler = torch.amp.GradScaler(inputs.device.type, init_scale=2.0**30, backoff_factor=1 / 32)
    scales = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.float16):
            robustkern.backward(model, inputs, targets, PENALTY, scaler=scaler)
        scaler.unscale_(optimizer)
        found = gradient(model).double()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if found.isfinite().all():
            break
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert 1 < len(scales) < 10
    assert_near(found - plain, of_penalty, torch.float16)
    assert not torch.equal(model[0].weight, before[0])
