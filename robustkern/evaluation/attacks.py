"""L-infinity attacks on classifiers whose inputs are pixels scaled to [0, 1].

An attack returns adversarial inputs and leaves everything else as it found it: training mode of
every module, `.grad`, `requires_grad` and the global random state, also when the model raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in eval mode; give every module its mode back, and torch its random state.

    Args:
        model: the network; a module that was frozen in eval mode stays so.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
        >>> with evaluating(model):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {
        parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"
    }
    kind = (
        next(iter(devices)).type if devices else "cuda"
    )  # fork_rng wants one; the CPU's state it always keeps
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    loss_fn: LossFunction = F.cross_entropy,
) -> Tensor:
    r"""Fast gradient sign method: x + eps sign(dl/dx), clipped to [0, 1] (Goodfellow et al. 2015).

    Args:
        model: maps inputs to outputs that `loss_fn` takes; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: the labels that the attack moves away from, as `loss_fn` takes them; (N,) int64 by
            default.
        eps: largest change of an input element, in input units.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the batch.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], `targets` of another length, or a negative or
            non-finite `eps`.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> fgsm(model, torch.tensor([[0.5], [0.95]]), torch.tensor([0, 0]), eps=0.1)
        tensor([[0.6000],
                [1.0000]])
    """
    _check("fgsm", model, inputs, targets, eps)
    inputs = inputs.detach()
    with evaluating(model):
        return _ascend("fgsm", model, inputs, inputs, targets, eps, eps, loss_fn)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss_fn: LossFunction = F.cross_entropy,
) -> Tensor:
    r"""Projected gradient descent in the L-infinity ball around `inputs` (Madry et al. 2018).

    Each step moves every element by `step_size` along the sign of the loss gradient and projects
    onto the ball and onto [0, 1]. The last iterate is returned.

    Args:
        model: maps inputs to outputs that `loss_fn` takes; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: the labels that the attack moves away from, as `loss_fn` takes them; (N,) int64 by
            default.
        eps: radius of the ball, in input units.
        steps: number of gradient steps; PGD-20 by default.
        step_size: length of a step in input units; 2.5 eps / steps when None, so that the ball can
            be crossed.
        random_start: begin at a uniform draw from the ball, not at `inputs`.
        generator: source of the random start, on the device of `inputs`; when None, a new one with
            seed 0, so that two calls give the same result.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the batch.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], `targets` of another length, a negative or non-finite
            `eps`, a `step_size` that is not positive and finite, or `steps` below 1.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> pgd(model, torch.tensor([[0.5], [0.95]]), torch.tensor([0, 0]), eps=0.1)
        tensor([[0.6000],
                [1.0000]])
    """
    _check("pgd", model, inputs, targets, eps)
    if steps < 1:
        raise ValueError(f"pgd: steps must be at least 1, got {steps}")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"pgd: step_size must be positive and finite, got {step_size}")
    inputs = inputs.detach()
    length = 2.5 * eps / steps if step_size is None else step_size
    adversarial = inputs.clone()
    if random_start:
        if generator is None:
            generator = torch.Generator(inputs.device).manual_seed(0)
        noise = torch.rand(
            inputs.shape, generator=generator, device=inputs.device, dtype=torch.float64
        )
        adversarial = (inputs + eps * (2 * noise - 1).to(inputs.dtype)).clamp(0, 1)
    with evaluating(model):
        for _ in range(steps):
            adversarial = _ascend("pgd", model, inputs, adversarial, targets, eps, length, loss_fn)
    return adversarial


def _ascend(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    targets: Tensor,
    eps: float,
    length: float,
    loss_fn: LossFunction,
) -> Tensor:
    """One signed step of `length`, projected onto the eps-ball around `inputs` and [0, 1]."""
    if inputs.numel() == 0:
        return adversarial.clone()
    with torch.inference_mode(False), torch.enable_grad():
        point = adversarial.clone().requires_grad_()
        outputs = model(point)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{name}: model must return a tensor, got {type(outputs).__name__}")
        # The batch mean would shrink each gradient by N: undone, so that it does not underflow.
        loss = loss_fn(outputs, targets.clone()) * len(inputs)
        (gradient,) = torch.autograd.grad(loss, point)
    moved = adversarial + length * gradient.sign()
    return torch.maximum(torch.minimum(moved, inputs + eps), inputs - eps).clamp(0, 1)


def _check(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, eps: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        came = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"{name}: inputs must be a floating-point tensor, got {came}")
    if inputs.dim() < 1 or targets.dim() < 1 or len(inputs) != len(targets):
        raise ValueError(
            f"{name}: targets must have inputs' length, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{name}: eps must be finite and not negative, got {eps}")
    if inputs.numel():
        low, high = (bound.item() for bound in inputs.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: inputs must lie in [0, 1], got values from {low:g} to {high:g}"
            )
