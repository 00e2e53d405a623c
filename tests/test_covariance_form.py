import subprocess
import sys

import pytest
import torch
from conformance import DTYPES, accumulation, bitwise_with_threads, layouts, relative_error, sample
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
from torch.utils._python_dispatch import TorchDispatchMode

from robustkern import functional, reference
from robustkern.ops._library import kernel_of

# Where autograd records, the form comes from the product that its derivative needs.
recorded_or_not = pytest.mark.parametrize("requires_grad", [False, True], ids=["form", "recorded"])


def true_form(gradient, covariance):
    rows = gradient.double().flatten(1)
    return ((rows @ matrix(covariance).T) * rows).sum(1)


def form(gradient, covariance, requires_grad):
    return functional.covariance_form(
        gradient.detach().requires_grad_(requires_grad), covariance
    ).detach()


def definite(shape, dtype):
    """A covariance whose forms are far from zero, plus an antisymmetric part they must not see."""
    k = covariance_of(shape, torch.float64)
    twisted = 0.1 * (k - reference.transpose_covariance(k))
    _, channels, height, width = shape
    twisted[range(channels), range(channels), height - 1, width - 1] += 3.0
    twisted += 0.02 * (k + reference.transpose_covariance(k))
    return twisted.to(dtype)


@recorded_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_form_is_the_float64_truth(shape, dtype, requires_grad):
    g, k = sample(shape, dtype), definite(shape, dtype)
    truth = true_form(g, k)
    for g_laid, k_laid in zip(layouts(g).values(), layouts(k).values(), strict=True):
        assert_true(form(g_laid, k_laid, requires_grad), truth, accumulation(dtype))


@recorded_or_not
@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_gradient_takes_a_float32_covariance(shape, dtype, requires_grad):
    g, k = sample(shape, dtype), definite(shape, torch.float32)
    assert_true(form(g, k, requires_grad), true_form(g, k), torch.float32)


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_a_covariance_without_symmetry_counts_by_its_symmetric_part(shape):
    g, k = sample(shape, torch.float64), covariance_of(shape, torch.float64)
    torch.testing.assert_close(functional.covariance_form(g, k), true_form(g, k))
    transposed = reference.transpose_covariance(k)
    torch.testing.assert_close(functional.covariance_form(g, transposed), true_form(g, k))


@recorded_or_not
@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_samples_of_any_scale_do_not_reach_each_other(shape, requires_grad):
    scales = torch.tensor([1e-15, 1e4, 1e-4, 0.0, 1e15])[: shape[0]].view(-1, 1, 1, 1)
    g, k = sample(shape, torch.float32) * scales, definite(shape, torch.float32)
    for value, truth in zip(form(g, k, requires_grad), true_form(g, k), strict=True):
        assert relative_error(value, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
@recorded_or_not
def test_a_form_beyond_float32_is_infinite(shape, requires_grad):
    g, k = 1e25 * sample(shape, torch.float32), definite(shape, torch.float32)
    assert (form(g, k, requires_grad) == torch.inf).all()


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_a_recorded_form_beyond_float32_is_infinite_and_its_derivative_is_not(shape):
    g = (1e25 * sample(shape, torch.float32)).requires_grad_()
    k = definite(shape, torch.float32)
    value = functional.covariance_form(g, k)
    assert (value == torch.inf).all()
    (found,) = torch.autograd.grad(value.sum(), g)
    symmetrized = k.double() + reference.transpose_covariance(k.double())
    assert_true(found, reference.covariance_product(g.detach().double(), symmetrized), found.dtype)


@recorded_or_not
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_a_sample_that_is_not_finite_spoils_no_other(shape, bad, requires_grad):
    g, k = sample(shape, torch.float32), definite(shape, torch.float32)
    truth = true_form(g, k)
    for spoilt in range(shape[0]):
        one_bad = g.clone()
        one_bad[spoilt, 0, 1, 2] = bad
        result = form(one_bad, k, requires_grad)
        assert not result[spoilt].isfinite()
        rest = torch.arange(shape[0]) != spoilt
        assert_true(result[rest], truth[rest], torch.float32)


def test_hand_computed():
    g = torch.tensor([[[[1.0, 0.0, 2.0]]]])
    k = torch.tensor([[[[5.0, 3.0, 1.0, 10.0, 20.0]]]])
    torch.testing.assert_close(functional.covariance_form(g, k), torch.tensor([41.0 + 2 * 7.0]))


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_the_form_of_the_identity_is_the_squared_length(shape):
    k = torch.zeros_like(covariance_of(shape, torch.float64))
    channels, height, width = shape[1:]
    k[range(channels), range(channels), height - 1, width - 1] = 1.0
    g = sample(shape, torch.float64)
    torch.testing.assert_close(functional.covariance_form(g, k), g.flatten(1).square().sum(1))


@pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
def test_the_biased_autocovariance_is_positive_semidefinite(shape):
    k = functional.autocovariance(sample(shape, torch.float64, 5), unbiased=False)
    eigenvalues = torch.linalg.eigvalsh(matrix(k))
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    assert (functional.covariance_form(sample(shape, torch.float64), k) >= 0).all()


class Products(TorchDispatchMode):
    """Counts the products with a covariance: each transforms it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.robustkern.covariance_product.default
        assert func is not torch.ops.robustkern.covariance_form.default
        return func(*args, **(kwargs or {}))


def test_value_and_derivative_share_one_product():
    g = sample(SPECTRAL, torch.float32).requires_grad_()
    k = covariance_of(SPECTRAL, torch.float32)
    with Products() as products:
        value = functional.covariance_form(g, k).sum()
        torch.autograd.grad(value, g, retain_graph=True)
        assert products.count == 1
        torch.autograd.grad(value, g, create_graph=True)
        assert products.count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_derivative_is_rounded_once(dtype):
    g, k = sample(SPECTRAL, dtype).requires_grad_(), covariance_of(SPECTRAL, dtype)
    (found,) = torch.autograd.grad(functional.covariance_form(g, k).sum(), g)
    symmetrized = k.double() + reference.transpose_covariance(k.double())
    truth = reference.covariance_product(g.detach().double(), symmetrized)
    assert_true(found, truth, dtype)
    assert relative_error(found, truth) <= 1.01 * relative_error(truth.to(dtype), truth)


@pytest.mark.parametrize("shape", [(3, 3, 16, 20), (1, 1, 200, 200)], ids=str)
def test_recorded_values_repeat_bit_by_bit(shape):
    g, k = sample(shape, torch.float32), covariance_of(shape, torch.float32)
    assert bitwise_with_threads(lambda: form(g, k, requires_grad=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.skipif(kernel_of("covariance_form", "CPU") != "C++", reason="is about C++ kernels")
@pytest.mark.parametrize("shape", [(2, 16, 64, 64), (2, 3, 224, 224)], ids=str)
def test_memory_is_linear_in_pixels(shape):
    """The matrices would have 16 and 84 GiB."""
    script = f"""
import torch
from pathlib import Path
from robustkern import functional

def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

_, channels, height, width = shape = {shape}
g = torch.randn(shape).requires_grad_()
k = torch.randn(channels, channels, 2 * height - 1, 2 * width - 1)
before = peak()
functional.covariance_form(g.detach(), k)
functional.covariance_form(g, k).sum().backward()
print((peak() - before) / (g.nbytes + k.nbytes))
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert 0.5 < float(run.stdout) < 8


class TestForm(CovarianceOpTests):
    name = "covariance_form"
