"""The product by its definition, tap by tap, for covariances of short displacements."""

import torch
import triton
from torch import Tensor
from triton import language as tl

from robustkern.reference.samples import accumulation_dtype
from robustkern.triton._samples import finish, widen

TILE_BYTES = 16384  # of a program's sums: a tap's load serves many of them
PIXELS = 1024  # of a program, at most


def stencil(gradient: Tensor, covariance: Tensor, form: bool) -> Tensor:
    """The product (N, C, H, W) or the forms (N,), for any dtype."""
    samples, channels, height, width = gradient.shape
    dtype = accumulation_dtype(gradient)
    rounded = triton.next_power_of_2(channels)
    pixels = min(PIXELS, triton.next_power_of_2(height * width))
    block = min(max(TILE_BYTES // dtype.itemsize // rounded, 32), pixels)
    blocks = triton.cdiv(height * width, block)
    if form:
        out = gradient.new_empty((samples, blocks), dtype=dtype)
    else:
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    _stencil_kernel[(samples * blocks,)](
        gradient, covariance, out, gradient.stride(), covariance.stride(),
        height, width, C=channels, ROUNDED=rounded, ROWS=covariance.shape[2],
        COLUMNS=covariance.shape[3], FORM=form, BLOCK=block,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return finish(out) if form else out


@triton.jit
def _stencil_kernel(
    gradient_ptr,  # (N, C, H, W), any strides
    covariance_ptr,  # (C, C, 2P-1, 2Q-1), any strides
    out_ptr,  # (N, C, H, W), contiguous; for the form (N, blocks)
    strides,
    covariance_strides,
    height,
    width,
    C: tl.constexpr,
    ROUNDED: tl.constexpr,  # C to a power of two
    ROWS: tl.constexpr,  # 2P - 1
    COLUMNS: tl.constexpr,  # 2Q - 1
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All channels of BLOCK pixels of a sample, or their part of the form."""
    blocks = tl.cdiv(height * width, BLOCK)
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    y, x = pixel // width, pixel % width
    c = tl.arange(0, ROUNDED)
    image = gradient_ptr + n * strides[0]
    taps = covariance_ptr + c.to(tl.int64) * covariance_strides[0]
    total = widen(tl.zeros((ROUNDED, BLOCK), gradient_ptr.dtype.element_ty))
    for other in range(C):
        g_channel = image + tl.cast(other, tl.int64) * strides[1]
        k_channel = taps + tl.cast(other, tl.int64) * covariance_strides[1]
        for row in range(ROWS):
            y_other = y + row - ROWS // 2
            g_row = g_channel + y_other.to(tl.int64) * strides[2]
            k_row = k_channel + tl.cast(row, tl.int64) * covariance_strides[2]
            inside_row = (y_other >= 0) & (y_other < height)
            for column in range(COLUMNS):
                x_other = x + column - COLUMNS // 2
                inside = inside_row & (x_other >= 0) & (x_other < width)
                g = tl.load(g_row + x_other.to(tl.int64) * strides[3], inside, 0.0)
                k_at = k_row + tl.cast(column, tl.int64) * covariance_strides[3]
                k = tl.load(k_at, c < C, 0.0)
                total += widen(k)[:, None] * widen(g)[None, :]
    mask = (c < C)[:, None] & (pixel < height * width)[None, :]
    if FORM:
        at = y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
        own_at = c[:, None].to(tl.int64) * strides[1] + at[None, :]
        own = widen(tl.load(image + own_at, mask, 0.0))
        part = tl.sum(tl.sum(own * total, 1), 0)
        tl.store(out_ptr + n * blocks + program % blocks, part)
    else:
        size = height * width
        out_at = (n * C + c[:, None]) * size + pixel[None, :]
        tl.store(out_ptr + out_at, total, mask)
