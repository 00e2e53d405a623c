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
NORMS = [1.0, 2.0, torch.inf]


def true_norm(gradient, p):
    rows = gradient.double().flatten(1)
    if p == 1:
        return rows.abs().sum(1)
    if p == 2:
        return (rows**2).sum(1).sqrt()
    return rows.abs().amax(1) if rows.shape[1] else rows.sum(1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_the_float64_truth(shape, dtype, p):
    g = sample(shape, dtype, 1)
    norm = true_norm(g, p)
    leaf = g.double().requires_grad_()
    grad = sample(shape[:1], accumulation(dtype), 3)
    (truth,) = torch.autograd.grad(true_norm(leaf, p), leaf, grad.double())
    truth = truth.nan_to_num(0.0)  # plain sqrt at zero
    for laid in layouts(g).values():
        result = functional.gradient_norm(laid, p)
        assert_true(result, norm, accumulation(dtype))
        assert_true(OPS.gradient_norm_backward(grad, laid, result, p), truth, dtype)


@pytest.mark.parametrize("p", NORMS)
def test_zero_gradient_has_zero_derivatives(p):
    g = torch.zeros(2, 5, requires_grad=True)
    (first,) = torch.autograd.grad(functional.gradient_norm(g, p).sum(), g, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), g)
    assert torch.equal(first, torch.zeros(2, 5))
    assert torch.equal(second, torch.zeros(2, 5))


def test_ties_share_the_maximum_evenly():
    g = torch.tensor([[3.0, -3.0, 1.0, 0.0]], requires_grad=True)
    functional.gradient_norm(g, torch.inf).backward()
    assert torch.equal(g.grad, torch.tensor([[0.5, -0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(layout, p, requires_grad):
    g = layouts(sample((3, 2, 4), torch.float32, 1))[layout].detach().requires_grad_(requires_grad)
    grad = sample((3,), torch.float32, 3).requires_grad_(requires_grad)
    norm = true_norm(g.detach(), p).float().requires_grad_(requires_grad)
    torch.library.opcheck(OPS.gradient_norm.default, (g, p))
    torch.library.opcheck(OPS.gradient_norm.default, (g.detach()[:0], p))
    torch.library.opcheck(OPS.gradient_norm_backward.default, (grad, g, norm, p))


@pytest.mark.parametrize("p", NORMS)
def test_derivatives(p):
    g = torch.randn(3, 2, 4, dtype=torch.float64).sign() * (1 + torch.rand(3, 2, 4).double())
    g.requires_grad_()
    assert gradcheck(functional.gradient_norm, (g, p))
    assert gradgradcheck(functional.gradient_norm, (g, p))


def test_backward_op_is_differentiable_in_each_argument():
    g = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    grad, norm = (torch.rand(3, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    assert gradcheck(lambda *a: OPS.gradient_norm_backward(*a, 2.0), (grad, g, norm))


def test_repeats_bitwise_whatever_the_threads():
    g = sample((3, 100_003), torch.float32, 1)
    assert bitwise_with_threads(lambda: functional.gradient_norm(g, 2))
