"""What only a GPU can show: streams, several devices, graphs, long repetition, sheer size."""

from contextlib import contextmanager

import pytest
import torch
from agreement import assert_near
from conformance import COVARIANCE_TOLERANCE, DTYPES, relative_error, sample
from networks import batch, gradient, smooth

import robustkern
from robustkern import CURE, SGR, CovarianceFunction, GradientPenalty, LipschitzPenalty, functional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

SHAPE = (5, 3, 17, 16)
LARGE = (40, 3, 80, 80)  # enough samples of enough elements for clusters of blocks
OPS = {
    "perturb": lambda a, b, k: functional.perturb(a, b, 1.5, "gradient"),
    "gradient_norm": lambda a, b, k: functional.gradient_norm(a, 2),
    "gradient_difference": lambda a, b, k: functional.gradient_difference(a, b),
    "covariance_product": lambda a, b, k: functional.covariance_product(a, k),
    "covariance_form": lambda a, b, k: functional.covariance_form(a, k),
    "autocovariance": lambda a, b, k: functional.autocovariance(a),
}
each_op = pytest.mark.parametrize("name", OPS)


def arguments(dtype=torch.float32, seed=0, shape=SHAPE):
    """Two gradients and a covariance that fits them."""
    _, channels, height, width = shape
    lags = (channels, channels, 2 * height - 1, 2 * width - 1)
    return sample(shape, dtype, seed), sample(shape, dtype, seed + 1), sample(lags, dtype, seed + 2)


def forward_and_backward(name, a, b, k):
    """The op's value and, where it has one, its derivative along some cotangent."""
    leaf = a.detach().requires_grad_(name != "autocovariance")
    value = OPS[name](leaf, b, k)
    found = [value.detach()]
    if leaf.requires_grad:
        v = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device)
        found += torch.autograd.grad(value, leaf, v.view_as(value))
    return found


def assert_same(results, expected):
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=str)
def test_cpu_and_cuda_agree(name, dtype, shape):
    on_gpu = arguments(dtype, shape=shape)
    results = forward_and_backward(name, *on_gpu)
    expected = forward_and_backward(name, *[tensor.cpu() for tensor in on_gpu])
    for result, other in zip(results, expected, strict=True):
        assert result.is_cuda
        tolerance = 2 * COVARIANCE_TOLERANCE[result.dtype]
        assert relative_error(result.cpu(), other.double()) <= tolerance


