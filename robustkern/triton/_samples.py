"""What kernels share: where the elements of a sample lie, sums in two stages."""

import triton
from torch import Tensor
from triton import language as tl


def collapse(
    shape: tuple[int, ...], *strides: tuple[int, ...], any_order: bool = False
) -> tuple[tuple[int, ...], ...]:
    """A sample's dimensions as the fewest loops that step through all tensors alike.

    Args:
        shape: of a sample.
        strides: of each tensor.
        any_order: loop in the order of the first tensor's memory, not the sample's row-major order.

    Returns:
        The sizes of the loops, outermost first, and each tensor's strides.
    """
    loops = [loop for loop in zip(shape, *strides, strict=True) if loop[0] > 1]
    if any_order:
        loops.sort(key=lambda loop: loop[1:], reverse=True)
    merged = loops[:1]
    for inner in loops[1:]:
        outer = merged[-1]
        if all(o == inner[0] * i for o, i in zip(outer[1:], inner[1:], strict=True)):
            merged[-1] = (outer[0] * inner[0], *inner[1:])
        else:
            merged.append(inner)
    return tuple(zip(*(merged or [(1,) * (1 + len(strides))]), strict=True))


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far apart in memory the first and the last element lie."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def index_dtype(*reaches: int) -> tl.dtype:
    """The narrowest for numbers and offsets within a sample: 64 bits take twice the registers."""
    return tl.int32 if max(reaches) < 2**30 else tl.int64  # with room for a block beyond the end


def finish(partials: Tensor) -> Tensor:
    """The second stage of a sum: (N, parts) to (N,)."""
    return partials[:, 0] if partials.shape[1] == 1 else partials.sum(1)


@triton.jit
def offsets(index, sizes, strides):
    """Where elements lie in memory, from their numbers in the loops' order."""
    found = tl.zeros_like(index)
    for i in tl.static_range(len(sizes) - 1):
        j: tl.constexpr = len(sizes) - 1 - i
        found += index % sizes[j] * strides[j]
        index = index // sizes[j]
    return found + index * strides[0]


@triton.jit
def widen(values):
    """Values in the dtype sums are taken in."""
    return values if values.dtype == tl.float64 else values.to(tl.float32)
