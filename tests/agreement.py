"""Whether the engine's gradient is that of double backward, in whatever setting."""

from collections.abc import Mapping

import torch
from networks import gradient
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern import CURE, GradientPenalty, Penalty, functional

# It moves the inputs and a further point, so that no kind of pass is left out.
PENALTY = CURE() + GradientPenalty(1.0, power=2)
# By the dtype computed in: how far the cosine, and the ratio of the lengths, may be from 1.
LIMITS = {
    torch.float64: (1e-6, 1e-3),
    torch.float32: (1e-3, 2e-2),
    torch.float16: (0.1, 0.2),
    torch.bfloat16: (0.1, 0.2),
}


def call(model, inputs, output=None):
    """The logits, as the engine is to get them."""
    returned = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return returned if output is None else returned[output]


def exact(model, inputs, targets, *, penalty=PENALTY, loss_fn=F.cross_entropy, **options):
    """The gradients of the loss and of the penalty, the latter by double backward."""
    found = []
    for what in ("loss", "penalty"):
        model.zero_grad()
        torch.manual_seed(7)
        if what == "loss":
            value = loss_fn(call(model, inputs, options.get("output")), targets)
        else:
            value = penalty(model, inputs, targets, loss_fn=loss_fn, **options)
        value.backward()
        found.append(gradient(model).double())
    model.zero_grad()
    return found


def assert_near(found, truth, dtype=torch.float64):
    """Two gradients agree as far as the dtype allows."""
    angle, length = LIMITS[dtype]
    assert truth.norm() > 0
    assert 1 - F.cosine_similarity(found, truth, dim=0) <= angle
    assert abs(found.norm() / truth.norm() - 1) <= length


def assert_agrees(
    model,
    inputs,
    targets,
    *,
    truth=None,
    dtype=torch.float64,
    penalty=PENALTY,
    batch_norm="batch",
    **options,
):
    """`backward` leaves the gradients that double backward does.

    `truth` is the same network in a form that has a second derivative; by default the model.
    """
    plain, of_penalty = exact(truth or model, inputs, targets, penalty=penalty, **options)
    model.zero_grad()
    torch.manual_seed(7)
    step = robustkern.backward(model, inputs, targets, penalty, batch_norm=batch_norm, **options)
    assert_near(gradient(model).double() - plain, of_penalty, dtype)
    return step


class Still(Penalty):
    """Wants the gradient where it is known already."""

    def points(self, inputs, gradient):
        return [inputs]

    def value(self, gradient, again):
        return functional.gradient_difference(2 * gradient, again).mean()


def assert_same_random_numbers(model, inputs, targets):
    """All passes of a step draw what the first one drew, as seen in the outputs."""
    seen = []
    model(inputs)  # what was drawn before does not matter

    def loss_fn(outputs, targets):
        seen.append(outputs.detach())
        return F.cross_entropy(outputs, targets)

    robustkern.backward(model, inputs, targets, Still(), loss_fn=loss_fn)
    assert len(seen) == 4
    torch.testing.assert_close(seen[1], seen[0])
    for shifted in seen[2:]:
        torch.testing.assert_close(shifted, seen[0], rtol=0, atol=1e-2)
    assert not torch.allclose(model(inputs), seen[0], rtol=0, atol=3e-2)  # others would show


class Within(nn.Module):
    """A network that runs in a context of its own."""

    def __init__(self, model, context):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, *args, **kwargs):
        with self.context():
            return self.model(*args, **kwargs)
