"""Covariances over pixel displacements, and the matrices they stand for."""

from functools import partial

import conformance
import pytest
import torch
from conformance import DTYPES, bitwise_with_threads, layouts, sample
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from robustkern import functional

# One pixel, one row, one column, odd sizes, two and four channels, an odd and an even batch, no
# sample. Small images are multiplied by a matrix, larger ones transformed.
IMAGES = [
    (2, 1, 1, 1),
    (3, 2, 3, 5),
    (4, 1, 16, 16),
    (0, 3, 2, 2),
    (0, 3, 16, 16),
    (3, 1, 1, 331),
    (2, 1, 331, 1),
    (1, 2, 17, 9),
    (2, 4, 13, 11),
    (5, 3, 7, 16),
    (4, 3, 16, 23),
    (3, 1, 35, 31),
]
DENSE, SPECTRAL = (3, 2, 3, 5), (5, 3, 9, 12)
# Images, and the rows and columns that a covariance reaches: few enough for a stencil, and more.
SHORT = [
    ((5, 3, 9, 12), (0, 0)),
    ((5, 3, 9, 12), (2, 1)),
    ((5, 3, 9, 12), (8, 0)),
    ((2, 3, 17, 37), (1, 1)),
    ((2, 3, 17, 37), (3, 3)),
    ((2, 3, 17, 37), (5, 20)),
    ((2, 1, 19, 70), (2, 4)),
    ((1, 9, 16, 33), (2, 2)),
]

TOLERANCE = conformance.COVARIANCE_TOLERANCE
assert_true = partial(conformance.assert_true, tolerances=TOLERANCE)


def covariance_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """One that fits the images, with no symmetry at all."""
    _, channels, height, width = shape
    return sample((channels, channels, 2 * height - 1, 2 * width - 1), dtype, seed)


def short_covariance_of(
    shape: tuple[int, ...], reach: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One of fewer displacements, up to `reach` rows and columns, and the same among zeros."""
    whole = covariance_of(shape, dtype)
    y, x = (size - 1 - r for size, r in zip(shape[2:], reach, strict=True))
    short = whole[..., y : whole.shape[2] - y, x : whole.shape[3] - x].clone()
    return short, torch.nn.functional.pad(short, (x, x, y, y))


def matrix(covariance: Tensor) -> Tensor:
    """Sigma in float64, (D, D), entry by entry from its definition."""
    channels, _, rows, columns = covariance.shape
    height, width = (rows + 1) // 2, (columns + 1) // 2
    c, y, x = (
        i.flatten() for i in torch.meshgrid(
            torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij"
        )
    )  # fmt: skip
    dy, dx = y[None] - y[:, None], x[None] - x[:, None]
    return covariance.double()[c[:, None], c[None], dy + height - 1, dx + width - 1]


class CovarianceOpTests:
    """What holds for an op of (gradient, covariance); its test file names it in a subclass."""

    name: str

    def function(self, gradient, covariance):
        return getattr(functional, self.name)(gradient, covariance)

    @pytest.mark.parametrize("shape", [DENSE, SPECTRAL], ids=str)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, shape, layout, requires_grad):
        op = getattr(torch.ops.robustkern, self.name).default
        g = layouts(sample(shape, torch.float32))[layout].detach().requires_grad_(requires_grad)
        k = covariance_of(shape, torch.float32)
        torch.library.opcheck(op, (g, k))
        torch.library.opcheck(op, (g.detach()[:0], k))

    @pytest.mark.parametrize(("shape", "reach"), SHORT, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_covariance_of_short_reach_is_zero_beyond(self, shape, reach, dtype):
        g = sample(shape, dtype)
        short, whole = short_covariance_of(shape, reach, dtype)
        truth = self.function(g.double(), whole.double())
        result = self.function(g, short)
        assert_true(result, truth, result.dtype)
        if g.dtype == torch.float64:
            leaf = g.requires_grad_()
            assert gradcheck(self.function, (leaf, short), fast_mode=True)
            assert gradgradcheck(self.function, (leaf, short), fast_mode=True)

    @pytest.mark.parametrize("shape", [(2, 2, 3, 2), (3, 1, 17, 19)], ids=str)
    def test_derivatives(self, shape):
        g = sample(shape, torch.float64).requires_grad_()
        k = covariance_of(shape, torch.float64)
        fast = g.numel() > 100
        assert gradcheck(self.function, (g, k), fast_mode=fast)
        assert gradgradcheck(self.function, (g, k), fast_mode=fast)

    def test_bitwise_repeatable(self):
        shape = (9, 3, 16, 20)
        g, k = sample(shape, torch.float32), covariance_of(shape, torch.float32)
        assert bitwise_with_threads(lambda: self.function(g, k))
        assert bitwise_with_threads(lambda: self.function(g[:1], k))

    @pytest.mark.setting("torch.compile of robustkern.functional", group="compiled models")
    def test_compiled_is_eager(self):
        k = covariance_of(SPECTRAL, torch.float32)
        g = sample(SPECTRAL, torch.float32).requires_grad_()
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(g, k), self.function(g, k))
