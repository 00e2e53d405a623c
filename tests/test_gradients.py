"""Each promise of the first-order engine."""

import copy
import gc
import random
import re

import numpy
import pytest
import torch
from networks import batch, gradient, random_state, smooth
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import robustkern
from robustkern import (
    CURE,
    SGR,
    CovarianceFunction,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    LocalLinearity,
)

GN = GradientPenalty(1.0, p=2, power=2)


def sgr():
    return SGR(1.0, CovarianceFunction(3, 8, 8))


PENALTIES = {
    "tv": lambda: GradientPenalty(1.0),
    "tv_l1": lambda: GradientPenalty(1.0, p=1),
    "tv_linf": lambda: GradientPenalty(1.0, p=torch.inf),
    "gn": lambda: GN,
    "lipschitz": lambda: LipschitzPenalty(1.0),
    "sgr": sgr,
    "cure": CURE,
    "cure_gradient": lambda: CURE(direction="gradient"),
    "cure_gaussian": lambda: CURE(direction="gaussian", samples=2),
    "cure_norm": lambda: CURE(squared=False),
    "cure_anchored": lambda: CURE(anchored=True),
    "llr": lambda: LocalLinearity(2.0, 1.0, eps=0.1),
    "sum": lambda: CURE() + GN + sgr() + CURE(h=0.5, anchored=True),
    "sum_llr": lambda: CURE() + LocalLinearity(2.0, 1.0, eps=0.1, random_start=False) + GN,
    "lazy": lambda: Lazy(CURE(), every=1),
}


def penalty_gradient(model, inputs, targets, penalty, method):
    """dR/dtheta alone, and R."""
    model.zero_grad()
    torch.manual_seed(7)
    if method == "backward":
        value = robustkern.backward(model, inputs, targets, penalty).penalty
        total = gradient(model)
        model.zero_grad()
        torch.manual_seed(7)
        F.cross_entropy(model(inputs), targets).backward()
        return value, total - gradient(model)
    value = penalty(model, inputs, targets, method=method)
    value.backward()
    found = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )
    return value.detach(), found


@pytest.mark.setting("batch norm with the statistics of the batch", group="layers and parameters")
@pytest.mark.setting("dropout", group="layers and parameters")
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize(
    ("dtype", "cosine", "length"),
    [(torch.float64, 1e-7, 1e-3), (torch.float32, 1e-3, 2e-2)],  # 0.999 is what is promised
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("method", ["backward", "first_order"])
def test_first_order_agrees_with_double_backward(name, dtype, cosine, length, method):
    model, (inputs, targets) = smooth(dtype), batch(dtype)
    value, found = penalty_gradient(model, inputs, targets, PENALTIES[name](), method)
    exact, truth = penalty_gradient(model, inputs, targets, PENALTIES[name](), "double_backward")
    torch.testing.assert_close(value, exact)
    assert 1 - F.cosine_similarity(found, truth, dim=0) <= cosine
    assert abs(found.norm() / truth.norm() - 1) <= length


class Passes:
    """Counts the forward and the backward passes of a model, and keeps its inputs."""

    def __init__(self, model):
        self.forward, self.backward, self.inputs = 0, 0, []
        model.register_forward_hook(self._forward)

    def _forward(self, model, inputs, output):
        self.forward += 1
        self.inputs.append(inputs[0].detach())
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad):
        self.backward += 1


@pytest.mark.parametrize(
    ("penalty", "count"),
    [
        (GN, 2),
        (GradientPenalty(1.0), 2),
        (LipschitzPenalty(1.0), 2),
        (sgr(), 2),
        (GN + sgr() + LipschitzPenalty(1.0), 2),
        (CURE(), 4),
        (CURE(anchored=True), 3),
        (CURE(direction="gaussian", samples=3), 8),
        (CURE() + GN + sgr(), 4),
        (CURE(anchored=True) + GN, 4),
        (CURE() + CURE(squared=False), 4),
        (CURE() + CURE(h=0.5), 6),
        (LocalLinearity(2.0, 1.0, eps=0.1, steps=3), 7),
        (LocalLinearity(2.0, 1.0, eps=0.1, steps=3) + CURE() + GN, 9),
    ],
    ids=str,
)
def test_number_of_passes(penalty, count):
    model, (inputs, targets) = smooth(), batch()
    passes = Passes(model)
    robustkern.backward(model, inputs, targets, penalty)
    assert (passes.forward, passes.backward) == (count, count)


