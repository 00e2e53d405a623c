"""Balls of the norms 1, 2 and inf around each sample of (N, *D): steps, projections and draws.

Attacks move `precise` points, for in half precision a short step is rounded away, and show the
network and return what these are when `rounded`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor


def steepest(gradient: Tensor, p: float) -> Tensor:
    """The step of length 1 along which a linear function rises the most; 0 for a gradient of 0."""
    if p == math.inf:
        return gradient.sign()
    flat = _flat(gradient).nan_to_num()
    if p == 1:
        # The best is of one element; moving the largest 1% takes fewer steps (Tramer, Boneh 2019).
        count = (flat.shape[1] - 1) // 100 + 1
        smallest = flat.abs().topk(count).values[:, -1:]
        flat = flat.sign() * (flat.abs() >= smallest)
    return _unit(flat, p).to(gradient.dtype).view_as(gradient)


def precise(x: Tensor) -> Tensor:
    """In float32, or as it is where that is better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(points: Tensor, centers: Tensor, eps: float, p: float) -> Tensor:
    """`points` in the dtype of `centers`; those that this takes out of the ball, toward these."""
    if points.dtype == centers.dtype:
        return points
    found = points.to(centers.dtype)
    farther = (precise(found) - centers).abs() > (points - centers).abs()
    outside = (distances(found, centers, p) > eps).view(-1, *[1] * (points.dim() - 1))
    return torch.where(farther & outside, found.nextafter(centers), found)


def distances(points: Tensor, centers: Tensor, p: float) -> Tensor:
    """Norms of the differences: (N,), float32 or better."""
    lengths: Tensor = torch.linalg.vector_norm(_flat(precise(points) - centers), p, dim=1)
    return lengths


def project(points: Tensor, centers: Tensor, eps: float, p: float) -> Tensor:
    """The nearest points, in L2, of the balls of radius `eps` around `centers`; `precise`."""
    points, centers = precise(points), precise(centers)
    if p == math.inf:
        return torch.maximum(torch.minimum(points, centers + eps), centers - eps)
    offset = _flat(points - centers)
    if p == 2:
        length = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        offset = offset * (eps / length.clamp(min=eps)) if eps > 0 else offset * 0
    else:
        # Duchi et al. 2008: every element shrinks by the same amount, down to 0.
        largest = offset.abs().sort(dim=1, descending=True).values
        excess = largest.cumsum(1) - eps
        rank = torch.arange(1, offset.shape[1] + 1, device=offset.device)
        moving = (largest * rank > excess).sum(1, keepdim=True).clamp(min=1)
        shrink = (excess.gather(1, moving - 1) / moving).clamp(min=0)
        offset = offset.sign() * (offset.abs() - shrink).clamp(min=0)
    return centers + offset.view_as(centers)


def draw(like: Tensor, eps: float, p: float, generator: torch.Generator) -> Tensor:
    """One uniform draw from the ball of radius `eps` around 0 for each sample of `like`."""
    count, size = len(like), math.prod(like.shape[1:])
    normal, uniform = (
        partial(kind, generator=generator, device=like.device, dtype=torch.float64)
        for kind in (torch.randn, torch.rand)
    )
    if p == math.inf:
        noise = 2 * uniform(like.shape) - 1
    elif p == 2:  # a uniform point of the sphere in two dimensions more, without these two
        noise = _unit(normal((count, size + 2)), 2)[:, :size]
    else:  # spacings of a Poisson process, without the last one
        spacings = -torch.log1p(-uniform((count, size + 1)))
        noise = normal((count, size)).sign() * _unit(spacings, 1)[:, :size]
    return eps * noise.view(like.shape).to(like.dtype)


def _unit(flat: Tensor, p: float) -> Tensor:
    # By the largest element first: else the squares of a confident network's gradient underflow.
    for norm in (math.inf, p):
        length = torch.linalg.vector_norm(flat, norm, dim=1, keepdim=True)
        flat = flat / length.masked_fill(length == 0, 1)
    return flat


def _flat(x: Tensor) -> Tensor:
    return precise(x.reshape(len(x), math.prod(x.shape[1:])))
