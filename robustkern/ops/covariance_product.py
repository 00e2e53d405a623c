"""covariance_product: Sigma g, with Sigma given by its values over pixel displacements."""

from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, serve_by_triton


def _fake(gradient: Tensor, covariance: Tensor) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def _save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(arguments[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (covariance,) = ctx.saved_tensors
    transposed = reference.transpose_covariance(covariance)
    return torch.ops.robustkern.covariance_product(grad, transposed), None


define(
    "covariance_product(Tensor gradient, Tensor covariance) -> Tensor",
    reference.covariance_product,
    _fake,
    _save,
    _backward,
)
serve_by_triton("covariance_product", "covariance_product")