def test_gradients_held_constant_at_a_point_cost_no_shifted_pass():
    class TowardsTheOther(robustkern.Penalty):
        def points(self, inputs, gradient):
            return [inputs + 0.1]

        def value(self, gradient, shifted):
            return (gradient - shifted.detach()).square().sum(dim=(1, 2, 3)).mean()

    model, (inputs, targets) = smooth(), batch()
    _, found = penalty_gradient(model, inputs, targets, TowardsTheOther(), "backward")
    _, truth = penalty_gradient(model, inputs, targets, TowardsTheOther(), "double_backward")
    assert 1 - F.cosine_similarity(found, truth, dim=0) < 1e-7
    passes = Passes(model)
    robustkern.backward(model, inputs, targets, TowardsTheOther())
    assert passes.forward == 3


def test_lazy_applies_every_kth_call_multiplied_by_k():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    lazy = Lazy(GN, every=3)
    once = robustkern.backward(model, inputs, targets, GN).penalty.item()
    passes = Passes(model)
    values = [robustkern.backward(model, inputs, targets, lazy).penalty.item() for _ in range(6)]
    assert values == pytest.approx([0, 0, 3 * once, 0, 0, 3 * once])
    assert passes.forward == 4 * 1 + 2 * 2
    assert int(lazy.state_dict()["_extra_state"]) == 6
    resumed = Lazy(GN, every=3)
    resumed.load_state_dict(lazy.state_dict())
    assert resumed.calls == 6
    lazy.eval()
    assert robustkern.backward(model, inputs, targets, lazy).penalty.item() == pytest.approx(once)
    assert lazy.calls == 6


def test_lazy_term_of_a_sum_leaves_the_rest_alone():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    passes = Passes(model)
    penalty = GN + Lazy(CURE(), every=2)
    for _ in range(2):
        robustkern.backward(model, inputs, targets, penalty)
    assert passes.forward == 2 + 4


