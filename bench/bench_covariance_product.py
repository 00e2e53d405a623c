"""covariance_product against a convolution, a matrix product and plain FFTs."""

import math

import pytest
import spectral
import torch

from robustkern import functional


def methods(gradient, covariance):
    found = {
        "robustkern": lambda: functional.covariance_product(gradient, covariance),
        "torch.fft": lambda: spectral.fft_product(gradient, covariance),
    }
    if gradient[0].numel() <= spectral.DENSE_LIMIT:
        matrix = spectral.dense_matrix(covariance)
        found["dense"] = lambda: (gradient.flatten(1) @ matrix).view(gradient.shape)
    return found


@pytest.mark.parametrize("shape", spectral.SHAPES, ids=str)
def test_product(shape, compare, benchmark):
    g, k = spectral.data(shape)
    truth = spectral.fft_product(g.double(), k.double())
    for method in methods(g, k).values():
        spectral.assert_accurate(method(), truth)
    medians = compare(
        f"covariance_product|fwd|{shape}|float32|cpu",
        methods(g, k),
        baseline="robustkern",
        rounds=20 if shape[2] > 100 else 60,
        **spectral.facts(shape, math.prod(shape)),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.CONVOLVED, ids=str)
def test_product_by_convolution(shape, compare, benchmark):
    g, k = spectral.data(shape)
    spectral.assert_accurate(
        spectral.convolution(g[:2], k), spectral.fft_product(g[:2].double(), k.double())
    )
    medians = compare(
        f"covariance_product|fwd by convolution|{shape}|float32|cpu",
        {
            "robustkern": lambda: functional.covariance_product(g, k),
            "conv2d": lambda: spectral.convolution(g, k),
        },
        baseline="robustkern",
        rounds=3 if shape[1] > 1 else 10,
        warmup=1,
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.SHAPES[:1], ids=str)
def test_derivative(shape, compare):
    """Forward and backward: the derivative is a product with the transposed covariance."""
    g, k = spectral.data(shape)
    leaf, cotangent = g.clone().requires_grad_(), torch.ones_like(g)

    def differentiate(product):
        leaf.grad = None
        product(leaf, k).backward(cotangent)
        return leaf.grad

    truth = spectral.fft_product(cotangent.double(), k.double().transpose(0, 1).flip(2, 3))
    compared = {
        "robustkern": lambda: differentiate(functional.covariance_product),
        "torch.fft": lambda: differentiate(spectral.fft_product),
    }
    for method in compared.values():
        spectral.assert_accurate(method(), truth)
    compare(f"covariance_product|fwd+bwd|{shape}|float32|cpu", compared, baseline="robustkern")
