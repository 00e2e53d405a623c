"""The six ops of `torch.ops.robustkern`; importing a module defines its op."""

from robustkern.ops import (
    autocovariance,
    covariance_form,
    covariance_product,
    gradient_difference,
    gradient_norm,
    perturb,
)

__all__ = [
    "autocovariance",
    "covariance_form",
    "covariance_product",
    "gradient_difference",
    "gradient_norm",
    "perturb",
]
