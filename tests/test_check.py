"""`check` finds what is wrong, and leaves everything as it was."""

import copy
import random
import re

import pytest
import torch
from networks import batch, random_state, smooth
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern import CURE, SGR, CovarianceFunction, GradientPenalty, Lazy
from robustkern.evaluation import fgsm_source, gradient_source, pgd_source

GN = GradientPenalty(1.0, p=2, power=2)


def check(model=None, penalty=GN, dtype=torch.float32, **options):
    model = smooth(dtype, dropout=0.0) if model is None else model
    return robustkern.check(model, *batch(dtype), penalty, **options)


@pytest.mark.parametrize(
    ("penalty", "passes"),
    [(CURE(), 4), (CURE(anchored=True), 3), (GN, 2), (Lazy(CURE(), every=4), 4)],
    ids=str,
)
def test_a_healthy_network_is_fine(penalty, passes):
    report = check(penalty=penalty)
    assert report.verdict == "fine"
    assert report.cosine > 0.999
    assert report.doubled > 0.999
    assert report.length == pytest.approx(1, abs=0.02)
    assert report.rounding < 0.02
    assert report.truncation < 0.02
    assert (report.forward, report.backward) == (passes, passes)
    assert report.shift == pytest.approx(1e-3 * batch()[0].std().item(), rel=0.5)
    assert report.dtype == "float32"
    assert report.notes == report.kinks == report.unmoved == ()
    assert report.unused == ("0.bias",)  # batch norm takes it away again


def test_strength_is_of_the_losses_gradient():
    once = check(penalty=GN).strength
    assert check(penalty=GradientPenalty(3.0, p=2, power=2)).strength == pytest.approx(
        3 * once, rel=0.01
    )


def test_memory_and_time_are_beside_those_of_a_plain_step():
    report = check(penalty=CURE())
    assert 0 < report.memory <= 1.05 * report.plain_memory
    assert report.seconds > report.plain_seconds > 0


def test_the_table_has_one_line_each_and_the_verdict_first():
    lines = str(check(smooth(torch.float32), CURE(direction="gaussian"))).splitlines()
    assert lines[0] == "verdict             fine"
    assert "moves               7 of 8 parameters" in lines
    assert "passes              4 forward, 4 backward" in lines
    assert lines[-1].startswith("note                not compared with float64: it draws")
    assert not any(line.startswith("double backward") for line in lines)
    assert {line[19] for line in lines} == {" "}


def test_parameters_that_are_not_moved_are_named():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets) + self.offset.square()

    model = smooth(torch.float32, batch_norm=False, dropout=0.0)
    model.head = nn.Linear(128, 5)
    model.forward = lambda x: nn.Sequential.forward(model[:-1], x)
    report = check(model, loss_fn=Offset())
    assert report.unmoved == ("loss_fn.offset",)
    assert report.unused == ("head.weight", "head.bias")
    assert report.verdict == "partial: the penalty does not move loss_fn.offset"
    assert report.parameters == 9


class Detached(robustkern.Penalty):
    def value(self, gradient):
        return gradient.detach().square().sum()


def test_a_penalty_that_is_constant_moves_nothing():
    report = check(penalty=Detached())
    assert report.verdict.startswith("idle: the penalty moves no parameter")
    assert (report.strength, report.cosine, report.shift, report.forward) == (0, None, None, 1)
    assert len(report.unmoved) == 7


def test_a_loss_without_gradient_has_no_strength():
    report = check(loss_fn=lambda o, t: 0 * F.cross_entropy(o, t))
    assert report.strength == 0
    assert report.verdict.startswith("idle")

    class OfItsOwn(robustkern.Penalty):
        def objective(self, outputs, targets):
            return outputs[:, 0].square()

        def value(self, gradient):
            return gradient.square().sum()

    assert check(penalty=OfItsOwn(), loss_fn=lambda o, t: 0 * o.sum()).strength is None


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "gradient"])
def test_sources_that_attack_the_model_are_compared_too(kind):
    model = smooth(torch.float32, dropout=0.0)
    source = {
        "fgsm": lambda: fgsm_source(model, 0.1),
        "pgd": lambda: pgd_source(model, 0.1, steps=2),
        "gradient": lambda: gradient_source(model),
    }[kind]()
    report = check(model, SGR(1.0, CovarianceFunction(3, 8, 8), source))
    assert report.cosine > 0.99  # float64 turns some signs
    assert report.shift == pytest.approx(1e-3 * batch()[0].std().item(), rel=0.5)


