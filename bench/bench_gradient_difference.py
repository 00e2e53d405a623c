"""gradient_difference against plain PyTorch and the bandwidth of a dot product."""

import pytest
import torch
from samples import SHAPES, compiled, differentiate_twice, random
from stream import limit

from robustkern import functional, reference

__all__ = ["SHAPES"]


def test_forward(shape, dtype, device, compare):
    a, b = random(2, shape, dtype, device)
    methods = {
        "naive": reference.gradient_difference,
        "robustkern": functional.gradient_difference,
    }
    methods |= compiled(methods["naive"], device)
    truth = reference.gradient_difference(a.double(), b.double()).float()
    torch.testing.assert_close(functional.gradient_difference(a, b), truth)
    for method in methods.values():  # plain float32 sums
        torch.testing.assert_close(method(a, b), truth, rtol=1e-4, atol=0)
    methods["dot"] = lambda a, b: torch.dot(a.view(-1), b.view(-1))  # the same bytes, read once
    compare(
        f"gradient_difference|{shape}|{str(dtype).removeprefix('torch.')}|{device.type}",
        methods,
        inputs=(a, b),
        cold=a.nbytes > 2**24,
        graphs=a.nbytes < 2**24,
        baseline="robustkern",
        limit=limit("dot", a.nbytes, device),
        bytes_min=2 * a.nbytes,
    )


def test_backward(shape, dtype, device, compare):
    a, b = random(2, shape, dtype, device)
    grad = torch.randn(len(a), device=device)
    backward = torch.ops.robustkern.gradient_difference_backward
    methods = {
        "naive": lambda a, b: reference.gradient_difference_backward(grad, a, b),
        "robustkern": lambda a, b: backward(grad, a, b),
    }
    methods |= compiled(methods["naive"], device)
    wide = [tensor.double() for tensor in (grad, a, b)]
    truth = [t.to(dtype) for t in reference.gradient_difference_backward(*wide)]
    for method in methods.values():
        for result, true in zip(method(a, b), truth, strict=True):
            torch.testing.assert_close(result, true)
    compare(
        f"gradient_difference backward|{shape}|{str(dtype).removeprefix('torch.')}|{device.type}",
        methods,
        inputs=(a, b),
        cold=a.nbytes > 2**24,
        graphs=a.nbytes < 2**24,
        baseline="robustkern",
        limit=limit("copy", a.nbytes, device),
        bytes_min=4 * a.nbytes,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_double_backward(shape, dtype, device, compare):
    a, b, v = random(3, shape, dtype, device)

    def through(function):
        return lambda a, b: differentiate_twice(lambda a: function(a, b), v)(a)

    methods = {
        "naive": through(reference.gradient_difference),
        "robustkern": through(functional.gradient_difference),
    }
    truth = through(reference.gradient_difference)(a.double(), b.double()).to(dtype)
    for method in methods.values():
        torch.testing.assert_close(method(a, b), truth)
    compare(
        f"gradient_difference fwd+bwd+double|{shape}|float32|cuda",
        methods,
        inputs=(a, b),
        baseline="robustkern",
    )
