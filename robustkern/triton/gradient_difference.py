"""gradient_difference: both gradients are read once, or read once and both cotangents written.

Each kernel has one configuration: they wait for memory whatever their shape, and a tuned sum would
have other bits in another process.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from robustkern.reference.samples import accumulation_dtype
from robustkern.triton._samples import collapse, finish, index_dtype, offsets, reach, widen

TILE_BYTES = 16384  # of one operand in its accumulation dtype: four 16-byte loads a thread
TILES = 4  # a program's, at most: images up to 64x64x3 are then summed by one kernel alone


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """(N,) squared distances."""
    if a.numel() == 0:
        return a.new_zeros(a.shape[:1], dtype=accumulation_dtype(a))
    samples, size = a.shape[0], a.numel() // a.shape[0]
    loops = collapse(a.shape[1:], a.stride()[1:], b.stride()[1:], any_order=True)
    tiling = _tiling(a, b, size)
    tiles = min(TILES, triton.cdiv(size, tiling["BLOCK"]))
    chunks = triton.cdiv(size, tiling["BLOCK"] * tiles)
    out = a.new_empty((samples, chunks), dtype=accumulation_dtype(a))
    with torch.cuda.device_of(a):
        _gradient_difference_fwd_kernel[(triton.cdiv(samples, tiling["ROWS"]) * chunks,)](
            a, b, out, samples, size, a.stride(0), b.stride(0), *loops, TILES=tiles, **tiling
        )
    return finish(out)


def gradient_difference_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """2 grad_i (a_i - b_i), and its negative."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format)
    db = torch.empty_like(da)
    if a.numel() == 0:
        return da, db
    samples, size = a.shape[0], a.numel() // a.shape[0]
    loops = collapse(a.shape[1:], a.stride()[1:], b.stride()[1:])
    tiling = _tiling(a, b, size)
    chunks = triton.cdiv(size, tiling["BLOCK"])
    with torch.cuda.device_of(a):
        _gradient_difference_bwd_kernel[(triton.cdiv(samples, tiling["ROWS"]) * chunks,)](
            grad, a, b, da, db, samples, size, grad.stride(0), a.stride(0), b.stride(0),
            *loops, **tiling,
        )  # fmt: skip
    return da, db


def _tiling(a: Tensor, b: Tensor, size: int) -> dict[str, Any]:
    """By the size of a sample alone, so that sums are taken alike in every batch."""
    reaches = [reach(tensor.shape[1:], tensor.stride()[1:]) for tensor in (a, b)]
    tile = TILE_BYTES // accumulation_dtype(a).itemsize
    block = min(tile, triton.next_power_of_2(size))
    return {
        "ROWS": tile // block,
        "BLOCK": block,
        "INDEX": index_dtype(size, *reaches),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


@triton.jit(do_not_specialize=["samples"])
def _gradient_difference_fwd_kernel(
    a_ptr,  # (N, *D), any strides
    b_ptr,  # (N, *D), any strides
    out_ptr,  # (N, chunks), accumulation dtype
    samples,
    size,  # D
    a_stride_n,
    b_stride_n,
    sizes,  # of the loops over a sample
    a_strides,
    b_strides,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sums of (a - b)^2 over a chunk of TILES * BLOCK elements, for ROWS samples."""
    chunks = tl.cdiv(size, TILES * BLOCK)
    program = tl.program_id(0)
    chunk = program % chunks
    n = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), out_ptr.dtype.element_ty)
    for tile in tl.static_range(TILES):
        index = (chunk.to(INDEX) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = (n < samples)[:, None] & (index < size)[None, :]
        a_at = n[:, None] * a_stride_n + offsets(index, sizes, a_strides)[None, :]
        b_at = n[:, None] * b_stride_n + offsets(index, sizes, b_strides)[None, :]
        a = tl.load(a_ptr + a_at, mask, 0.0)
        b = tl.load(b_ptr + b_at, mask, 0.0)
        d = widen(a) - widen(b)
        total += d * d
    tl.store(out_ptr + n * chunks + chunk, tl.sum(total, 1), n < samples)


@triton.jit(do_not_specialize=["samples"])
def _gradient_difference_bwd_kernel(
    grad_ptr,  # (N,), any stride
    a_ptr,  # (N, *D), any strides
    b_ptr,  # (N, *D), any strides
    da_ptr,  # (N, *D), contiguous
    db_ptr,  # (N, *D), contiguous
    samples,
    size,  # D
    grad_stride,
    a_stride_n,
    b_stride_n,
    sizes,  # of the loops over a sample, in row-major order
    a_strides,
    b_strides,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Both cotangents of BLOCK elements of ROWS samples."""
    chunks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    grad = widen(tl.load(grad_ptr + n * grad_stride, n < samples, 0.0))
    index = (program % chunks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < samples)[:, None] & (index < size)[None, :]
    a_at = n[:, None] * a_stride_n + offsets(index, sizes, a_strides)[None, :]
    b_at = n[:, None] * b_stride_n + offsets(index, sizes, b_strides)[None, :]
    a = widen(tl.load(a_ptr + a_at, mask, 0.0))
    b = widen(tl.load(b_ptr + b_at, mask, 0.0))
    # Halved first: the difference of two finite numbers may be none, where its product is one.
    da = 4 * (grad[:, None] * (a * 0.5 - b * 0.5))
    at = n[:, None] * size + index[None, :]
    tl.store(da_ptr + at, da, mask)
    tl.store(db_ptr + at, -da, mask)
