"""LLR: its definition, its ascent, and the engine where losses count besides gradients."""

import pytest
import torch
from agreement import assert_agrees
from networks import batch, gradient, linear, pixels, random_state, smooth
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern import CURE, GradientPenalty, Lazy, LocalLinearity

LLR = LocalLinearity(2.0, 1.0, eps=0.1, random_start=False)


class Quadratic(nn.Module):
    """Of each sample (x - c)^T diag(scale) (x - c) / 2: Hessians are the diagonal."""

    def __init__(self, centre, scale):
        super().__init__()
        self.centre = nn.Parameter(centre)
        self.scale = nn.Parameter(scale)

    def forward(self, x):
        return 0.5 * (self.scale * (x - self.centre).square()).sum(1)


def mean_output(outputs, targets):
    return outputs.mean()


def test_of_a_quadratic_it_is_known():
    scale = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    model = Quadratic(torch.zeros(3, dtype=torch.float64), scale)
    inputs = pixels(5, 3) + 0.1
    penalty = LocalLinearity(2.0, 3.0, eps=0.1, random_start=False)
    step = robustkern.backward(model, inputs, torch.zeros(5), penalty, loss_fn=mean_output)
    # The error d^T H d / 2 is largest in the corners; the gradient's signs, here 1, are one.
    error, predicted = 0.5 * 0.01 * scale.sum(), 0.1 * (scale * inputs).sum(1).mean()
    torch.testing.assert_close(step.penalty, 2 * error + 3 * predicted)
    plain = 0.5 * inputs.square().mean(0)
    expected = plain + 2 * 0.5 * 0.01 + 3 * 0.1 * inputs.mean(0)
    torch.testing.assert_close(model.scale.grad, expected, rtol=1e-4, atol=0)


def test_ascent_finds_more_than_a_random_start_and_stays_in_the_ball():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    errors = []
    for steps in (1, 5):
        torch.manual_seed(0)
        penalty = LocalLinearity(1.0, 0.0, eps=0.1, steps=steps)
        errors.append(penalty(model, inputs, targets))
        assert penalty._displacement.abs().max() <= 0.1 + 1e-12
    torch.manual_seed(0)
    start = 0.1 * (2 * torch.rand_like(inputs) - 1)
    x = inputs.clone().requires_grad_()
    losses = F.cross_entropy(model(x), targets, reduction="none")
    (g,) = torch.autograd.grad(losses.sum(), x)
    there = F.cross_entropy(model(inputs + start), targets, reduction="none")
    drawn = (there - losses - (start * g).flatten(1).sum(1)).abs().mean()
    assert drawn < errors[0] <= errors[1] * 1.001


