import pytest
import torch
from conformance import DTYPES, layouts, relative_error, sample
from covariances import (
    DENSE,
    IMAGES,
    SPECTRAL,
    TOLERANCE,
    CovarianceOpTests,
    assert_true,
    covariance_of,
    matrix,
)

from robustkern import functional, reference


def true_product(gradient, covariance):
    return (gradient.double().flatten(1) @ matrix(covariance).T).view(gradient.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_product_is_the_float64_truth(shape, dtype):
    g, k = sample(shape, dtype), covariance_of(shape, dtype)
    truth = true_product(g, k)
    for g_laid, k_laid in zip(layouts(g).values(), layouts(k).values(), strict=True):
        assert_true(functional.covariance_product(g_laid, k_laid), truth, dtype)
    if truth.numel() > truth.shape[0]:  # the check can tell Sigma from its transpose
        other = true_product(g, reference.transpose_covariance(k))
        assert truth.numel() == 0 or relative_error(other, truth) > TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_gradient_takes_a_float32_covariance(shape, dtype):
    g, k = sample(shape, dtype), covariance_of(shape, torch.float32)
    assert_true(functional.covariance_product(g, k), true_product(g, k), dtype)


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_expanded_arguments(shape):
    g = sample((1, *shape[1:]), torch.float32).expand(shape)
    k = sample((2 * shape[3] - 1,), torch.float32, 1).expand(covariance_of(shape, g.dtype).shape)
    assert_true(functional.covariance_product(g, k), true_product(g, k), g.dtype)


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_samples_of_any_scale_do_not_reach_each_other(shape):
    scales = torch.tensor([1e-30, 1e4, 1e-4, 0.0, 1e30])[: shape[0]].view(-1, 1, 1, 1)
    g, k = sample(shape, torch.float32) * scales, covariance_of(shape, torch.float32)
    for row, truth in zip(functional.covariance_product(g, k), true_product(g, k), strict=True):
        assert relative_error(row, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_a_sample_that_is_not_finite_spoils_no_other(shape, bad):
    g, k = sample(shape, torch.float32), covariance_of(shape, torch.float32) + 4
    truth = true_product(g, k)
    for spoilt in range(shape[0]):
        one_bad = g.clone()
        one_bad[spoilt, 0, 1, 2] = bad
        result = functional.covariance_product(one_bad, k)
        assert not result[spoilt].isfinite().any()
        rest = torch.arange(shape[0]) != spoilt
        assert_true(result[rest], truth[rest], torch.float32)


def test_hand_computed():
    g = torch.tensor([[[[1.0, 0.0, 2.0]]]])
    k = torch.tensor([[[[5.0, 3.0, 1.0, 10.0, 20.0]]]])  # at displacements -2, ..., 2
    expected = torch.tensor([[[[1 + 40.0, 3 + 20.0, 5 + 2.0]]]])
    torch.testing.assert_close(functional.covariance_product(g, k), expected)


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_a_shift_of_the_image_shifts_the_product(shape):
    k = covariance_of(shape, torch.float64)
    g = torch.zeros(shape, dtype=torch.float64)
    g[..., 0, 0] = sample(shape[:2], torch.float64)
    product = functional.covariance_product(g, k)
    shifted = functional.covariance_product(g.roll((2, 1), (2, 3)), k)
    torch.testing.assert_close(shifted[..., 2:, 1:], product[..., :-2, :-1])


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_the_transposed_covariance_is_the_adjoint(shape):
    u, v = sample(shape, torch.float64, 2), sample(shape, torch.float64, 3)
    k = covariance_of(shape, torch.float64)
    forth = (u * functional.covariance_product(v, k)).sum()
    transposed = functional.covariance_product(u, reference.transpose_covariance(k))
    torch.testing.assert_close(forth, (transposed * v).sum())


class TestProduct(CovarianceOpTests):
    name = "covariance_product"
