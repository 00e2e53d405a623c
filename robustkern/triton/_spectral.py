"""The product through Fourier transforms: at each frequency a C x C matrix times C numbers.

The transforms are cuFFT's. What is between them, conj(K^) g^ at every frequency, is one kernel that
reads the spectra of the gradients once. The form needs no way back: by Parseval it is the sum over
frequencies of Re(conj(g^) conj(K^) g^), where of a real image only half are stored.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from robustkern.reference.samples import accumulation_dtype, widen
from robustkern.triton._samples import finish

TILE_BYTES = 16384  # of the real parts of a program's sums
SAMPLES = 16  # that share one read of the covariance's spectrum


def spectral(gradient: Tensor, covariance: Tensor, form: bool) -> Tensor:
    """The product (N, C, H, W) or the forms (N,), for any dtype."""
    samples, channels, height, width = gradient.shape
    sizes = transform_sizes(gradient.shape, covariance.shape)
    padded = gradient.new_zeros((samples, channels, *sizes), dtype=accumulation_dtype(gradient))
    padded[..., :height, :width] = gradient
    spectrum = torch.view_as_real(torch.fft.rfft2(padded).contiguous())
    multiplied = _multiply(spectrum, _covariance_spectrum(covariance, sizes), sizes, form)
    if form:
        return finish(multiplied)
    product: Tensor = torch.fft.irfft2(torch.view_as_complex(multiplied), s=sizes)
    return product[..., :height, :width].to(gradient.dtype).contiguous()


def transform_sizes(gradient: torch.Size, covariance: torch.Size) -> tuple[int, int]:
    """Where a pixel meets no other but those it should: displacements reach P - 1 beyond."""
    height, width = (
        _smooth(size + (extent - 1) // 2)
        for size, extent in zip(gradient[2:], covariance[2:], strict=True)
    )
    return height, width


def _smooth(least: int) -> int:
    """The next number with no prime factor above 5."""
    rest = least
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return least if rest == 1 else _smooth(least + 1)


def _covariance_spectrum(covariance: Tensor, sizes: tuple[int, int]) -> Tensor:
    """(C, C, F, 2), of the array with displacement zero moved to its corner."""
    rows, columns = covariance.shape[2:]
    padded = F.pad(widen(covariance), (0, sizes[1] - columns, 0, sizes[0] - rows))
    rolled = padded.roll((-(rows // 2), -(columns // 2)), (2, 3))
    return torch.view_as_real(torch.fft.rfft2(rolled).contiguous())


def _multiply(spectrum: Tensor, covariance: Tensor, sizes: tuple[int, int], form: bool) -> Tensor:
    samples, channels, height, columns = spectrum.shape[:4]
    frequencies = height * columns
    rounded = triton.next_power_of_2(channels)
    tile = TILE_BYTES // spectrum.element_size() // rounded
    block = max(tile // SAMPLES, 16)
    group = max(tile // block, 1)
    blocks = triton.cdiv(frequencies, block)
    # Not in place: a thread may still read what another of its program has already replaced.
    out = spectrum.new_empty((samples, blocks)) if form else torch.empty_like(spectrum)
    _spectral_kernel[(blocks * triton.cdiv(samples, group),)](
        spectrum, covariance, out, samples, frequencies, columns, sizes[0] * sizes[1],
        C=channels, ROUNDED=rounded, EVEN=sizes[1] % 2 == 0, FORM=form,
        SAMPLES=group, BLOCK=block, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["samples"])
def _spectral_kernel(
    spectrum_ptr,  # (N, C, F, 2), contiguous
    covariance_ptr,  # (C, C, F, 2), contiguous
    out_ptr,  # (N, C, F, 2), contiguous; for the form (N, blocks)
    samples,
    frequencies,  # F, rows of `columns`
    columns,
    points,  # of a transform: an int, for Triton rounds floats to float32
    C: tl.constexpr,
    ROUNDED: tl.constexpr,  # C to a power of two
    EVEN: tl.constexpr,  # whether the last column is its own mirror image
    FORM: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All channels of BLOCK frequencies of SAMPLES samples, or their part of the form."""
    blocks = tl.cdiv(frequencies, BLOCK)
    program = tl.program_id(0)
    c = tl.arange(0, ROUNDED)[:, None, None]
    n = ((program // blocks).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES))[None, :, None]
    f = (program % blocks * BLOCK + tl.arange(0, BLOCK))[None, None, :]
    re = tl.zeros((ROUNDED, SAMPLES, BLOCK), spectrum_ptr.dtype.element_ty)
    im = tl.zeros((ROUNDED, SAMPLES, BLOCK), spectrum_ptr.dtype.element_ty)
    inside = (n < samples) & (f < frequencies)
    entries = (c < C) & (f < frequencies)
    for other in range(C):
        g_re, g_im = _load(spectrum_ptr, (n * C + other) * frequencies + f, inside)
        k_at = (c.to(tl.int64) * C + other) * frequencies + f
        k_re, k_im = _load(covariance_ptr, k_at, entries)
        re += k_re * g_re + k_im * g_im
        im += k_re * g_im - k_im * g_re
    at = (n * C + c) * frequencies + f
    mask = inside & (c < C)
    if FORM:
        own_re, own_im = _load(spectrum_ptr, at, mask)
        column = f % columns
        alone = (column == 0) | (EVEN & (column == columns - 1))
        weight = tl.where(alone, 1.0, 2.0).to(re.dtype) / points
        terms = (own_re * re + own_im * im) * weight
        sums = tl.sum(tl.sum(terms, 0, keep_dims=True), 2, keep_dims=True)
        tl.store(out_ptr + n * blocks + program % blocks, sums, n < samples)
    else:
        both = tl.join(re, im)
        ends = tl.join(at * 2, at * 2 + 1)
        tl.store(out_ptr + ends, both, tl.join(mask, mask))


@triton.jit
def _load(ptr, at, mask):
    """Real and imaginary parts."""
    return tl.load(ptr + at * 2, mask, 0.0), tl.load(ptr + at * 2 + 1, mask, 0.0)