class SavedBytes:
    """The most bytes that autograd keeps at one time for backward."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        return Held(self, tensor)


class Held:
    def __init__(self, saved, tensor):
        self.saved, self.tensor, self.bytes = saved, tensor.detach(), tensor.nbytes
        saved.now += self.bytes
        saved.peak = max(saved.peak, saved.now)

    def __del__(self):
        self.saved.now -= self.bytes


@pytest.mark.parametrize("name", ["gn", "cure", "cure_anchored", "llr", "sum"])
def test_one_graph_is_alive_at_a_time(name):
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32, samples=32)
    with SavedBytes() as plain:
        F.cross_entropy(model(inputs), targets).backward()
    assert plain.peak > 1e5
    with SavedBytes() as saved:
        robustkern.backward(model, inputs, targets, PENALTIES[name]())
    assert saved.peak <= 1.05 * plain.peak
    with SavedBytes() as double:
        loss = F.cross_entropy(model(inputs), targets)
        (loss + PENALTIES[name]()(model, inputs, targets)).backward()
    assert double.peak > 1.5 * plain.peak  # the count can tell


@pytest.mark.parametrize("name", ["gn", "cure", "cure_anchored", "cure_gaussian", "llr", "sum"])
def test_two_copies_of_the_gradients_at_most(name):
    model, (inputs, targets) = smooth(), batch()
    weight = model[-1].weight
    copies = []

    def count(*_):
        found = {
            t.data_ptr()
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, nn.Parameter)  # not what tests before it have traced
            and t.shape == weight.shape
            and t is not weight
            and t.data_ptr() != weight.data_ptr()
        }
        if weight.grad is not None:
            found.add(weight.grad.data_ptr())
        copies.append(len(found))

    model.zero_grad()
    gc.collect()
    model.register_forward_hook(count)
    robustkern.backward(model, inputs, targets, PENALTIES[name]())
    assert 1 <= max(copies) <= 2
    copies.clear()  # besides what was in .grad
    robustkern.backward(model, inputs, targets, PENALTIES[name]())
    assert max(copies) <= 2 + 1


def test_a_heavy_penalty_leaves_the_gradient_of_the_loss():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    penalty = GradientPenalty(1e6, power=2)
    robustkern.backward(model, inputs, targets, penalty)
    both = gradient(model)
    model.zero_grad()
    term = penalty(model, inputs, targets, method="first_order")
    alone = torch.autograd.grad(term, list(model.parameters()), materialize_grads=True)
    F.cross_entropy(model(inputs), targets).backward()
    found = both - torch.cat([g.flatten() for g in alone])
    torch.testing.assert_close(found, gradient(model), rtol=1e-3, atol=1e-4)


@pytest.mark.setting(
    "gradient accumulation",
    group="training loop",
    note="divide the gradients, not the loss: the penalty is one of the loss's gradients",
)
def test_gradients_already_there_are_added_to():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    robustkern.backward(model, inputs, targets, CURE())
    fresh = gradient(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    held = [p.grad for p in model.parameters()]
    robustkern.backward(model, inputs, targets, CURE())
    torch.testing.assert_close(gradient(model), fresh + 1)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


def test_the_rest_of_the_world_gets_no_gradient():
    model, (inputs, targets) = smooth(), batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    inputs.requires_grad_()
    robustkern.backward(
        model, inputs, targets, CURE(), loss_fn=lambda o, t: F.cross_entropy(scale * o, t)
    )
    assert inputs.grad is None
    assert scale.grad is None


@pytest.mark.setting("losses with parameters of their own", group="inputs, outputs and losses")
def test_parameters_of_the_loss_get_theirs():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, outputs, targets):
            return F.cross_entropy(self.scale * outputs, targets)

    model, (inputs, targets) = smooth(dropout=0.0), batch()
    first, second = Scaled(), Scaled()
    robustkern.backward(model, inputs, targets, GN, loss_fn=first)
    loss = second(model(inputs), targets) + GN(model, inputs, targets, loss_fn=second)
    loss.backward()
    torch.testing.assert_close(first.scale.grad, second.scale.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.setting("parameters that no pass uses", group="layers and parameters")
def test_frozen_and_unused_parameters_stay_without_gradient():
    model, (inputs, targets) = smooth(), batch()
    model[0].weight.requires_grad_(False)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    robustkern.backward(model, inputs, targets, CURE())
    assert model[0].weight.grad is None
    assert model.extra.grad is None
    assert model[3].weight.grad is not None


def test_running_statistics_and_random_state_move_as_in_one_plain_step():
    model, (inputs, targets) = smooth(), batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    step = robustkern.backward(model, inputs, targets, CURE() + GN)
    after = random_state()
    torch.manual_seed(3)
    outputs = twin(inputs)
    assert torch.equal(after, random_state())
    assert torch.equal(step.outputs, outputs)
    assert torch.equal(step.loss, F.cross_entropy(outputs, targets))
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("method", ["first_order", "double_backward"])
def test_loss_terms_leave_running_statistics_alone(method):
    model, (inputs, targets) = smooth(), batch()
    loss = F.cross_entropy(model(inputs), targets)
    before = copy.deepcopy(dict(model.named_buffers()))
    (loss + CURE()(model, inputs, targets, method=method)).backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(before[name], buffer), name


@pytest.mark.setting("spectral norm", group="layers and parameters")
def test_buffers_that_enter_the_computation_are_the_same_in_all_passes():
    torch.manual_seed(0)
    linear = nn.Linear(192, 5)
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(linear)).double()
    inputs, targets = batch()
    twin = copy.deepcopy(model)
    before = next(model.buffers()).clone()
    seen = []
    model.register_forward_hook(
        lambda *_: seen.append([buffer.clone() for buffer in model.buffers()])
    )
    robustkern.backward(model, inputs, targets, CURE())
    twin(inputs)
    for one_pass in [*seen, list(model.buffers())]:
        for buffer, once in zip(one_pass, twin.buffers(), strict=True):
            assert torch.equal(buffer, once)
    assert len(seen) == 4
    assert not torch.equal(seen[0][0], before)  # a pass does move it


class Counting(nn.Linear):
    """Keeps a running value by rebinding its buffer."""

    def __init__(self):
        super().__init__(192, 5, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x.flatten(1))


def test_buffers_that_a_forward_rebinds_move_once_and_are_restored():
    model, (inputs, targets) = Counting(), batch()
    robustkern.backward(model, inputs, targets, CURE())
    assert model.calls == 1

    def loss_fn(outputs, targets):
        if loss_fn.calls == 2:
            raise KeyError("from inside the loss")
        loss_fn.calls += 1
        return F.cross_entropy(outputs, targets)

    loss_fn.calls = 0
    with pytest.raises(KeyError, match="from inside the loss"):
        robustkern.backward(model, inputs, targets, CURE(), loss_fn=loss_fn)
    assert model.calls == 1


def test_statistics_of_the_loss_move_once():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5, dtype=torch.float64)

        def forward(self, outputs, targets):
            return F.cross_entropy(self.norm(outputs), targets)

    loss_fn = Normed()
    robustkern.backward(smooth(), *batch(), CURE(), loss_fn=loss_fn)
    assert loss_fn.norm.num_batches_tracked == 1


class Holding(nn.Module):
    def __init__(self, network, penalty):
        super().__init__()
        self.network, self.penalty = network, penalty

    def forward(self, x):
        return self.network(x)


def test_a_penalty_that_the_model_holds_learns_all_the_same():
    inputs, targets = batch()
    model = Holding(smooth(dropout=0.0, batch_norm=False), Lazy(sgr(), every=2))
    values = [
        robustkern.backward(model, inputs, targets, model.penalty, batch_norm="eval").penalty
        for _ in range(4)
    ]
    assert [value > 0 for value in values] == [False, True, False, True]
    torch.testing.assert_close(values[1], values[3])
    assert model.penalty.penalty.covariance.updates == 2


def test_parameters_shared_with_the_loss_count_once():
    class WithDecay(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets) + self.model[-1].weight.square().sum()

    model, (inputs, targets) = smooth(dropout=0.0), batch()
    module = WithDecay(model)
    robustkern.backward(model, inputs, targets, GN, loss_fn=module)
    found = gradient(model)
    model.zero_grad()
    robustkern.backward(model, inputs, targets, GN, loss_fn=lambda o, t: module(o, t))
    torch.testing.assert_close(found, gradient(model))


def test_a_penalty_that_knows_the_model_leaves_it_its_statistics():
    class Knowing(robustkern.Penalty):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def value(self, gradient):
            return gradient.square().sum()

    for batch_norm in ("batch", "eval"):
        model = smooth()
        robustkern.backward(model, *batch(), Knowing(model), batch_norm=batch_norm)
        assert model[1].num_batches_tracked == 1


class Quantized(torch.autograd.Function):
    """Rounds, as if it did not."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def test_double_backward_beside_what_has_none():
    class Network(nn.Linear):
        def forward(self, x):
            return F.linear(x.flatten(1), Quantized.apply(self.weight), self.bias).tanh()

    model, (inputs, targets) = Network(192, 5, dtype=torch.float64), batch()
    GN(model, inputs, targets).backward()
    exact = model.weight.grad.clone()
    model.zero_grad()
    GN(model, inputs, targets, method="first_order").backward()
    torch.testing.assert_close(model.weight.grad, exact, rtol=1e-3, atol=1e-5)


