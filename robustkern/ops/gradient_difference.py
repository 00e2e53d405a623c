"""gradient_difference: the squared distance between two input gradients, per sample."""

from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, save_arguments, serve_by_triton
from robustkern.reference.samples import accumulation_dtype, per_sample, sample_sum, widen


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:1], dtype=accumulation_dtype(a))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(torch.ops.robustkern.gradient_difference_backward(grad, *ctx.saved_tensors))


def _backward_fake(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.empty_like(a, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


def _double_backward(ctx: Any, va: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
    grad, a, b = ctx.saved_tensors
    v = widen(va) - widen(vb)
    along = 2 * sample_sum((widen(a) - widen(b)) * v)
    da = (per_sample(2 * grad, v) * v).to(a.dtype)
    return along, da, -da


define(
    "gradient_difference(Tensor a, Tensor b) -> Tensor",
    reference.gradient_difference,
    _fake,
    save_arguments,
    _backward,
)
define(
    "gradient_difference_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference.gradient_difference_backward,
    _backward_fake,
    save_arguments,
    _double_backward,
)
serve_by_triton("gradient_difference", "gradient_difference", "gradient_difference_backward")
