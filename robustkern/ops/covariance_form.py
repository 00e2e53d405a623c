"""covariance_form: the quadratic form g^T Sigma g, per sample."""

from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, save_arguments, serve_by_triton
from robustkern.reference.samples import accumulation_dtype, per_sample


def _fake(gradient: Tensor, covariance: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape[:1], dtype=accumulation_dtype(gradient))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient, covariance = ctx.saved_tensors
    symmetrized = covariance + reference.transpose_covariance(covariance)
    product = torch.ops.robustkern.covariance_product(gradient, symmetrized)
    return (per_sample(grad, product) * product).to(gradient.dtype), None


define(
    "covariance_form(Tensor gradient, Tensor covariance) -> Tensor",
    reference.covariance_form,
    _fake,
    save_arguments,
    _backward,
)
serve_by_triton("covariance_form", "covariance_form")