def test_generators_of_python_and_numpy_are_replayed():
    class Doubting(nn.Linear):
        def forward(self, x):
            factor = (1 + random.random()) * (1 + numpy.random.rand())  # noqa: NPY002
            return super().forward(factor * x.flatten(1)).tanh()

    (inputs, targets), grads = batch(), []
    for _ in range(2):
        model = Doubting(192, 5, bias=False, dtype=torch.float64)
        nn.init.normal_(model.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        random.seed(0), numpy.random.seed(0)  # noqa: NPY002
        robustkern.backward(model, inputs, targets, GN, shift=10.0 ** -(5 + len(grads)))
        grads.append(model.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-4)


def test_a_network_that_computes_in_bfloat16_takes_its_shift():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = smooth(torch.bfloat16, dropout=0.0)

        def forward(self, x):
            return self.network(x.bfloat16()).float()

    inputs, targets = batch(torch.float32)
    step = robustkern.backward(Inside(), inputs, targets, GN)
    assert step.shift / inputs.std() == pytest.approx(1e-2, rel=0.5)


def test_the_shift_is_reported():
    model, (inputs, targets) = smooth(), batch()
    passes = Passes(model)
    step = robustkern.backward(model, inputs, targets, GN)
    moved = passes.inputs[1] - passes.inputs[0]
    torch.testing.assert_close(step.shift, moved.square().mean().sqrt())
    assert robustkern.backward(model, inputs, targets, Lazy(GN, every=2)).shift == 0


def test_expanded_buffers_and_targets_with_a_graph():
    model, inputs = smooth(dropout=0.0), batch()[0]
    model.register_buffer("wide", torch.zeros(1).expand(5))
    soft = nn.Linear(5, 5, dtype=torch.float64)(torch.eye(6, 5, dtype=torch.float64)).softmax(1)
    robustkern.backward(model, inputs, soft, CURE())
    assert gradient(model).isfinite().all()


def test_inference_mode_is_named():
    message = "backward: gradients cannot be computed in inference mode"
    with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
        robustkern.backward(smooth(), *batch(), GN)


def test_lazy_within_lazy():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    once = robustkern.backward(model, inputs, targets, GN).penalty.item()
    for penalty in (Lazy(Lazy(GN, every=2), every=2), Lazy(Lazy(GN, 2) + Lazy(GN, 2), 2)):
        terms = 2 if isinstance(penalty.penalty, robustkern.Sum) else 1
        values = [
            robustkern.backward(model, inputs, targets, penalty).penalty.item() for _ in range(4)
        ]
        assert values == pytest.approx([0, 0, 0, 4 * terms * once])


def test_value_must_depend_on_the_same_gradients_whatever_their_values():
    class Branching(robustkern.Penalty):
        def points(self, inputs, gradient):
            return [inputs + 0.1]

        def value(self, gradient, shifted):
            changed = (shifted - gradient).abs().max() > 0
            return (shifted if changed else gradient).square().sum()

    message = "Branching.value must depend on the same gradients whatever their values"
    with pytest.raises(ValueError, match=re.escape(message)):
        robustkern.backward(smooth(), *batch(), Branching())


def test_two_terms_of_one_penalty_have_graphs_of_their_own():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    penalty = sgr()
    (penalty(model, inputs, targets) + penalty(model, inputs, targets)).backward()
    assert model[0].weight.grad.isfinite().all()


def test_an_overflow_does_not_stay_in_the_covariance():
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32)
    penalty = SGR(1.0, CovarianceFunction(3, 8, 8), source="gradient")
    robustkern.backward(
        model, inputs, targets, penalty, loss_fn=lambda o, t: torch.inf * F.cross_entropy(o, t)
    )
    assert penalty.covariance.updates == 0
    model.zero_grad()
    assert robustkern.backward(model, inputs, targets, penalty).penalty.isfinite()
    assert gradient(model).isfinite().all()
    assert penalty.covariance.updates == 1