def test_a_linear_loss_has_no_error_and_gives_no_nan():
    model = nn.Linear(4, 1, dtype=torch.float64)
    penalty = LocalLinearity(1.0, 0.0, eps=0.1)
    step = robustkern.backward(model, pixels(3, 4), torch.zeros(3), penalty, loss_fn=mean_output)
    assert step.penalty < 1e-12
    assert gradient(model).isfinite().all()
    sure = linear(torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    step = robustkern.backward(sure, torch.rand(3, 2), torch.tensor([0, 1, 1]), LLR)
    assert step.penalty == 0
    assert gradient(sure).isfinite().all()


@pytest.mark.parametrize("batch_norm", ["batch", "eval"])
def test_batch_norm_and_a_loss_of_ones_own(batch_norm):
    def smoothed(outputs, targets):
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    model, (inputs, targets) = smooth(dropout=0.0), batch()
    if batch_norm == "eval":
        model.eval()
    assert_agrees(model, inputs, targets, penalty=LLR, loss_fn=smoothed, batch_norm=batch_norm)


def test_inputs_and_outputs_that_are_picked():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = smooth(dropout=0.0)

        def forward(self, images, unused):
            return {"logits": self.inner(images)}

    inputs, targets = batch()
    entries = {"images": inputs, "unused": 3}
    assert_agrees(Wrapped(), entries, targets, penalty=LLR, wrt="images", output="logits")


def test_an_objective_takes_the_place_of_the_loss():
    class OfLogits(LocalLinearity):
        def objective(self, outputs, targets):
            return outputs.square().sum(1)

    penalty = OfLogits(2.0, 1.0, eps=0.1, random_start=False)
    assert_agrees(smooth(dropout=0.0), *batch(), penalty=penalty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_scaler(dtype):
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32, 16)
    penalty = LocalLinearity(2.0, 1.0, eps=0.3, random_start=False)
    expected = robustkern.backward(model, inputs, targets, penalty)
    truth = gradient(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with torch.autocast("cpu", dtype):
        step = robustkern.backward(model, inputs, targets, penalty, scaler=scaler)
    torch.testing.assert_close(step.penalty, expected.penalty, rtol=0.05, atol=0)
    assert F.cosine_similarity(gradient(model) / 128, truth, dim=0) > 0.9


def test_as_a_term_it_has_a_value_without_gradients():
    model, (inputs, targets) = smooth(), batch()
    torch.manual_seed(7)
    with torch.no_grad():
        value = LLR(model, inputs, targets)
    assert not value.requires_grad
    torch.manual_seed(7)
    torch.testing.assert_close(value, LLR(model, inputs, targets).detach())


def test_a_model_in_half_precision():
    model, (inputs, targets) = smooth(torch.bfloat16, dropout=0.0), batch(torch.bfloat16)
    exact = LLR(smooth(dropout=0.0), *batch())
    step = robustkern.backward(model, inputs, targets, LLR)
    assert step.penalty.item() == pytest.approx(exact.item(), rel=0.05)
    assert gradient(model).isfinite().all()


# What overflows in the first pass at x + d, 3, does so again in the one that is weighted, 5.
@pytest.mark.parametrize("which", [0, 1, 2, 4, 5])
def test_an_overflow_in_any_pass_shows(which):
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    calls = []

    def overflow(model, inputs, outputs):
        calls.append(1)
        return outputs * torch.inf if len(calls) == which + 1 else None

    model.register_forward_hook(overflow)
    robustkern.backward(model, inputs, targets, LLR)
    assert len(calls) == 6
    assert not gradient(model).isfinite().all()


@pytest.mark.parametrize("which", range(6))
def test_after_an_error_nothing_has_happened(which):
    model, (inputs, targets) = smooth(), batch()
    robustkern.backward(model, inputs, targets, LLR)
    before = (gradient(model), random_state(), *(b.clone() for b in model.buffers()))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == which + 1:
            raise KeyError("from inside the model")

    model.register_forward_hook(fail)
    with pytest.raises(KeyError, match="from inside the model"):
        robustkern.backward(model, inputs, targets, LocalLinearity(2.0, 1.0, eps=0.1))
    for found, expected in zip(
        (gradient(model), random_state(), *model.buffers()), before, strict=True
    ):
        assert torch.equal(found, expected)


def test_random_numbers_and_statistics_move_once():
    (inputs, targets), seen = batch(), []
    for penalty in (LLR, GradientPenalty(1.0)):
        model = smooth()
        torch.manual_seed(3)
        robustkern.backward(model, inputs, targets, penalty)
        seen.append((random_state(), *model.buffers()))
    for found, expected in zip(*seen, strict=True):
        assert torch.equal(found, expected)


def test_dropout_is_the_same_in_the_ascent():
    model, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 1)), batch()
    model.double()
    penalty = LocalLinearity(1.0, 0.0, eps=0.1)  # of a linear loss there is no error
    step = robustkern.backward(model, inputs, targets, penalty, loss_fn=mean_output)
    assert step.penalty < 1e-12


def test_a_lazy_term_and_a_sum_keep_points_and_losses_apart():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    one, other = CURE(h=0.3), GradientPenalty(0.5)
    alone = [p(model, inputs, targets) for p in (one, LLR, other)]
    for together in (one + LLR + other, LLR + Lazy(one, every=1) + other):
        torch.testing.assert_close(together(model, inputs, targets), sum(alone))


def test_a_compiled_model():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    compiled = torch.compile(model, backend="aot_eager")
    assert_agrees(compiled, inputs, targets, truth=model, penalty=LLR)


def test_check_compares_it_with_double_backward():
    report = robustkern.check(smooth(torch.float32), *batch(torch.float32), LLR)
    assert report.cosine > 0.999
    assert report.verdict == "fine"
    assert (report.forward, report.backward) == (6, 6)
