import pytest
import torch
from conformance import DTYPES, SHAPES, assert_true, bitwise_with_threads, layouts, sample
from torch.autograd import gradcheck

from robustkern import functional

OPS = torch.ops.robustkern
DIRECTIONS = ["sign", "gradient"]


def true_step(gradient, length, direction):
    z = gradient.double().sign() if direction == "sign" else gradient.double()
    norm = (z**2).flatten(1).sum(1).sqrt().reshape(-1, *[1] * (z.dim() - 1))
    return length * torch.where(norm > 0, z / norm, 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_float64_truth(shape, dtype, direction):
    x, g = sample(shape, dtype, 1), sample(shape, dtype, 2)
    truth = x.double() + true_step(g, 1.5, direction)
    for name, x_laid in layouts(x).items():
        assert_true(functional.perturb(x_laid, g, 1.5, direction), truth, dtype)
        assert_true(functional.perturb(x_laid, layouts(g)[name], 1.5, direction), truth, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_gradient_leaves_the_input_bit_for_bit(direction):
    x = sample((2, 9), torch.float32, 1)
    g = torch.zeros(2, 9)
    g[1] = 1
    moved = functional.perturb(x, g, 1.5, direction)
    assert torch.equal(moved[0], x[0])
    torch.testing.assert_close(moved[1], x[1] + 0.5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_length_is_kept_for_gradients_of_any_scale(scale):
    g = scale * sample((4, 100), torch.float32)
    moved = functional.perturb(torch.zeros(4, 100), g, 2.0, "gradient")
    torch.testing.assert_close(moved.norm(dim=1), torch.full((4,), 2.0))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout, direction, requires_grad):
    x = layouts(sample((3, 2, 4), torch.float32, 1))[layout].detach().requires_grad_(requires_grad)
    g = sample((3, 2, 4), torch.float32, 2)
    torch.library.opcheck(OPS.perturb.default, (x, g, 0.5, direction))
    torch.library.opcheck(OPS.perturb.default, (x.detach()[:0], g[:0], 0.5, direction))


def test_derivative_is_through_inputs_only():
    x = sample((3, 4), torch.float64, 1).requires_grad_()
    g = sample((3, 4), torch.float64, 2).requires_grad_()
    assert gradcheck(lambda x: functional.perturb(x, g.detach(), 0.5), (x,))
    functional.perturb(x, g, 0.5).sum().backward()
    assert g.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_repeats_bitwise_whatever_the_threads():
    x, g = sample((3, 100_003), torch.float32, 1), sample((3, 100_003), torch.float32, 2)
    assert bitwise_with_threads(lambda: functional.perturb(x, g, 1.5, "gradient"))