@pytest.mark.setting('batch norm, batch_norm="eval"', group="layers and parameters")
def test_eval_mode_passes_agree_with_double_backward_in_eval_mode():
    model, (inputs, targets) = smooth(), batch()
    model(inputs)  # running statistics that are not the initial ones
    twin = copy.deepcopy(model)
    passes = Passes(model)
    torch.manual_seed(5)
    robustkern.backward(model, inputs, targets, CURE(), batch_norm="eval")
    assert passes.forward == 5
    assert all(module.training for module in model.modules())
    torch.manual_seed(5)
    loss = F.cross_entropy(twin(inputs), targets)
    loss.backward()
    twin.eval()
    CURE()(twin, inputs, targets).backward()
    torch.testing.assert_close(gradient(model), gradient(twin), rtol=1e-4, atol=1e-6)
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_penalty_does_not_change_with_the_batch_size():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    twice = torch.cat([inputs, inputs]), torch.cat([targets, targets])
    for penalty in (CURE(), GN, sgr(), LipschitzPenalty(1.0)):
        model.zero_grad()
        small = robustkern.backward(model, inputs, targets, penalty).penalty
        of_small = gradient(model)
        model.zero_grad()
        large = robustkern.backward(model, *twice, penalty).penalty
        torch.testing.assert_close(large, small)
        torch.testing.assert_close(gradient(model), of_small, rtol=1e-4, atol=1e-6)


def test_shift_is_the_displacement_of_the_samples_that_move():
    model, (inputs, targets) = smooth(), batch()
    passes = Passes(model)
    robustkern.backward(model, inputs, targets, GN, shift=1e-3)
    moved = passes.inputs[1] - passes.inputs[0]
    assert moved.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.5)
    passes.inputs.clear()
    robustkern.backward(model, inputs, targets, LipschitzPenalty(1.0), shift=1e-3)
    moved = (passes.inputs[1] - passes.inputs[0]).flatten(1)
    assert (moved.abs().sum(1) > 0).sum() == 1
    assert moved.square().mean(1).sqrt().max().item() == pytest.approx(1e-3, rel=0.5)


def test_zero_gradients_give_no_nan():
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    nn.init.zeros_(model[-1].weight)  # the outputs do not depend on the inputs
    for name, make in PENALTIES.items():
        model.zero_grad()
        step = robustkern.backward(model, inputs, targets, make())
        assert step.penalty == 0, name
        assert gradient(model).isfinite().all(), name


def test_a_network_that_ignores_its_input_has_a_zero_penalty():
    class Blind(nn.Linear):
        def forward(self, x):
            return self.bias.expand(len(x), -1)

    for method in ("backward", "first_order", "double_backward"):
        model, (inputs, targets) = Blind(1, 5, dtype=torch.float64), batch()
        if method == "backward":
            assert robustkern.backward(model, inputs, targets, CURE()).penalty == 0
        else:
            assert CURE()(model, inputs, targets, method=method) == 0


