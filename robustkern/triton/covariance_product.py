"""covariance_product: Sigma g."""

import torch
from torch import Tensor

from robustkern.triton._algorithm import multiply


def covariance_product(gradient: Tensor, covariance: Tensor) -> Tensor:
    """(N, C, H, W), contiguous, in the gradient's dtype."""
    if gradient.shape[0] == 0:
        return torch.empty_like(gradient, memory_format=torch.contiguous_format)
    return multiply(gradient, covariance, form=False)
