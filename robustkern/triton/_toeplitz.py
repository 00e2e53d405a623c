"""The product with a block-Toeplitz matrix as an implicit GEMM, for images up to some 64 x 64.

Rows of the matrix are elements i = (c, y, x) of the product, columns elements j = (c', y', x') of
the gradient, and its entry is K[c, c', y' - y + P - 1, x' - x + Q - 1]. The address of an entry is
a part of j plus a part of i, so that a tile is gathered from K with one addition an entry, and no
(D, D) matrix is ever in memory. Samples are the columns of the GEMM.

The products of the dot are tf32x3: each operand is the sum of two TF32 numbers, 22 bits, and three
of the four products of parts are taken. Every BLOCK_J terms are added to the sum in float32 outside
of the tensor cores, whose own sums are rounded towards zero. Errors are then some 1e-6.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from robustkern.triton._samples import collapse, finish, index_dtype, offsets, reach

FORM_ROWS = 64  # rows of the matrix that one partial sum of a form spans, whatever the tile

# Larger tiles spill on sm_80. All add up alike, in steps of 32: only the last sums of a form may
# have other bits where another tile is chosen.
CONFIGS = [
    triton.Config({"BLOCK_I": 64, "BLOCK_N": 32, "BLOCK_J": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_I": 64, "BLOCK_N": 64, "BLOCK_J": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_I": 128, "BLOCK_N": 32, "BLOCK_J": 32}, num_warps=8, num_stages=3),
]


def toeplitz(gradient: Tensor, covariance: Tensor, form: bool) -> Tensor:
    """The product (N, C, H, W) or the forms (N,), for any dtype but float64."""
    samples, channels, height, width = gradient.shape
    size = channels * height * width
    if form:
        out = gradient.new_empty((samples, triton.cdiv(size, FORM_ROWS)), dtype=torch.float32)
    else:
        out = torch.empty_like(gradient, memory_format=torch.contiguous_format)

    index = index_dtype(
        reach(gradient.shape[1:], gradient.stride()[1:]),
        reach(covariance.shape, covariance.stride()),
    )

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(size, meta["BLOCK_I"]) * triton.cdiv(samples, meta["BLOCK_N"]),)

    _toeplitz_kernel[grid](
        gradient, covariance, out, samples, gradient.stride(0),
        *collapse(gradient.shape[1:], gradient.stride()[1:]), covariance.stride(),
        C=channels, H=height, W=width,
        P=(covariance.shape[2] + 1) // 2, Q=(covariance.shape[3] + 1) // 2,
        FORM_ROWS=FORM_ROWS if form else None, INDEX=index, enable_fp_fusion=True,
    )  # fmt: skip
    return finish(out) if form else out


# The batch is not in the key: a new one must not tune again. The interpreter cannot measure.
@triton.autotune(
    CONFIGS[:1] if triton.knobs.runtime.interpret else CONFIGS,
    key=["C", "H", "W", "P", "Q", "FORM_ROWS"],
)
@triton.jit(do_not_specialize=["samples"])
def _toeplitz_kernel(
    gradient_ptr,  # (N, C, H, W), any strides
    covariance_ptr,  # (C, C, 2P-1, 2Q-1), any strides
    out_ptr,  # (N, C, H, W), contiguous; for the form (N, ceil(D / FORM_ROWS)), float32
    samples,
    stride_n,
    sizes,  # of the loops over a sample, in row-major order
    strides,
    covariance_strides,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    FORM_ROWS: tl.constexpr,  # None for the product
    INDEX: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """BLOCK_I elements of the product for BLOCK_N samples, or their part of the forms."""
    D: tl.constexpr = C * H * W
    blocks: tl.constexpr = (D + BLOCK_I - 1) // BLOCK_I
    program = tl.program_id(0)
    i = (program % blocks * BLOCK_I + tl.arange(0, BLOCK_I)).to(INDEX)
    n = (program // blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = i // W % H, i % W
    to_c, to_other, to_y, to_x = covariance_strides
    rows = i // (H * W) * to_c + (P - 1 - y) * to_y + (Q - 1 - x) * to_x
    gradient_rows = gradient_ptr + n * stride_n
    total = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_J):
        j = (start + tl.arange(0, BLOCK_J)).to(INDEX)
        y_other, x_other = j // W % H, j % W
        columns = j // (H * W) * to_other + y_other * to_y + x_other * to_x
        inside = (i < D)[:, None] & (j < D)[None, :]
        if P < H:
            inside &= tl.abs(y_other[None, :] - y[:, None]) < P
        if Q < W:
            inside &= tl.abs(x_other[None, :] - x[:, None]) < Q
        k = tl.load(covariance_ptr + rows[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
        at = gradient_rows[:, None] + offsets(j, sizes, strides)[None, :]
        g = tl.load(at, (n < samples)[:, None] & (j < D)[None, :], 0.0).to(tl.float32)
        total += tl.dot(k, tl.trans(g), input_precision="tf32x3")
    product = tl.trans(total)
    mask = (n < samples)[:, None] & (i < D)[None, :]
    if FORM_ROWS is None:
        tl.store(out_ptr + n[:, None] * D + i[None, :], product, mask)
    else:
        own = tl.load(gradient_rows[:, None] + offsets(i, sizes, strides)[None, :], mask, 0.0)
        terms = tl.reshape(product * own.to(tl.float32), BLOCK_N, BLOCK_I // FORM_ROWS, FORM_ROWS)
        parts: tl.constexpr = (D + FORM_ROWS - 1) // FORM_ROWS
        part = program % blocks * (BLOCK_I // FORM_ROWS) + tl.arange(0, BLOCK_I // FORM_ROWS)
        at_part = out_ptr + n[:, None] * parts + part[None, :]
        tl.store(at_part, tl.sum(terms, 2), (n < samples)[:, None] & (part < parts)[None, :])