def test_layers_that_draw_from_pythons_generator():
    class DropPath(nn.Module):
        def forward(self, x):
            return x * (1 + (random.random() < 0.5))

    network = smooth(torch.float32, dropout=0.0)
    before = random.getstate()
    report = check(nn.Sequential(*network[:5], DropPath(), *network[5:]), penalty=CURE())
    assert report.verdict == "fine"
    assert random.getstate() == before


def test_a_model_that_returns_more_in_training_mode():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = smooth(torch.float32)

        def forward(self, x):
            return (self.network(x), 0) if self.training else self.network(x)

    assert check(Two(), output=0).verdict == "fine"


def test_a_covariance_that_has_learned_nothing_says_so_afterwards():
    covariance = CovarianceFunction(3, 8, 8)
    check(penalty=SGR(1.0, covariance))
    with pytest.raises(ValueError, match="must be updated first"):
        covariance.form(batch(torch.float32)[0])


@pytest.mark.parametrize("switch", ["ieee", "tf32"])
def test_the_newer_switches_of_tf32(switch):
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = switch
        assert check().verdict == "fine"
    finally:
        convolutions.fp32_precision = before


def test_a_shift_too_short_for_bfloat16_is_noisy():
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        report = check(penalty=CURE(), shift=1e-6)
        assert report.verdict.startswith("noisy: the penalty's gradient is mostly rounding in bf")
        assert report.dtype == "bfloat16 by autocast"
        assert report.truncation < 0.01
        assert check(penalty=GN).verdict == "fine"


def test_a_shift_that_is_lost_altogether_is_noisy():
    report = check(smooth(torch.bfloat16, dropout=0.0), dtype=torch.bfloat16, shift=1e-5)
    assert report.verdict.startswith("noisy: the penalty's gradient is mostly rounding")


def test_a_shift_too_long_is_coarse():
    report = check(penalty=CURE(), shift=1.0)
    assert report.verdict == "coarse: far from double backward; take a shorter shift"
    assert report.rounding < 0.01


def test_an_overflow_is_named():
    report = check(loss_fn=lambda o, t: torch.inf * F.cross_entropy(o, t))
    assert report.verdict == "overflow: the penalty's gradient is not finite"


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class OnceTanh(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_without_double_backward_the_reason_is_told():
    model = smooth(torch.float32, dropout=0.0)
    model[2] = OnceTanh()
    report = check(model, CURE())
    assert report.cosine is report.length is report.truncation is None
    assert report.rounding < 0.02
    (note,) = report.notes
    assert re.fullmatch("no double backward: RuntimeError: .*once.differentiable.*", note)
    assert report.verdict == "fine"


class SinglePrecision(nn.Sequential):
    def forward(self, x):
        return super().forward(x.float())


def test_without_float64_the_shift_is_doubled():
    model = SinglePrecision(smooth(torch.float32, dropout=0.0))
    report = check(model)
    assert report.rounding is report.cosine is None
    assert report.notes[0].startswith("not compared with float64: RuntimeError: ")
    assert report.verdict == "fine"
    report = check(model, shift=1e-8)
    assert report.verdict.startswith("noisy: in float32, the penalty's gradient turns")


def test_kinks_are_named_and_not_held_against_it():
    class Rectified(nn.Linear):
        def forward(self, x):
            return super().forward(F.max_pool2d(F.relu(x - 0.5), 2).flatten(1))

    report = check(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Rectified(48, 5)))
    assert report.kinks == ("MaxPool2D", "Relu")
    assert report.verdict == "fine"
    assert report.notes[0].startswith("first order sees kinks")


