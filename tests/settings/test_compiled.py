"""Compiled models: the right gradient, one compilation, no graph break."""

import pytest
import torch
from agreement import PENALTY, assert_agrees, assert_near, assert_same_random_numbers, exact
from networks import batch, gradient, smooth
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import robustkern
from robustkern import (
    CURE,
    SGR,
    CovarianceFunction,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    Penalty,
    functional,
)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def no_recompilation():
    return torch._dynamo.config.patch(error_on_recompile=True)


class Critic(Penalty):
    """A gradient penalty on an output (Mescheder et al. 2018)."""

    def objective(self, outputs, targets):
        return outputs[:, 0]

    def value(self, gradient):
        return functional.gradient_norm(gradient, 2).square().mean()


@pytest.mark.setting("torch.compile, inductor", group="compiled models")
def test_inductor():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_agrees(compiled, inputs, targets, truth=model)


@pytest.mark.setting(
    "torch.compile, inductor, with an objective of the penalty's own", group="compiled models"
)
def test_inductor_with_an_objective():
    model, (inputs, targets) = smooth(dropout=0.0), batch()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_agrees(compiled, inputs, targets, truth=model, penalty=Critic())


@pytest.mark.gpu
@pytest.mark.setting('torch.compile, mode="reduce-overhead"', group="compiled models")
def test_cuda_graphs_of_the_compiler():
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32)
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for _ in range(4):  # to record, to replay
        step = assert_agrees(compiled, inputs, targets, truth=model, dtype=torch.float32)
        assert step.outputs.isfinite().all()


@pytest.mark.setting("torch.compile, inductor, with dropout", group="compiled models")
def test_inductor_draws_the_same_random_numbers_in_all_passes():
    model, (inputs, targets) = smooth(batch_norm=False), batch()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_same_random_numbers(compiled, inputs, targets)


class Network(nn.Module):
    """A class of one's own: Module.compile leaves torch's own ones alone."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


@pytest.mark.setting("torch.compile, aot_eager, full graph", group="compiled models")
@pytest.mark.parametrize("part", ["model", "model, in place", "one block"])
def test_aot_eager(part):
    (inputs, targets), truth = batch(), smooth()
    options = {"backend": "aot_eager", "fullgraph": True}
    if part == "model":
        model = torch.compile(smooth(), **options)
    elif part == "model, in place":
        model = Network(smooth())
        model.compile(**options)
    else:
        layers = smooth()
        model = nn.Sequential(Network(layers[:5]), layers[5:])
        model[0].compile(**options)
    assert_agrees(model, inputs, targets, truth=truth)


@pytest.mark.setting("torch.compile with autocast", group="compiled models")
def test_autocast():
    plain, of_penalty = exact(smooth(dropout=0.0), *batch(samples=32))
    model, (inputs, targets) = smooth(torch.float32, dropout=0.0), batch(torch.float32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        robustkern.backward(compiled, inputs, targets, PENALTY)
    assert_near(gradient(model).double() - plain, of_penalty, torch.bfloat16)


@pytest.mark.setting(
    "torch.compile, number of compilations",
    group="compiled models",
    note="one in training mode, one in eval mode; one more for steps without a penalty",
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_all_passes_share_one_compilation(layout):
    model, (inputs, targets) = smooth().to(memory_format=layout), batch()
    inputs = inputs.contiguous(memory_format=layout)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    robustkern.backward(compiled, inputs, targets, PENALTY)
    assert counter.frame_count == 1
    model.eval()
    robustkern.backward(compiled, inputs, targets, PENALTY)
    assert counter.frame_count == 2
    with no_recompilation():
        for mode in (True, False):
            model.train(mode)
            robustkern.backward(compiled, inputs, targets, PENALTY)


@pytest.mark.setting("torch.compile with Lazy", group="compiled models")
@pytest.mark.setting('torch.compile with batch_norm="eval"', group="compiled models")
@pytest.mark.parametrize("batch_norm", ["batch", "eval"])
def test_later_steps_compile_nothing(batch_norm):
    model, (inputs, targets) = smooth(), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    penalty = Lazy(PENALTY, every=2)
    for _ in range(2):
        robustkern.backward(compiled, inputs, targets, penalty, batch_norm=batch_norm)
    with no_recompilation():
        for _ in range(2):
            robustkern.backward(compiled, inputs, targets, penalty, batch_norm=batch_norm)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it at a graph break
@pytest.mark.setting(
    "torch.compile of a function that calls backward",
    group="compiled models",
    note="with graph breaks; compile the model rather",
)
def test_a_compiled_training_step():
    inputs, targets = batch()
    results = []

    def step(model, inputs, targets):
        torch.manual_seed(3)
        return robustkern.backward(model, inputs, targets, PENALTY).penalty

    for function in (step, torch.compile(step, backend="aot_eager")):
        model = smooth()
        results.append([function(model, inputs, targets), gradient(model), *model.buffers()])
    torch.testing.assert_close(*results)


PENALTIES = {
    "cure": CURE(),
    "cure_anchored": CURE(anchored=True),
    "cure_norm": CURE(squared=False),
    "gn": GradientPenalty(1.0, power=2),
    "tv_linf": GradientPenalty(1.0, p=torch.inf),
    "lipschitz": LipschitzPenalty(1.0),
    "sgr": SGR(1.0, CovarianceFunction(3, 8, 8)),
    "sum": PENALTY,
}


@pytest.mark.setting("torch.compile of a penalty's value", group="compiled models")
@pytest.mark.parametrize("name", PENALTIES)
def test_the_value_of_a_penalty_compiles_without_graph_break(name):
    inputs, _ = batch()
    gradients = [inputs - 0.5]
    penalty = PENALTIES[name]
    points = penalty.points(inputs, gradients[0])
    gradients += [gradients[0].roll(1, 0)] * len(points)
    results = []
    for value in (penalty.value, torch.compile(penalty.value, backend="aot_eager", fullgraph=True)):
        leaves = [g.clone().requires_grad_() for g in gradients]
        r = value(*leaves)
        found = torch.autograd.grad(r, leaves, materialize_grads=True, allow_unused=True)
        results.append([r.detach(), *found])
    torch.testing.assert_close(*results)
