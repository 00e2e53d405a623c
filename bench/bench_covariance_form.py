"""covariance_form against a dot product with the product by convolution, matrix or plain FFTs."""

import pytest
import spectral
import torch
from samples import differentiate_twice

from robustkern import functional

SHAPES = spectral.SHAPES


def methods(gradient, covariance):
    found = {
        "robustkern": lambda g: functional.covariance_form(g, covariance),
        "torch.fft": lambda g: spectral.form(g, spectral.fft_product(g, covariance)),
    }
    if gradient[0].numel() <= spectral.DENSE_LIMIT[gradient.device.type]:
        matrix = spectral.dense_matrix(covariance)
        found["dense"] = lambda g: spectral.form(g, (g.flatten(1) @ matrix).view(g.shape))
    return found | spectral.algorithms(covariance, form=True)


def test_form(shape, device, compare, benchmark):
    g, k = spectral.data(shape, device)
    wide = g.double()
    truth = spectral.form(wide, spectral.fft_product(wide, k.double()))
    compared = methods(g, k)
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    medians = compare(
        f"covariance_form|fwd|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
        rounds=20 if shape[2] > 100 else 60,
        limit=spectral.gpu_limit(device),
        **spectral.facts(shape, shape[0]),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize(("shape", "reach"), spectral.SHORT, ids=str)
def test_form_of_short_reach(shape, reach, device, compare, benchmark):
    g, k, whole = spectral.short(shape, reach, device)
    truth = spectral.form(g.double(), spectral.fft_product(g.double(), whole.double()))
    compared = {
        "robustkern": lambda g: functional.covariance_form(g, k),
        "conv2d": lambda g: spectral.form(g, spectral.convolution(g, k)),
        "all displacements": lambda g: functional.covariance_form(g, whole),
        **spectral.algorithms(k, form=True),
    }
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    medians = compare(
        f"covariance_form|fwd, reach {reach}|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
        rounds=20,
        limit=spectral.gpu_limit(device),
        **spectral.facts(shape, shape[0]),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.CONVOLVED, ids=str)
def test_form_by_convolution(shape, device, compare, benchmark):
    g, k = spectral.data(shape, device)
    truth = spectral.form(g.double(), spectral.fft_product(g.double(), k.double()))
    spectral.assert_accurate(functional.covariance_form(g, k), truth)
    medians = compare(
        f"covariance_form|fwd by convolution|{shape}|float32|{device.type}",
        {
            "robustkern": lambda g: functional.covariance_form(g, k),
            "conv2d": lambda g: spectral.form(g, spectral.convolution(g, k)),
        },
        inputs=(g,),
        baseline="robustkern",
        rounds=3 if shape[1] > 1 else 10,
        warmup=1,
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (16, 3, 64, 64), (8, 3, 224, 224)], ids=str)
def test_derivative(shape, device, compare):
    """Forward and backward, as a penalty needs: (Sigma + Sigma^T) g."""
    g, k = spectral.data(shape, device)

    def differentiate(evaluate):
        def run(gradient):
            leaf = gradient.detach().requires_grad_()
            evaluate(leaf).sum().backward()
            return leaf.grad

        return run

    compared = {
        "robustkern": differentiate(lambda x: functional.covariance_form(x, k)),
        "torch.fft": differentiate(lambda x: spectral.form(x, spectral.fft_product(x, k))),
    }
    wide = k.double()
    exact = differentiate(lambda x: spectral.form(x, spectral.fft_product(x, wide)))
    truth = exact(g.double())
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    compare(
        f"covariance_form|fwd+bwd|{shape}|float32|{device.type}",
        compared,
        inputs=(g,),
        baseline="robustkern",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 3, 32, 32)], ids=str)
def test_double_backward(shape, device, compare):
    g, k = spectral.data(shape, device)
    v = torch.ones_like(g)
    wide = k.double()
    compared = {
        "robustkern": differentiate_twice(lambda x: functional.covariance_form(x, k), v),
        "torch.fft": differentiate_twice(lambda x: spectral.form(x, spectral.fft_product(x, k)), v),
    }
    exact = differentiate_twice(lambda x: spectral.form(x, spectral.fft_product(x, wide)), v)
    truth = exact(g.double())
    for method in compared.values():
        spectral.assert_accurate(method(g), truth)
    compare(
        f"covariance_form|fwd+bwd+double|{shape}|float32|cuda",
        compared,
        inputs=(g,),
        baseline="robustkern",
    )
