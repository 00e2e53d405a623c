"""x + length z, with z the unit vector of sign(g) or of g (Moosavi-Dezfooli et al. 2019)."""

import torch
from torch import Tensor

from robustkern.reference.samples import per_sample, sample_sum, widen


def perturb(inputs: Tensor, gradient: Tensor, length: float, direction: str = "sign") -> Tensor:
    """Each input moved by an L2 distance of `length`; where the gradient is zero, not at all."""
    z = widen(gradient.detach())
    if direction == "sign":
        z = z.sign()
    elif z.numel():
        # Scaled to a maximum of one first, so that the squares neither overflow nor vanish.
        largest = z.flatten(1).abs().amax(1)
        z = z / per_sample(torch.where(largest > 0, largest, 1), z)
    norm = sample_sum(z * z).sqrt()
    scale = torch.where(norm > 0, length / norm, 0)
    return (widen(inputs) + per_sample(scale, z) * z).to(inputs.dtype).contiguous()
