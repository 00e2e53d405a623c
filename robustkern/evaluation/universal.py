"""Universal perturbations (Moosavi-Dezfooli et al. 2017): one for all inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation.attacks import (
    _check,
    _check_counts,
    _check_norm,
    _check_positive,
    _standing,
)
from robustkern.evaluation.balls import precise, project, rounded, steepest
from robustkern.gradients.modes import evaluating


def universal(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    epochs: int = 10,
    batch_size: int = 128,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    r"""One v, \|\|v\|\|_p <= eps, such that the network errs on (inputs + v).clamp(0, 1).

    Steepest ascent, batch by batch, of the cross entropy summed over the samples that v does not
    fool yet; the others have no say.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1], on the model's device.
        targets: (N,) int64: the true labels, or the predicted ones to raise the rate at which v
            changes them.
        eps: radius of the ball, in input units.
        p: norm of the ball: 1, 2 or inf.
        epochs: over the inputs; each costs N samples a pass back and forth, and another one forth.
        batch_size: samples per step.
        step_size: length of a step in input units; eps / 5 when None.
        generator: source of the batches' order, on the device of `inputs`; when None, a new one
            with seed 0, so that two calls give the same result.
        advance: called with the number of samples after each batch; in all N `epochs` samples.

    Returns:
        v of the shape \*D and the dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: no samples, `inputs` outside [0, 1], targets or outputs that are no labels and
            classes, a negative or non-finite `eps`, another `p`, `epochs` or `batch_size` below 1,
            or a `step_size` that is not positive and finite.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(model.bias), nn.init.eye_(model.weight)
        >>> inputs, targets = torch.tensor([[0.6, 0.5], [0.7, 0.5]]), torch.tensor([0, 0])
        >>> universal(model, inputs, targets, eps=0.2)
        tensor([-0.1200,  0.1200])
    """
    _check("universal", model, inputs, targets, eps)
    _check_norm("universal", p)
    if inputs.numel() == 0:
        raise ValueError(
            f"universal: inputs must hold at least one sample, got shape {tuple(inputs.shape)}"
        )
    _check_counts("universal", epochs=epochs, batch_size=batch_size)
    if step_size is not None:
        _check_positive("universal", step_size=step_size)
    length = eps / 5 if step_size is None else step_size
    if generator is None:
        generator = torch.Generator(inputs.device).manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        inputs, targets = inputs.detach().clone(), targets.detach().clone()
        center = torch.zeros_like(precise(inputs[:1]))
        shared = center
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=generator, device=inputs.device)
            for picked in torch.split(order, batch_size):
                moved = (inputs[picked] + shared).clamp(0, 1).to(inputs.dtype)
                standing = _standing("universal", model, moved, targets[picked])
                if len(standing):
                    gradient = _gradient(model, moved[standing], targets[picked][standing])
                    shared = project(shared + length * steepest(gradient, p), center, eps, p)
                if advance is not None:
                    advance(len(picked))
        return rounded(shared, torch.zeros_like(inputs[:1]), eps, p)[0]


def _gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of the sum over the samples with respect to what all of them have in common: (1, *D)."""
    with torch.enable_grad():
        inputs.requires_grad_()
        loss = F.cross_entropy(model(inputs), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    return precise(gradient).sum(0, keepdim=True)
