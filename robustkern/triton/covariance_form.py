"""covariance_form: g_i^T Sigma g_i, without the product in memory."""

from torch import Tensor

from robustkern.reference.samples import accumulation_dtype
from robustkern.triton._algorithm import multiply


def covariance_form(gradient: Tensor, covariance: Tensor) -> Tensor:
    """(N,), in the accumulation dtype."""
    if gradient.shape[0] == 0:
        return gradient.new_empty((0,), dtype=accumulation_dtype(gradient))
    return multiply(gradient, covariance, form=True)
