"""gradient_difference against plain PyTorch and the bandwidth of a dot product."""

import pytest
import torch
from stream import bandwidth

from robustkern import functional, reference

SHAPES = [(64, 3, 224, 224), (256, 3, 32, 32)]


@pytest.fixture(params=SHAPES, ids=str)
def pair(request):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(request.param, generator=generator) for _ in range(2))


def test_forward(pair, compare):
    a, b = pair
    methods = {
        "naive": lambda: reference.gradient_difference(a, b),
        "robustkern": lambda: functional.gradient_difference(a, b),
    }
    truth = reference.gradient_difference(a.double(), b.double()).float()
    for method in methods.values():
        torch.testing.assert_close(method(), truth)
    methods["dot"] = lambda: torch.dot(a.view(-1), b.view(-1))  # the same bytes, read once
    compare(
        f"gradient_difference|{tuple(a.shape)}|float32|cpu",
        methods,
        cold=a.nbytes > 2**24,
        baseline="robustkern",
        limit=lambda: bandwidth("dot", a.nbytes, torch.get_num_threads(), repeats=1),
        bytes_min=2 * a.nbytes,
    )


def test_backward(pair, compare):
    a, b = pair
    grad = torch.randn(len(a))
    backward = torch.ops.robustkern.gradient_difference_backward
    methods = {
        "naive": lambda: reference.gradient_difference_backward(grad, a, b),
        "robustkern": lambda: backward(grad, a, b),
    }
    for ours, naive in zip(methods["robustkern"](), methods["naive"](), strict=True):
        torch.testing.assert_close(ours, naive)
    compare(
        f"gradient_difference backward|{tuple(a.shape)}|float32|cpu",
        methods,
        cold=a.nbytes > 2**24,
        baseline="robustkern",
        limit=lambda: bandwidth("copy", a.nbytes, torch.get_num_threads(), repeats=1),
        bytes_min=4 * a.nbytes,
    )