def test_saturated_loss_gives_no_nan():
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    for name, make in PENALTIES.items():
        model.zero_grad()
        step = robustkern.backward(
            model, inputs, targets, make(), loss_fn=lambda o, t: 1e-30 * F.cross_entropy(o, t)
        )
        assert step.penalty.isfinite(), name
        assert gradient(model).isfinite().all(), name


@pytest.mark.setting(
    "autocast to float16 with GradScaler",
    group="precision",
    note="an overflow in any pass skips the step",
)
def test_scaler_scales_the_gradients_and_nothing_else():
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32)
    plain = robustkern.backward(model, inputs, targets, CURE())
    expected = gradient(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler(inputs.device.type, init_scale=1024.0)
    scaled = robustkern.backward(model, inputs, targets, CURE(), scaler=scaler)
    torch.testing.assert_close(scaled.loss, plain.loss)
    torch.testing.assert_close(scaled.penalty, plain.penalty)
    torch.testing.assert_close(gradient(model) / 1024, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.setting(
    "autocast to float16 with GradScaler",
    group="precision",
    note="an overflow in any pass skips the step",
)
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_overflow_in_any_pass_reaches_the_scaler(which):
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss_fn(outputs, targets):
        calls.append(1)
        loss = F.cross_entropy(outputs, targets)
        return loss * torch.inf if len(calls) == which + 1 else loss

    scaler = torch.amp.GradScaler(inputs.device.type, init_scale=4.0)
    robustkern.backward(model, inputs, targets, CURE(), loss_fn=loss_fn, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


class Synchronizations(TorchDispatchMode):
    """Finds what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        waits = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
        if name in waits:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PENALTIES)
def test_the_host_never_waits(name):
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    penalty = PENALTIES[name]()
    with Synchronizations() as mode:
        robustkern.backward(model, inputs, targets, penalty)
    assert mode.found == []
    with Synchronizations() as mode:
        torch.ones(()).item()
    assert mode.found  # the search can find


@pytest.mark.parametrize("which", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", ["batch", "eval"])
def test_after_an_error_nothing_has_happened(which, batch_norm):
    model, (inputs, targets) = smooth(), batch()
    penalty = CURE() + sgr() + Lazy(GN, every=1)
    robustkern.backward(model, inputs, targets, penalty)
    model[5].eval()  # one module in another mode than the rest
    modes = [m.training for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    state = copy.deepcopy(model.state_dict())
    penalty_state = copy.deepcopy(penalty.state_dict())
    state_of_random = random_state()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == which:
            raise KeyError("from inside the model")

    handle = model.register_forward_hook(fail)
    with pytest.raises(KeyError, match="from inside the model"):
        robustkern.backward(model, inputs, targets, penalty, batch_norm=batch_norm)
    handle.remove()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(random_state(), state_of_random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, value in penalty.state_dict().items():
        assert torch.equal(value, penalty_state[name]), name


class R1(robustkern.Penalty):
    """Input gradient of a critic's output (Mescheder et al. 2018)."""

    def objective(self, outputs, targets):
        return outputs[:, 0]

    def value(self, gradient):
        return robustkern.functional.gradient_norm(gradient, 2).square().mean() / 2


@pytest.mark.setting(
    "gradients of another scalar: critics, energies",
    group="inputs, outputs and losses",
    note="`Penalty.objective`",
)
def test_objective_of_ones_own():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    passes = Passes(model)
    step = robustkern.backward(model, inputs, targets, R1())
    assert (passes.forward, passes.backward) == (2, 3)
    found = gradient(model)
    model.zero_grad()
    x = inputs.clone().requires_grad_()
    outputs = model(x)
    (g,) = torch.autograd.grad(outputs[:, 0].sum(), x, create_graph=True)
    value = g.square().sum() / 2 / len(x)
    (F.cross_entropy(outputs, targets) + value).backward()
    torch.testing.assert_close(step.penalty, value.detach())
    torch.testing.assert_close(found, gradient(model), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=re.escape("Sum: terms must have one objective")):
        R1() + GN
    with pytest.raises(ValueError, match=re.escape("Sum: terms must have one objective")):
        R1() + R1()


def test_first_order_term_scales_and_refuses_a_second_derivative():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    term = GN(model, inputs, targets, method="first_order")
    once = torch.autograd.grad(term, list(model.parameters()))
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    term = factor * GN(model, inputs, targets, method="first_order")
    (first, *_) = torch.autograd.grad(term, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    thrice = 3 * GN(model, inputs, targets, method="first_order")
    for three, one in zip(torch.autograd.grad(thrice, list(model.parameters())), once, strict=True):
        torch.testing.assert_close(three, 3 * one)


class Once(torch.autograd.Function):
    """The cube, whose derivative has none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x.square() * grad


class Cubed(nn.Linear):
    def forward(self, x):
        return Once.apply(super().forward(x.flatten(1)))


class Attending(nn.Linear):
    def forward(self, x):
        x = x[:, None, :, 0]
        x = F.scaled_dot_product_attention(x, x, x)
        return super().forward(x.flatten(1))


class PartlyCompiled(nn.Linear):
    def forward(self, x):
        return torch.compile(torch.tanh, backend="aot_eager")(super().forward(x.flatten(1)))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(
            Cubed(192, 5).double(),
            "a once-differentiable function",
            id="once",
            marks=pytest.mark.setting(
                "double backward through functions differentiable once",
                group="attention and recurrence",
                refused="robustkern.backward works",
            ),
        ),
        pytest.param(
            Attending(24, 5).double(),
            "fused attention",
            id="attention",
            marks=pytest.mark.setting(
                "double backward through fused attention",
                group="attention and recurrence",
                refused="robustkern.backward works, and so does sdpa_kernel(SDPBackend.MATH)",
            ),
        ),
        pytest.param(
            PartlyCompiled(192, 5).double(),
            "a compiled model",
            id="compiled part",
            marks=pytest.mark.setting(
                "double backward through a compiled model",
                group="compiled models",
                refused="robustkern.backward works",
            ),
        ),
    ],
)
def test_what_has_no_double_backward_is_named(model, reason):
    inputs, targets = batch()
    if reason == "fused attention" and inputs.is_cuda:
        pytest.skip("a GPU's fused attention has no float64")
    message = (
        f"GradientPenalty: {reason} has no double backward; use robustkern.backward(model, "
        'inputs, targets, penalty) or method="first_order"'
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        GN(model, inputs, targets)
    GN(model, inputs, targets, method="first_order").backward()
    found = gradient(model)
    model.zero_grad()
    step = robustkern.backward(model, inputs, targets, GN)
    total = gradient(model)
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    assert step.penalty > 0
    torch.testing.assert_close(total - gradient(model), found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["first_order", "double_backward"])
def test_terms_have_a_value_without_gradients(method):
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    with torch.no_grad():
        value = CURE()(model, inputs, targets, method=method)
    assert not value.requires_grad
    torch.testing.assert_close(value, CURE()(model, inputs, targets).detach())
    assert all(p.grad is None for p in model.parameters())
    frozen = smooth(dropout=0.0).requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(CURE()(frozen, inputs, targets, method=method), value)


def test_lazy_term_that_is_not_due_is_zero_and_runs_nothing():
    model, (inputs, targets) = smooth(), batch()
    passes = Passes(model)
    assert Lazy(CURE(), every=2)(model, inputs, targets) == 0
    assert passes.forward == 0


@pytest.mark.setting(
    "double backward through a compiled model",
    group="compiled models",
    refused="robustkern.backward works",
)
def test_compiled_model_refuses_double_backward():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    compiled = torch.compile(model, backend="aot_eager")
    message = (
        "CURE: a compiled model has no double backward; use robustkern.backward(model, inputs, "
        'targets, penalty) or method="first_order"'
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        CURE()(compiled, inputs, targets)
    model.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        CURE()(nn.Sequential(model), inputs, targets)


INPUTS, TARGETS = batch()
DEVICE = str(INPUTS.device)


class NoTensor(robustkern.Penalty):
    def value(self, gradient):
        return 1.0


class Vector(robustkern.Penalty):
    def value(self, gradient):
        return gradient.flatten(1).sum(1)


class FarPoint(NoTensor):
    def points(self, inputs, gradient):
        return [inputs[:1]]


def hooked():
    model = smooth()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


class Tuple(nn.Linear):
    def forward(self, x):
        return (super().forward(x.flatten(1)),)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "backward: model must be a Module, got int"),
        (
            {"inputs": [1]},
            TypeError,
            "backward: inputs must be a floating Tensor (N, *D), got list",
        ),
        (
            {"inputs": torch.ones(6, 3, 8, 8, dtype=torch.int64)},
            TypeError,
            "backward: inputs must be a floating Tensor (N, *D), "
            "got a torch.int64 Tensor of shape (6, 3, 8, 8)",
        ),
        (
            {"inputs": INPUTS[:0], "targets": TARGETS[:0]},
            ValueError,
            "backward: inputs must not be empty, got (0, 3, 8, 8)",
        ),
        ({"targets": [1] * 6}, TypeError, "backward: targets must be a Tensor, got list"),
        (
            {"targets": TARGETS[:5]},
            ValueError,
            "backward: targets must be as many as inputs, got (6, 3, 8, 8) and (5,)",
        ),
        (
            {"penalty": F.cross_entropy},
            TypeError,
            "backward: penalty must be a Penalty, got function",
        ),
        ({"loss_fn": "ce"}, TypeError, "backward: loss_fn must be callable, got str"),
        (
            {"loss_fn": lambda o, t: F.cross_entropy(o, t, reduction="none")},
            TypeError,
            "backward: loss_fn must return the batch mean, a 0-dimensional Tensor, "
            "got a torch.float64 Tensor of shape (6,)",
        ),
        ({"shift": "small"}, TypeError, "backward: shift must be a number or 'auto', got 'small'"),
        ({"shift": 0.0}, ValueError, "backward: shift must be positive and finite, got 0.0"),
        ({"shift": torch.inf}, ValueError, "backward: shift must be positive and finite, got inf"),
        (
            {"batch_norm": "frozen"},
            ValueError,
            "backward: batch_norm must be 'batch' or 'eval', got 'frozen'",
        ),
        ({"scaler": 2.0}, TypeError, "backward: scaler must be a GradScaler, got float"),
        (
            {"penalty": NoTensor()},
            TypeError,
            "backward: NoTensor.value must return a 0-dimensional floating Tensor, got float",
        ),
        (
            {"penalty": Vector()},
            TypeError,
            "backward: Vector.value must return a 0-dimensional floating Tensor, "
            "got a torch.float64 Tensor of shape (6,)",
        ),
        (
            {"penalty": FarPoint()},
            TypeError,
            "backward: FarPoint.points must return Tensors of the inputs' shape (6, 3, 8, 8), "
            "got a torch.float64 Tensor of shape (1, 3, 8, 8)",
        ),
        (
            {"model": Tuple(192, 5).double()},
            TypeError,
            "backward: model must return a Tensor, got tuple; output= picks one of its parts",
        ),
        (
            {"model": nn.Flatten()},
            ValueError,
            "backward: model must have a parameter that requires grad, got none",
        ),
        (
            {"model": nn.Sequential(nn.Flatten(0), nn.Linear(1152, 5, dtype=torch.float64))},
            ValueError,
            "backward: model must return one row for each of 6 inputs, "
            "got a torch.float64 Tensor of shape (5,)",
        ),
        pytest.param(
            {"model": nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 5, device="meta"))},
            ValueError,
            f"backward: model must have its parameters on one device, got {DEVICE} and meta",
            marks=pytest.mark.setting(
                "models on two devices", group="many processes", refused="use one device a process"
            ),
        ),
        ({"output": 1.0}, TypeError, "backward: output must be a str, an int or None, got float"),
        (
            {"output": "logits", "model": Tuple(192, 5).double()},
            ValueError,
            "backward: output must name a part of what model returns, "
            "got 'logits' and a tuple of 1",
        ),
        (
            {"wrt": "x"},
            ValueError,
            "backward: wrt must be None unless inputs is a mapping, got 'x' and Tensor",
        ),
        (
            {"inputs": {"x": INPUTS}},
            ValueError,
            "backward: wrt must be one of inputs' names 'x', got None",
        ),
        (
            {"inputs": {"x": INPUTS, "n": 3}, "wrt": "n"},
            TypeError,
            "backward: inputs must be a floating Tensor (N, *D), got int",
        ),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    arguments = {"model": smooth(), "inputs": INPUTS, "targets": TARGETS, "penalty": GN} | change
    state_of_random = random_state()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        robustkern.backward(**arguments)
    assert torch.equal(state_of_random, random_state())
    if isinstance(arguments["model"], nn.Module):
        assert all(p.grad is None for p in arguments["model"].parameters())
        buffers = dict(arguments["model"].named_buffers())
        assert buffers.get("1.num_batches_tracked", torch.zeros(())) == 0


def test_a_term_takes_a_shift():
    model, (inputs, targets) = smooth(), batch()
    passes = Passes(model)
    GN(model, inputs, targets, method="first_order", shift=1e-3)
    moved = passes.inputs[1] - passes.inputs[0]
    assert moved.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.5)
    message = "GradientPenalty: shift must be positive and finite, got -1.0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GN(model, inputs, targets, method="first_order", shift=-1.0)


def test_unknown_method_is_named():
    message = "CURE: method must be 'double_backward' or 'first_order', got 'exact'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CURE()(smooth(), INPUTS, TARGETS, method="exact")
