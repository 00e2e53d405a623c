"""covariance_form: the quadratic form g^T Sigma g, per sample."""

from typing import Any

import torch
from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, serve_by_triton
from robustkern.reference.samples import accumulation_dtype, per_sample, widen


def _fake(gradient: Tensor, covariance: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape[:1], dtype=accumulation_dtype(gradient))


def _product(gradient: Tensor, covariance: Tensor) -> Tensor:
    """(Sigma + Sigma^T) g, in the accumulation dtype."""
    k = widen(covariance)
    symmetrized = k + reference.transpose_covariance(k)
    product: Tensor = torch.ops.robustkern.covariance_product(widen(gradient), symmetrized)
    return product


def _forward(gradient: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The form from the product that its derivative needs: one pass of transforms serves both."""
    product = _product(gradient, covariance)
    # In units of each sample's largest value: squares leave float32's range long before g does.
    largest = torch.ops.robustkern.gradient_norm(widen(gradient), torch.inf)
    unit = torch.where(largest > 0, largest, 1)
    terms = widen(gradient) / per_sample(unit, product) * product
    # By rows first: a sum to a single number would depend on the number of threads.
    return terms.sum(3).sum((1, 2)) * unit / 2, product


def _save(ctx: Any, arguments: tuple[Any, ...], made: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*arguments, made[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient, covariance, product = ctx.saved_tensors
    if torch.is_grad_enabled():  # this is differentiated in turn: the product depends on g
        product = _product(gradient, covariance)
    return (per_sample(grad, product) * product).to(gradient.dtype), None


define(
    "covariance_form(Tensor gradient, Tensor covariance) -> Tensor",
    reference.covariance_form,
    _fake,
    _save,
    _backward,
    _forward,
)
serve_by_triton("covariance_form", "covariance_form")
