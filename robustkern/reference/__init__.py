"""The equations in plain PyTorch: test oracle, benchmark baseline and fallback at once."""

from robustkern.reference.autocovariance import autocovariance, pair_counts
from robustkern.reference.covariance_form import covariance_form
from robustkern.reference.covariance_product import covariance_product, transpose_covariance
from robustkern.reference.cure import authors_cure_backward
from robustkern.reference.gradient_difference import (
    gradient_difference,
    gradient_difference_backward,
)
from robustkern.reference.gradient_norm import (
    gradient_norm,
    gradient_norm_backward,
    norm_direction,
)
from robustkern.reference.perturb import perturb

__all__ = [
    "authors_cure_backward",
    "autocovariance",
    "covariance_form",
    "covariance_product",
    "gradient_difference",
    "gradient_difference_backward",
    "gradient_norm",
    "gradient_norm_backward",
    "norm_direction",
    "pair_counts",
    "perturb",
    "transpose_covariance",
]
