"""||g_i||_p per sample, p in {1, 2, inf}, and its derivative (0 where g is 0)."""

import torch
from torch import Tensor

from robustkern.reference.samples import per_sample, sample_sum, widen


def gradient_norm(gradient: Tensor, p: float) -> Tensor:
    """The (N,) norms, in the accumulation dtype."""
    g = widen(gradient)
    if g.numel() == 0:
        return g.new_zeros(g.shape[0])
    norm: Tensor = torch.linalg.vector_norm(g.flatten(1), p, dim=1)
    return norm


def gradient_norm_backward(grad: Tensor, gradient: Tensor, norm: Tensor, p: float) -> Tensor:
    """grad_i times d||g_i||_p / dg_i; at p = inf the largest elements share it evenly."""
    direction = norm_direction(gradient, norm, p)
    return (per_sample(grad, direction) * direction).to(gradient.dtype).contiguous()


def norm_direction(gradient: Tensor, norm: Tensor, p: float) -> Tensor:
    """The norm's subgradient of least length: g/||g||, sign(g), or sign(g) at the maximum."""
    g = widen(gradient)
    if p == 2:
        return g / per_sample(torch.where(norm > 0, norm, torch.inf), g)
    if p == 1:
        return g.sign()
    largest = (g.abs() == per_sample(norm, g)) & (g != 0)
    return g.sign() * largest / per_sample(sample_sum(largest.to(g.dtype)).clamp_min(1), g)
