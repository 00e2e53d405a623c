import pytest
import torch
from conformance import (
    DTYPES,
    SHAPES,
    accumulation,
    assert_true,
    bitwise_with_threads,
    layouts,
    sample,
)
from torch.autograd import gradcheck, gradgradcheck

from robustkern import functional

OPS = torch.ops.robustkern


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_float64_truth(shape, dtype):
    a, b = sample(shape, dtype, 1), sample(shape, dtype, 2)
    truth = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    for name_a, a_laid in layouts(a).items():
        assert_true(functional.gradient_difference(a_laid, b), truth, accumulation(dtype))
        same = layouts(b)[name_a]
        assert_true(functional.gradient_difference(a_laid, same), truth, accumulation(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_the_float64_truth(shape, dtype):
    a, b = sample(shape, dtype, 1), sample(shape, dtype, 2)
    grad = sample(shape[:1], accumulation(dtype), 3)
    truth = 2 * grad.double().reshape(-1, *[1] * (len(shape) - 1)) * (a.double() - b.double())
    for a_laid in layouts(a).values():
        da, db = OPS.gradient_difference_backward(grad, a_laid, b)
        assert_true(da, truth, dtype)
        assert_true(db, -truth, dtype)


def test_expanded_operands_are_read_through_their_zero_strides():
    a = sample((1, 3, 5, 4), torch.float32).expand(6, -1, -1, -1)
    b = sample((6, 1, 1, 4), torch.float32, 1).expand(-1, 3, 5, -1)
    truth = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    assert_true(functional.gradient_difference(a, b), truth, torch.float32)


def test_large_finite_values_do_not_overflow_inside():
    a = torch.full((1, 4), 60000.0, dtype=torch.float16)
    result = functional.gradient_difference(a, -a)
    assert result.item() == pytest.approx(4 * 120000.0**2, rel=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout, requires_grad):
    a = layouts(sample((3, 2, 4), torch.float32, 1))[layout].detach().requires_grad_(requires_grad)
    b = sample((3, 2, 4), torch.float32, 2).requires_grad_(requires_grad)
    grad = sample((3,), torch.float32, 3).requires_grad_(requires_grad)
    torch.library.opcheck(OPS.gradient_difference.default, (a, b))
    torch.library.opcheck(OPS.gradient_difference_backward.default, (grad, a, b))
    torch.library.opcheck(OPS.gradient_difference.default, (a.detach()[:0], b.detach()[:0]))


def test_derivatives():
    a = sample((3, 2, 4), torch.float64, 1).requires_grad_()
    b = sample((3, 2, 4), torch.float64, 2).requires_grad_()
    grad = sample((3,), torch.float64, 3).requires_grad_()
    assert gradcheck(functional.gradient_difference, (a, b))
    assert gradgradcheck(functional.gradient_difference, (a, b))
    assert gradcheck(OPS.gradient_difference_backward, (grad, a, b))


def test_derivative_of_one_operand_leaves_the_other_alone():
    a, b = sample((3, 4), torch.float32, 1).requires_grad_(), sample((3, 4), torch.float32, 2)
    functional.gradient_difference(a, b).sum().backward()
    torch.testing.assert_close(a.grad, 2 * (a.detach() - b))


def test_repeats_bitwise_whatever_the_threads():
    a, b = sample((3, 100_003), torch.float32, 1), sample((3, 100_003), torch.float32, 2)
    assert bitwise_with_threads(lambda: functional.gradient_difference(a, b))
