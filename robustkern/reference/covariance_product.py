"""Sigma g, the block-Toeplitz product over pixel displacements."""

from torch import Tensor
from torch.nn import functional as F

from robustkern.reference.samples import widen


def covariance_product(gradient: Tensor, covariance: Tensor) -> Tensor:
    """(Sigma g)[c, i] = sum over c', j of K[c, c', j - i] g[c', j]."""
    reach = (covariance.shape[2] // 2, covariance.shape[3] // 2)
    product = F.conv2d(widen(gradient), widen(covariance), padding=reach)
    return product.to(gradient.dtype).contiguous()


def transpose_covariance(covariance: Tensor) -> Tensor:
    """The array of Sigma^T: K[c', c, -d]. Sigma is symmetric exactly when this changes nothing."""
    return covariance.transpose(0, 1).flip(2, 3)
