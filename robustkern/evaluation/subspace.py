"""The nearest adversarial input within a random subspace (Fawzi et al. 2016), by DeepFool.

On a boundary that is flat, its distance is about sqrt(D / dim) times that to the nearest of all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.evaluation.attacks import _attack_standing, _check
from robustkern.evaluation.balls import precise
from robustkern.evaluation.minimal import (
    _broken,
    _Cast,
    _check_search,
    _frozen,
    _library,
    _search,
    _where,
)


def subspace_deepfool(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    dim: int,
    *,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Minimizes \|\|r\|\|_2 over r in S such that x + r is misclassified, S a random subspace.

    Args:
        model: maps inputs to (N, classes); attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        dim: of S, which is the same for the whole batch: the span of as many Gaussian vectors.
        steps: at most; each costs `candidates` - 1 passes back and forth.
        candidates: classes, the likeliest first, to which a sample may move.
        overshoot: how far beyond the boundary, as a share of the way to it.
        generator: source of S, on the device of `inputs`; when None, a new one with seed 0, so that
            two calls give the same result.

    Returns:
        x + r of the shape, dtype and device of `inputs`, detached, clipped to [0, 1], by which r
        may leave S. A sample that is misclassified already is left as it is, and so is one of which
        no adversarial input is found.

    Raises:
        ImportError: foolbox is missing.
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], targets or outputs that are no labels and classes, a
            `dim` that is not from 1 to an input's number of elements, `steps` below 1, or
            `candidates` below 2.
    """
    _check_search("subspace_deepfool", steps, candidates)
    _check("subspace_deepfool", model, inputs, targets, 0.0)
    size = math.prod(inputs.shape[1:])
    if not 1 <= dim <= size:
        raise ValueError(f"subspace_deepfool: dim must be from 1 to {size}, got {dim}")
    foolbox = _library("subspace_deepfool", "foolbox")

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        source = generator or torch.Generator(x.device).manual_seed(0)
        vectors = torch.randn(size, dim, generator=source, device=x.device, dtype=torch.float64)
        center = precise(x)
        within = _Within(_Cast(model, x.dtype), center, torch.linalg.qr(vectors).Q.to(center))
        # foolbox differentiates by `backward`, which would fill the parameters' `.grad`.
        with _frozen(model), torch.enable_grad():
            attacked = foolbox.PyTorchModel(
                within, bounds=(-(size**0.5), size**0.5), device=x.device
            )
            start = center.new_zeros(len(x), dim)
            place: Any = _search(foolbox, 2, steps, candidates, overshoot).run(
                attacked, start, labels
            )
        found = within.points(place.detach()).to(x.dtype)
        return _where(_broken(model, found, labels), found, x)

    return _attack_standing("subspace_deepfool", model, inputs, targets, attack)


class _Within(nn.Module):
    """The network as a function of coordinates (N, dim) in the subspace around `inputs`."""

    def __init__(self, model: nn.Module, inputs: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.model, self.inputs, self.basis = model, inputs, basis
        self.eval()

    def points(self, place: Tensor) -> Tensor:
        return (self.inputs + (place @ self.basis.T).view_as(self.inputs)).clamp(0, 1)

    def forward(self, place: Tensor) -> Tensor:
        outputs: Tensor = self.model(self.points(place))
        return outputs
