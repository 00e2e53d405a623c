"""Pictures of what a network looks at, and of what an attack made of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.samples import (
    by_batch,
    check_inputs,
    check_labels,
    check_like,
    check_targets,
    input_gradient,
    logits,
    outputs_at,
)

__all__ = ["PerturbedImages", "perturbed_images", "saliency"]


def saliency(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    of: str = "loss",
    batch_size: int = 256,
) -> Tensor:
    r"""Saliency maps (Simonyan et al. 2014): of each pixel the largest \|gradient\| of a channel.

    Those of a network trained for robustness show the object's outline, others look like noise.

    Args:
        model: maps (N, C, H, W) to (N, classes), logits; taken in eval mode.
        inputs: (N, C, H, W) floating point.
        targets: (N,) int64, labels, true or predicted.
        of: "loss", the gradient of the cross-entropy; or "logit", that of the label's logit, which
            does not vanish where the network is sure.
        batch_size: samples per pass; each costs one forward and one input gradient.

    Returns:
        (N, H, W), not negative, float32 or better, detached, on the device of `inputs`; per input
        unit.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point or `targets` not int64.
        ValueError: another `of`, inputs that are not (N, C, H, W) or not finite, `targets` of
            another shape or out of range, outputs that are not (N, classes), or `batch_size` below
            1.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.0] * 4]))
        >>> saliency(model, torch.rand(1, 1, 2, 2), torch.tensor([0]), of="logit")
        tensor([[[1., 2.],
                 [0., 3.]]])
    """
    caller = "saliency"
    if of not in ("loss", "logit"):
        raise ValueError(f'{caller}: of must be "loss" or "logit", got {of!r}')
    check_inputs(caller, model, inputs)
    _check_images(caller, inputs)
    check_targets(caller, targets, inputs)

    def measure(batch: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = logits(caller, model, batch.requires_grad_())
            check_labels(caller, labels, outputs)
            if of == "loss":
                # In float64, because of a confident network's 1 - p float32 leaves only rounding.
                scalar = F.cross_entropy(outputs.double(), labels, reduction="sum")
            else:
                scalar = outputs.gather(1, labels.unsqueeze(1)).sum()
            gradient = input_gradient(scalar, batch)
        return gradient.abs().amax(1).to(outputs.dtype)

    return by_batch(caller, model, measure, batch_size, inputs, targets)


@dataclass(frozen=True)
class PerturbedImages:
    """Images, what an attack made of them, and what a network says to both.

    Attributes:
        images: (N, C, H, W), pixels in [0, 1].
        adversarial: (N, C, H, W).
        predicted: (N,) int64, the class of each image.
        predicted_adversarial: (N,) int64, the class of each adversarial one.
        distances: (N,), L2 length of the perturbation, in input units.
    """

    images: Tensor
    adversarial: Tensor
    predicted: Tensor
    predicted_adversarial: Tensor
    distances: Tensor


def perturbed_images(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    adversarial: Mapping[str, Tensor],
    *,
    batch_size: int = 256,
) -> dict[str, PerturbedImages]:
    r"""Images beside their adversarial ones: Fig. 11 of Moosavi-Dezfooli et al. 2019 (CURE).

    Args:
        models: for each network's name a module that maps (N, C, H, W) to (N, classes); taken in
            eval mode.
        inputs: (N, C, H, W) floating point, a few images, pixels scaled to [0, 1].
        adversarial: for each network's name its own (N, C, H, W).
        batch_size: images per pass.

    Returns:
        For each network's name what the figure needs.

    Raises:
        TypeError: a model is no module, or a tensor not floating point.
        ValueError: names that differ or none, inputs that are not (N, C, H, W) or not finite,
            adversarial ones of another shape, outputs that are not (N, classes), or `batch_size`
            below 1.

    Example:
        >>> images = torch.tensor([0.75, 0.25]).view(1, 1, 1, 2)
        >>> moved = torch.tensor([0.25, 0.25 + 2**-10]).view(1, 1, 1, 2)
        >>> found = perturbed_images({"net": nn.Flatten()}, images, {"net": moved})["net"]
        >>> found.predicted, found.predicted_adversarial, found.distances
        (tensor([0]), tensor([1]), tensor([0.5000]))
    """
    caller = "perturbed_images"
    if not models or models.keys() != adversarial.keys():
        raise ValueError(
            f"{caller}: adversarial must have the names of models, at least one, "
            f"got {list(adversarial)} and {list(models)}"
        )
    for name, model in models.items():
        check_inputs(caller, model, inputs)
        _check_images(caller, inputs)
        check_like(caller, f"adversarial[{name!r}]", adversarial[name], inputs)

    def found(model: nn.Module, moved: Tensor) -> PerturbedImages:
        before, after = (outputs_at(caller, model, x, batch_size) for x in (inputs, moved))
        return PerturbedImages(
            images=inputs.detach().clone(),
            adversarial=moved.detach().clone(),
            predicted=before.argmax(1),
            predicted_adversarial=after.argmax(1),
            distances=(moved - inputs).detach().flatten(1).norm(dim=1),
        )

    return {name: found(model, adversarial[name]) for name, model in models.items()}


def _check_images(caller: str, inputs: Tensor) -> None:
    if inputs.dim() != 4:
        raise ValueError(f"{caller}: inputs must be (N, C, H, W), got {tuple(inputs.shape)}")
