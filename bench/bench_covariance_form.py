"""covariance_form against a dot product with the product by convolution, matrix or plain FFTs."""

import pytest
import spectral

from robustkern import functional


def methods(gradient, covariance):
    found = {
        "robustkern": lambda: functional.covariance_form(gradient, covariance),
        "torch.fft": lambda: spectral.form(gradient, spectral.fft_product(gradient, covariance)),
    }
    if gradient[0].numel() <= spectral.DENSE_LIMIT:
        matrix = spectral.dense_matrix(covariance)
        found["dense"] = lambda: spectral.form(
            gradient, (gradient.flatten(1) @ matrix).view(gradient.shape)
        )
    return found


@pytest.mark.parametrize("shape", spectral.SHAPES, ids=str)
def test_form(shape, compare, benchmark):
    g, k = spectral.data(shape)
    wide = g.double()
    truth = spectral.form(wide, spectral.fft_product(wide, k.double()))
    for method in methods(g, k).values():
        spectral.assert_accurate(method(), truth)
    medians = compare(
        f"covariance_form|fwd|{shape}|float32|cpu",
        methods(g, k),
        baseline="robustkern",
        rounds=20 if shape[2] > 100 else 60,
        **spectral.facts(shape, shape[0]),
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.CONVOLVED, ids=str)
def test_form_by_convolution(shape, compare, benchmark):
    g, k = spectral.data(shape)
    truth = spectral.form(g.double(), spectral.fft_product(g.double(), k.double()))
    spectral.assert_accurate(functional.covariance_form(g, k), truth)
    medians = compare(
        f"covariance_form|fwd by convolution|{shape}|float32|cpu",
        {
            "robustkern": lambda: functional.covariance_form(g, k),
            "conv2d": lambda: spectral.form(g, spectral.convolution(g, k)),
        },
        baseline="robustkern",
        rounds=3 if shape[1] > 1 else 10,
        warmup=1,
    )
    spectral.summarize(benchmark, medians, "robustkern")


@pytest.mark.parametrize("shape", spectral.SHAPES[:1], ids=str)
def test_derivative(shape, compare):
    """Forward and backward, as a penalty needs: (Sigma + Sigma^T) g."""
    g, k = spectral.data(shape)
    leaf = g.clone().requires_grad_()

    def differentiate(evaluate):
        leaf.grad = None
        evaluate(leaf).sum().backward()
        return leaf.grad

    wide = g.double().requires_grad_()
    spectral.form(wide, spectral.fft_product(wide, k.double())).sum().backward()
    compared = {
        "robustkern": lambda: differentiate(lambda x: functional.covariance_form(x, k)),
        "torch.fft": lambda: differentiate(lambda x: spectral.form(x, spectral.fft_product(x, k))),
    }
    for method in compared.values():
        spectral.assert_accurate(method(), wide.grad)
    compare(f"covariance_form|fwd+bwd|{shape}|float32|cpu", compared, baseline="robustkern")
