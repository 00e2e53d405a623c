"""The Triton kernels, called directly: compiled on a GPU, otherwise by Triton's interpreter.

The interpreter takes milliseconds for each program and operation, so images are small here.
"""

import pytest
import torch
from conformance import DTYPES, SHAPES, TOLERANCE, accumulation, assert_true, layouts, sample
from covariances import covariance_of
from torch.nn import functional as F

pytest.importorskip("triton")

from triton import language as tl

from robustkern.triton import _toeplitz
from robustkern.triton import gradient_difference as difference
from robustkern.triton._algorithm import choose
from robustkern.triton._samples import collapse
from robustkern.triton._spectral import spectral, transform_sizes
from robustkern.triton._stencil import stencil
from robustkern.triton._toeplitz import toeplitz
from robustkern.triton.covariance_form import covariance_form
from robustkern.triton.covariance_product import covariance_product
from robustkern.triton.gradient_difference import (
    gradient_difference,
    gradient_difference_backward,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# (N, C, H, W) and the support (P, Q): one pixel, no multiples of anything, more rows of the matrix
# than one tile has, cropped in one direction and in both, more channels than eight.
IMAGES = [
    ((2, 1, 1, 1), (1, 1)),
    ((3, 2, 3, 5), (3, 5)),
    ((5, 3, 7, 9), (7, 9)),
    ((3, 3, 4, 7), (4, 2)),
    ((2, 11, 3, 2), (2, 1)),
]
ALGORITHMS = [toeplitz, spectral, stencil]


def on_device(tensor):
    """Moved with its strides."""
    return tensor.to(DEVICE) if ON_GPU else tensor


def assert_near(result, truth, dtype, slack=1.0):
    """As `assert_true`; `slack` widens what TF32 products and cuFFT may do to a float32 result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TOLERANCE, dtype, TOLERANCE[dtype] * slack)
        assert_true(result, truth.to(result.device), dtype)


def slack(dtype):
    return 5.0 if ON_GPU and dtype == torch.float32 else 1.0


def cropped(shape, support, dtype, seed=1):
    _, channels, *_ = shape
    return covariance_of((1, channels, *support), dtype, seed)


def true_product(gradient, covariance):
    padding = [size // 2 for size in covariance.shape[2:]]
    return F.conv2d(gradient.double().cpu(), covariance.double().cpu(), padding=padding)


def true_form(gradient, covariance):
    product = true_product(gradient, covariance)
    return (gradient.double().cpu() * product).flatten(1).sum(1)


def assert_covariance_ops(algorithm, g, k):
    product, form = algorithm(g, k, False), algorithm(g, k, True)
    assert_near(product, true_product(g, k), g.dtype, slack(g.dtype))
    values = accumulation(g.dtype)
    assert_near(form, true_form(g, k), values, slack(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_difference(shape, dtype):
    a, b = sample(shape, dtype, 1), sample(shape, dtype, 2)
    truth = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    names = ["contiguous"] if len(a) > 1000 and not ON_GPU else list(layouts(a))
    for name in names:
        a_laid, b_laid = on_device(layouts(a)[name]), on_device(layouts(b)[name])
        for other in (b_laid, on_device(b)):
            assert_near(gradient_difference(a_laid, other), truth, accumulation(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_difference_backward(shape, dtype):
    a, b = sample(shape, dtype, 1), sample(shape, dtype, 2)
    grad = sample(shape[:1], accumulation(dtype), 3)
    truth = 2 * grad.double().reshape(-1, *[1] * (len(shape) - 1)) * (a.double() - b.double())
    names = ["contiguous"] if len(a) > 1000 and not ON_GPU else list(layouts(a))
    for name in names:
        da, db = gradient_difference_backward(
            on_device(grad), on_device(layouts(a)[name]), on_device(b)
        )
        assert_near(da, truth, dtype)
        assert_near(db, -truth, dtype)


@pytest.mark.parametrize("size", [16384, 16385, 40_003])
def test_a_large_sample_is_summed_in_chunks(size):
    a, b = (
        on_device(sample((2, size), torch.float32)),
        on_device(sample((2, size), torch.float32, 1)),
    )
    truth = ((a.double() - b.double()) ** 2).sum(1)
    assert_near(gradient_difference(a, b), truth, torch.float32)
    grad = on_device(sample((2,), torch.float32, 2) + 3)
    da, _ = gradient_difference_backward(grad, a, b)
    assert_near(da, 2 * grad.double()[:, None] * (a.double() - b.double()), torch.float32)


def test_expanded_operands_are_read_through_their_zero_strides():
    a = on_device(sample((1, 3, 5, 4), torch.float32)).expand(6, -1, -1, -1)
    b = on_device(sample((6, 1, 1, 4), torch.float32, 1)).expand(-1, 3, 5, -1)
    truth = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    assert_near(gradient_difference(a, b), truth, torch.float32)
    da, _ = gradient_difference_backward(torch.ones(1, device=a.device).expand(6), a, b)
    assert_near(da, 2 * (a.double() - b.double()), torch.float32)


def test_a_difference_that_overflows_has_a_finite_cotangent():
    a = on_device(torch.full((1, 4), 3e38))
    da, db = gradient_difference_backward(torch.full((1,), 0.1, device=a.device), a, -a)
    torch.testing.assert_close(da, torch.full_like(a, 1.2e38))
    torch.testing.assert_close(db, -da)


def test_offsets_of_64_bits(monkeypatch):
    for module in (_toeplitz, difference):
        monkeypatch.setattr(module, "index_dtype", lambda *reaches: tl.int64)
    a = sample((3, 3, 4, 7), torch.float32)
    b = on_device(layouts(a)["channels_last"]).flip(0)
    a = on_device(a)
    truth = ((a.double() - b.double()) ** 2).flatten(1).sum(1)
    assert_near(gradient_difference(a, b), truth, torch.float32)
    assert_covariance_ops(toeplitz, b, on_device(cropped(a.shape, (2, 3), torch.float32)))


def test_loops_are_as_few_as_strides_allow():
    assert collapse((3, 5, 4), (20, 4, 1)) == ((60,), (1,))
    assert collapse((3, 5, 4), (20, 4, 1), (1, 12, 3)) == ((3, 20), (20, 1), (1, 3))
    assert collapse((3, 5, 4), (1, 12, 3), any_order=True) == ((60,), (1,))
    assert collapse((3, 5, 4), (0, 0, 1)) == ((15, 4), (0, 1))
    assert collapse((1, 1), (7, 9)) == ((1,), (1,))


# Products of TF32 parts cannot be exact to float64, and the choice never asks for them.
SERVED = [(a, dtype) for a in ALGORITHMS for dtype in DTYPES if (a, dtype) != (toeplitz, DTYPES[0])]


@pytest.mark.parametrize(
    ("algorithm", "dtype"), SERVED, ids=[f"{a.__name__}-{dtype}" for a, dtype in SERVED]
)
@pytest.mark.parametrize(("shape", "support"), IMAGES, ids=str)
def test_covariance_ops(algorithm, shape, support, dtype):
    if algorithm is stencil and support[0] * support[1] > 15 and not ON_GPU:
        support = (2, 3)  # every tap is interpreted
    g, k = sample(shape, dtype), cropped(shape, support, dtype)
    assert_covariance_ops(algorithm, on_device(g), on_device(k))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "stepped", "channels_last"])
def test_covariance_ops_in_any_layout(algorithm, layout):
    g, k = sample((3, 3, 4, 7), torch.float32), cropped((3, 3), (2, 3), torch.float32)
    assert_covariance_ops(algorithm, on_device(layouts(g)[layout]), on_device(layouts(k)[layout]))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_expanded_arguments(algorithm):
    g = on_device(sample((1, 2, 4, 3), torch.float32)).expand(3, -1, -1, -1)
    k = on_device(sample((3,), torch.float32, 1)).expand(2, 2, 3, 3)
    assert_covariance_ops(algorithm, g, k)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_a_half_precision_gradient_takes_a_float32_covariance(algorithm):
    g, k = sample((3, 2, 3, 5), torch.bfloat16), cropped((3, 2), (2, 2), torch.float32)
    assert_covariance_ops(algorithm, on_device(g), on_device(k))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, on inf
def test_samples_do_not_reach_each_other(algorithm, bad):
    shape = (4, 2, 3, 5)
    scales = torch.tensor([1e-30, 1.0, 0.0, 1e30]).view(-1, 1, 1, 1)
    g, k = sample(shape, torch.float32) * scales, cropped(shape, (2, 2), torch.float32)
    g[1] = bad
    product = algorithm(on_device(g), on_device(k), False)
    truth = true_product(g, k)
    for i in (0, 2, 3):
        assert_near(product[i], truth[i], torch.float32, slack(torch.float32))
    assert not product[1].isfinite().any()


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_bits_do_not_depend_on_the_batch(algorithm):
    shape = (35, 1, 4, 7)
    g = on_device(sample(shape, torch.float32))
    k = on_device(cropped(shape, (2, 2), torch.float32))
    for form in (False, True):
        whole = algorithm(g, k, form)
        assert torch.equal(algorithm(g, k, form), whole)
        if algorithm is not spectral:  # how a library transforms may depend on the batch
            assert torch.equal(algorithm(g[:1], k, form), whole[:1])
            assert torch.equal(algorithm(g[33:], k, form), whole[33:])
    a, b = g.flatten(1), g.flatten(1).flip(1)
    assert torch.equal(gradient_difference(a[:1], b[:1]), gradient_difference(a, b)[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch(dtype):
    g = torch.empty((0, 3, 4, 5), dtype=dtype, device=DEVICE)
    k = torch.zeros((3, 3, 7, 9), dtype=dtype, device=DEVICE)
    assert covariance_product(g, k).shape == g.shape
    form = covariance_form(g, k)
    assert form.shape == (0,)
    assert form.dtype == accumulation(dtype)


def test_the_ops_take_the_chosen_algorithm():
    g = on_device(sample((2, 1, 5, 4), torch.float32))
    k = on_device(cropped((2, 1), (5, 4), torch.float32))
    assert_near(covariance_product(g, k), true_product(g, k), g.dtype, slack(g.dtype))
    assert_near(covariance_form(g, k), true_form(g, k), g.dtype, slack(g.dtype))


@pytest.mark.parametrize(
    ("image", "support", "dtype", "expected"),
    [
        ((1, 28, 28), (28, 28), torch.float32, toeplitz),
        ((3, 32, 32), (32, 32), torch.float32, toeplitz),
        ((3, 32, 32), (32, 32), torch.bfloat16, toeplitz),
        ((3, 32, 32), (32, 32), torch.float64, spectral),
        ((3, 64, 64), (64, 64), torch.float32, spectral),
        ((3, 224, 224), (224, 224), torch.float32, spectral),
        ((3, 224, 224), (4, 4), torch.float32, stencil),
        ((3, 32, 32), (2, 2), torch.float64, stencil),
    ],
    ids=str,
)
def test_the_table(image, support, dtype, expected):
    g = torch.Size((128, *image))
    k = torch.Size((image[0], image[0], 2 * support[0] - 1, 2 * support[1] - 1))
    assert choose(g, k, dtype) is expected
    assert all(size >= least for size, least in zip(transform_sizes(g, k), image[1:], strict=True))
