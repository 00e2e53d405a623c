"""g_i^T Sigma g_i per sample (Roth et al. 2018, Eq. 11 without its factor)."""

from torch import Tensor

from robustkern.reference.covariance_product import covariance_product
from robustkern.reference.samples import sample_sum, widen


def covariance_form(gradient: Tensor, covariance: Tensor) -> Tensor:
    """The (N,) quadratic forms, in the accumulation dtype."""
    g = widen(gradient)
    return sample_sum(g * covariance_product(g, covariance))
