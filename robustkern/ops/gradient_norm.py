"""gradient_norm: the p-norm of each sample's input gradient."""

from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, save_arguments
from robustkern.reference.samples import accumulation_dtype, per_sample, sample_sum, widen


def _fake(gradient: Tensor, p: float) -> Tensor:
    return gradient.new_empty(gradient.shape[:1], dtype=accumulation_dtype(gradient))


def _save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    gradient, ctx.p = arguments
    ctx.save_for_backward(gradient, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient, norm = ctx.saved_tensors
    return torch.ops.robustkern.gradient_norm_backward(grad, gradient, norm, ctx.p), None


def _backward_fake(grad: Tensor, gradient: Tensor, norm: Tensor, p: float) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _backward_save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    save_arguments(ctx, arguments, output)
    ctx.p = arguments[-1]


def _double_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, gradient, norm = ctx.saved_tensors
    v = widen(cotangent)
    along = sample_sum(v * reference.norm_direction(gradient, norm, ctx.p))
    if ctx.p != 2:  # piecewise linear
        return along, torch.zeros_like(gradient), torch.zeros_like(norm), None
    # d(grad g / n): the direction's other two factors, again 0 where n is 0.
    scale = grad / torch.where(norm > 0, norm, torch.inf)
    return along, (per_sample(scale, v) * v).to(gradient.dtype), -scale * along, None


define(
    "gradient_norm(Tensor gradient, float p) -> Tensor",
    reference.gradient_norm,
    _fake,
    _save,
    _backward,
)
define(
    "gradient_norm_backward(Tensor grad, Tensor gradient, Tensor norm, float p) -> Tensor",
    reference.gradient_norm_backward,
    _backward_fake,
    _backward_save,
    _double_backward,
)
