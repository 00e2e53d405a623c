"""covariance_product against a convolution, a matrix product and plain FFTs."""

import math

import pytest
import spectral
import torch

from robustkern import functional

SHAPES = spectral.SHAPES


def methods(gradient, covariance):
    found = {
        "robustkern": lambda g: functional.covariance_product(g, covariance),
        "torch.fft": lambda g: spectral.fft_product(g, covariance),
    }
    if gradient[0].numel() <= spectral.DENSE_LIMIT[gradient.device.type]:
        matrix = spectral.dense_matrix(covariance)
        found["dense"] = lambda g: (g.flatten(1) @ matrix).view(g.shape)
    return found | spectral.algorithms(covariance, form=False)


def test_product(shape, device, compare, benchmark):
    g, k = spectral.data(shape, device)
    truth = spectral.fft_product(g.double(), k.double())
    compared = methods(g, k)
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    medians = compare(
        f"covariance_product|fwd|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
        rounds=20 if shape[2] > 100 else 60,
        limit=spectral.gpu_limit(device),
        **spectral.facts(shape, math.prod(shape)),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize(("shape", "reach"), spectral.SHORT, ids=str)
def test_product_of_short_reach(shape, reach, device, compare, benchmark):
    g, k, whole = spectral.short(shape, reach, device)
    truth = spectral.fft_product(g.double(), whole.double())
    compared = {
        "robustkern": lambda g: functional.covariance_product(g, k),
        "conv2d": lambda g: spectral.convolution(g, k),
        "all displacements": lambda g: functional.covariance_product(g, whole),
        **spectral.algorithms(k, form=False),
    }
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    medians = compare(
        f"covariance_product|fwd, reach {reach}|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
        rounds=20,
        limit=spectral.gpu_limit(device),
        **spectral.facts(shape, math.prod(shape)),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.CONVOLVED, ids=str)
def test_product_by_convolution(shape, device, compare, benchmark):
    g, k = spectral.data(shape, device)
    spectral.assert_accurate(
        spectral.convolution(g[:2], k), spectral.fft_product(g[:2].double(), k.double())
    )
    medians = compare(
        f"covariance_product|fwd by convolution|{shape}|float32|{device.type}",
        {
            "robustkern": lambda g: functional.covariance_product(g, k),
            "conv2d": lambda g: spectral.convolution(g, k),
        },
        inputs=(g,),
        baseline="robustkern",
        rounds=3 if shape[1] > 1 else 10,
        warmup=1,
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", [(128, 3, 32, 32)], ids=str)
def test_derivative(shape, device, compare):
    """Forward and backward: the derivative is a product with the transposed covariance."""
    g, k = spectral.data(shape, device)
    cotangent = torch.ones_like(g)

    def differentiate(product):
        def run(gradient):
            leaf = gradient.detach().requires_grad_()
            product(leaf, k).backward(cotangent)
            return leaf.grad

        return run

    truth = spectral.fft_product(cotangent.double(), k.double().transpose(0, 1).flip(2, 3))
    compared = {
        "robustkern": differentiate(functional.covariance_product),
        "torch.fft": differentiate(spectral.fft_product),
    }
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    compare(
        f"covariance_product|fwd+bwd|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
    )