def test_attention_is_compared_though_its_fast_kernels_have_no_double_backward():
    class Attention(nn.Linear):
        def forward(self, x):
            return super().forward(F.scaled_dot_product_attention(x, x, x).flatten(1))

    assert check(Attention(192, 5)).cosine > 0.999


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "in place"])
def test_compiled_models(wrapped):
    model = smooth(torch.float32, dropout=0.0)
    if wrapped:
        model = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    report = check(model, CURE())
    assert report.verdict == "fine"
    assert report.cosine > 0.999
    assert report.forward == 4


def test_dropout_is_off_in_the_comparison():
    report = check(smooth(torch.float32, dropout=0.5), CURE())
    assert report.cosine > 0.999


def test_a_mapping_and_a_picked_output():
    class Signal(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.network = nn.Embedding(3, 192), smooth(torch.float32, dropout=0.0)

        def forward(self, signal, kind):
            x = signal + self.embedding(kind).view_as(signal)
            return {"logits": self.network(x), "features": x}

    signal, targets = batch(torch.float32)
    report = robustkern.check(
        Signal(), {"kind": targets % 3, "signal": signal}, targets, CURE(),
        output="logits", wrt="signal",
    )  # fmt: skip
    assert report.verdict == "fine"
    assert report.cosine > 0.999
    assert report.rounding < 0.02
    assert report.forward == report.backward == 4
    assert report.shift == pytest.approx(1e-3 * signal.std().item(), rel=0.5)


def test_eval_mode_passes():
    model = smooth(torch.float32)
    for _ in range(20):
        model(batch(torch.float32)[0])  # running statistics that are not the initial ones
    report = check(model, CURE(), batch_norm="eval")
    assert report.verdict == "fine"
    assert report.cosine > 0.99
    assert report.forward == 5


def everything(model, penalty):
    """What a step could move, in a form that can be compared."""
    modules = [*model.modules(), *penalty.modules()]
    states = {**model.state_dict(), **{f"p.{k}": v for k, v in penalty.state_dict().items()}}
    return (
        {name: value.tolist() for name, value in states.items()},
        [m.training for m in modules],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [id(p.grad) for p in model.parameters()],
        random_state().tolist(),
    )


@pytest.mark.parametrize("state", ["fresh", "used"])
@pytest.mark.parametrize("batch_norm", ["batch", "eval"])
def test_everything_is_as_it_was(state, batch_norm):
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    penalty = SGR(1.0, CovarianceFunction(3, 8, 8)) + Lazy(CURE(direction="gaussian"), every=3)
    if state == "used":
        robustkern.backward(model, inputs, targets, penalty)
        model[1].eval()
    inputs.requires_grad_()
    before = everything(model, penalty)
    robustkern.check(model, inputs, targets, penalty, batch_norm=batch_norm)
    assert everything(model, penalty) == before
    assert inputs.grad is None
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("which", [1, 2, 3, 5, 8])
def test_after_an_error_everything_is_as_it_was(which):
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    before = everything(model, GN)
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        if len(calls) == which:
            raise KeyError("from inside the loss")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(KeyError, match="from inside the loss"):
        robustkern.check(model, inputs, targets, GN, loss_fn=loss_fn)
    assert everything(model, GN) == before


def test_without_gradients_around_it():
    with torch.no_grad():
        assert check().cosine > 0.999


INPUTS, TARGETS = batch()


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": nn.Flatten()},
        {"inputs": [1]},
        {"targets": TARGETS[:5]},
        {"penalty": F.cross_entropy},
        {"loss_fn": "ce"},
        {"shift": 0.0},
        {"batch_norm": "frozen"},
    ],
    ids=str,
)
def test_bad_input_is_named_as_backward_does(change):
    arguments = {"model": smooth(), "inputs": INPUTS, "targets": TARGETS, "penalty": GN} | change
    with pytest.raises((TypeError, ValueError)) as expected:
        robustkern.backward(**copy.copy(arguments))
    with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
        robustkern.check(**arguments)
