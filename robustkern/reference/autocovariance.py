"""The covariance of perturbations over pixel displacements (Roth et al. 2018, Eq. 16)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustkern.reference.samples import widen


def autocovariance(perturbation: Tensor, unbiased: bool = True) -> Tensor:
    """K[c, c', d] = mean over samples of the mean over pixels i of p_c(i) p_c'(i + d)."""
    p = widen(perturbation).transpose(0, 1)
    samples, height, width = p.shape[1:]
    sums = F.conv2d(p, p, padding=(height - 1, width - 1)).transpose(0, 1)
    pairs = pair_counts(p) if unbiased else height * width
    return (sums / (max(samples, 1) * pairs)).contiguous()


def pair_counts(images: Tensor) -> Tensor:
    """How many pixel pairs of an (.., H, W) image lie at each displacement: (2H-1, 2W-1)."""
    height, width = images.shape[-2:]
    y = height - torch.arange(1 - height, height, device=images.device).abs()
    x = width - torch.arange(1 - width, width, device=images.device).abs()
    return torch.outer(y, x).to(images.dtype)