@each_op
def test_runs_on_the_current_stream(name):
    first, second = arguments(seed=0), arguments(seed=5)
    expected = forward_and_backward(name, *first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_and_backward(name, *second)  # leaves other results where these will come
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second, on the default stream
    with torch.cuda.stream(stream):
        results = [result.cpu() for result in forward_and_backward(name, *first)]
    assert not torch.cuda.default_stream().query(), "the default stream should still be busy"
    torch.cuda.synchronize()
    assert_same(results, [result.cpu() for result in expected])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@each_op
def test_runs_on_the_device_of_its_tensors(name):
    expected = forward_and_backward(name, *arguments())
    elsewhere = [tensor.to("cuda:1") for tensor in arguments()]
    with torch.cuda.device(0):
        results = forward_and_backward(name, *elsewhere)
        assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_same([result.cpu() for result in results], [result.cpu() for result in expected])


def captured(function):
    """A CUDA graph of a call, after one to warm up, and what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@each_op
def test_a_graph_replays_with_other_inputs(name):
    held = arguments(seed=0)
    graph, results = captured(lambda: forward_and_backward(name, *held))
    for tensor, other in zip(held, arguments(seed=5), strict=True):
        tensor.copy_(other)
    graph.replay()
    assert_same(results, forward_and_backward(name, *held))


STEPS = {
    "cure": CURE,
    "tv": lambda: GradientPenalty(1.0),
    "lipschitz": lambda: LipschitzPenalty(1.0),
    "sgr": lambda: SGR(1.0, CovarianceFunction(3, 8, 8)),
}


@pytest.mark.setting("CUDA graph of a whole step", group="training loop")
@pytest.mark.parametrize("name", STEPS)
def test_a_captured_step_replays_with_other_data(name):
    (inputs, targets), (others, _) = batch(torch.float32), batch(torch.float32, seed=2)
    model, twin = smooth(torch.float32, dropout=0.0), smooth(torch.float32, dropout=0.0)
    penalty, penalty_of_twin = STEPS[name](), STEPS[name]()
    robustkern.backward(twin, inputs, targets, penalty_of_twin)
    twin.zero_grad()
    expected = robustkern.backward(twin, others, targets, penalty_of_twin)

    def step():
        model.zero_grad()
        return robustkern.backward(model, inputs, targets, penalty)

    graph, found = captured(step)
    inputs.copy_(others)
    graph.replay()
    for result, other in ((found.loss, expected.loss), (found.penalty, expected.penalty)):
        torch.testing.assert_close(result, other, rtol=1e-3, atol=1e-6)
    assert_near(gradient(model), gradient(twin), torch.float32)


@pytest.mark.setting(
    "CUDA graph of a step with dropout",
    group="training loop",
    refused="a graph cannot draw a number twice",
)
def test_a_step_with_dropout_is_not_captured():
    model, (inputs, targets) = smooth(torch.float32), batch(torch.float32)
    model(inputs)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="must have no dropout in training mode"),
        torch.cuda.graph(graph),
    ):
        robustkern.backward(model, inputs, targets, CURE())


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_runs_give_the_same_bits(name, dtype):
    held = arguments(dtype, shape=(64, 3, 32, 32))
    expected = forward_and_backward(name, *held)
    same = torch.ones(len(expected), dtype=torch.bool)
    for _ in range(1000):
        results = forward_and_backward(name, *held)
        pairs = zip(results, expected, strict=True)
        same &= torch.stack([(result == other).all() for result, other in pairs])
    assert same.all()


def enormous(layout, *values):
    """(2, D) bfloat16 of more than 2^31 numbers: zero, but for the last of either sample."""
    size = 2**30 + 4099
    if layout == "one sample":
        tensor = torch.zeros(1, 2 * size, dtype=torch.bfloat16)
    elif layout == "transposed":
        tensor = torch.zeros(size, 2, dtype=torch.bfloat16).T
    else:
        tensor = torch.zeros(2, size, dtype=torch.bfloat16)
    assert tensor.numel() > 2**31
    tensor[:, -len(values) :] = torch.tensor(values, dtype=torch.bfloat16)
    return tensor


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["two samples", "one sample", "transposed"])
def test_more_than_two_to_the_31_elements(layout):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("40 GiB of GPU memory are not free")
    a, b = enormous(layout, 4.0, -2.0, 2.0), enormous(layout, 1.0, 2.0, 2.0)
    samples = torch.ones(len(a))
    assert torch.equal(functional.gradient_difference(a, b), 25 * samples)
    da, db = torch.ops.robustkern.gradient_difference_backward(samples, a, b)
    assert da[:, -4:].tolist() == [[0, 6, -8, 0]] * len(a)
    assert db[:, -4:].tolist() == [[0, -6, 8, 0]] * len(a)
    assert torch.count_nonzero(da) == torch.count_nonzero(db) == 2 * len(a)
    del da, db
    norm = functional.gradient_norm(a, 2)
    torch.testing.assert_close(norm, 24**0.5 * samples)
    assert torch.equal(functional.gradient_norm(a, 1), 8 * samples)
    assert torch.equal(functional.gradient_norm(a, torch.inf), 4 * samples)
    backward = torch.ops.robustkern.gradient_norm_backward(samples, a, 4 * samples, torch.inf)
    assert backward[:, -4:].tolist() == [[0, 1, 0, 0]] * len(a)
    assert torch.count_nonzero(backward) == len(a)
    del backward
    moved = functional.perturb(b, a, 3**0.5, "sign")
    assert moved[:, -4:].tolist() == [[0, 2, 1, 3]] * len(a)
    assert torch.count_nonzero(moved) == 3 * len(a)


@contextmanager
def no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
def test_an_op_never_makes_the_host_wait(name):
    held = arguments()
    forward_and_backward(name, *held)  # tunes and compiles
    with no_synchronization():
        forward_and_backward(name, *held)
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronization():
        held[0].sum().item()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_makes_the_host_wait(name):
    model = smooth(torch.float32)
    inputs, targets = batch(torch.float32)
    penalty = STEPS[name]()
    robustkern.backward(model, inputs, targets, penalty)
    with no_synchronization():
        robustkern.backward(model, inputs, targets, penalty)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a, b, k: functional.perturb(a, b.cpu(), 1.0),
            "perturb: gradient must be on inputs's device",
        ),
        (
            lambda a, b, k: functional.gradient_difference(a, b.cpu()),
            "gradient_difference: b must be on a's device",
        ),
        (
            lambda a, b, k: functional.covariance_product(a, k.cpu()),
            "covariance_product: covariance must be on gradient's device",
        ),
        (
            lambda a, b, k: functional.covariance_form(a.cpu(), k),
            "covariance_form: covariance must be on gradient's device",
        ),
    ],
)
def test_a_tensor_on_another_device_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}, got c.* and c.*$"):
        call(*arguments())


def test_every_op_has_its_kernel(capsys):
    robustkern.show_config()
    lines = capsys.readouterr().out.splitlines()
    for name in OPS:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.rstrip().endswith(("CUDA C++", "Triton")), line
