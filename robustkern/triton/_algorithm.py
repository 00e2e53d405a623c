"""Which algorithm multiplies by a covariance: the crossovers, in this one place.

They come from counts of operations and bytes for one sample of a batch of BATCH on an H200, with
the rates below, and are not measured yet.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from robustkern.triton._spectral import spectral, transform_sizes
from robustkern.triton._stencil import stencil
from robustkern.triton._toeplitz import toeplitz

TF32X3 = 400e12 / 3  # operations a second
FMA = 50e12
L1_LOADS = 7.6e12  # of 4 bytes: 132 processors, 32 a clock, 1.8 GHz
MEMORY = 4.3e12  # bytes a second
LAUNCH = 4e-6
BATCH = 256

Algorithm = Callable[[Tensor, Tensor, bool], Tensor]


def multiply(gradient: Tensor, covariance: Tensor, form: bool) -> Tensor:
    """Sigma g or the forms, by the algorithm that should be fastest."""
    with torch.cuda.device_of(gradient):
        return choose(gradient.shape, covariance.shape, gradient.dtype)(gradient, covariance, form)


def choose(gradient: torch.Size, covariance: torch.Size, dtype: torch.dtype) -> Algorithm:
    """The algorithm with the least time, by shape and dtype but never by the batch."""
    _, channels, height, width = gradient
    pixels = height * width
    wide = dtype == torch.float64
    # A tap loads one number for a multiplication by each channel's.
    taps = covariance[2] * covariance[3]
    times = {
        stencil: pixels * channels * taps * (2 * channels / FMA + 1 / L1_LOADS) * (1 + wide)
        + LAUNCH / BATCH
    }
    # Each of padding, two passes forth, the product, two passes back and the crop reads and writes
    # about a spectrum: 12 in all, with as many launches.
    rows, columns = transform_sizes(gradient, covariance)
    spectrum = channels * rows * (columns // 2 + 1) * (16 if wide else 8)
    times[spectral] = 12 * (spectrum / MEMORY + LAUNCH / BATCH)
    if not wide:  # TF32 cannot reach it
        times[toeplitz] = 2 * (channels * pixels) ** 2 / TF32X3 + LAUNCH / BATCH
    return min(times, key=times.__getitem__)
