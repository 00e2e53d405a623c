"""autocovariance: the covariance of a batch of perturbations over pixel displacements."""

from typing import Any

from torch import Tensor

from robustkern import reference
from robustkern.ops._library import define, save_nothing
from robustkern.reference.samples import accumulation_dtype


def _fake(perturbation: Tensor, unbiased: bool = True) -> Tensor:
    channels, height, width = perturbation.shape[1:]
    return perturbation.new_empty(
        (channels, channels, 2 * height - 1, 2 * width - 1), dtype=accumulation_dtype(perturbation)
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError("robustkern::autocovariance is not differentiable")


define(
    "autocovariance(Tensor perturbation, bool unbiased=True) -> Tensor",
    reference.autocovariance,
    _fake,
    save_nothing,
    _backward,
)
