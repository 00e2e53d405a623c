"""A classifier's outputs and input gradients at many points, and the checks they begin with.

The network runs in eval mode; its modes, `.grad` and the random state are left as they were.
Batches move to its device and dtype, results come back to the inputs' device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkern.gradients.modes import evaluating

__all__ = [
    "by_batch",
    "check_count",
    "check_floating",
    "check_inputs",
    "check_labels",
    "check_like",
    "check_targets",
    "input_gradient",
    "logits",
    "outputs_at",
]


def outputs_at(caller: str, model: nn.Module, points: Tensor, batch_size: int) -> Tensor:
    """Of (M, *D) the outputs (M, classes), float32 or better, detached."""
    return by_batch(caller, model, lambda batch: logits(caller, model, batch), batch_size, points)


def by_batch(
    caller: str,
    model: nn.Module,
    measure: Callable[..., Tensor],
    batch_size: int,
    inputs: Tensor,
    *labels: Tensor,
) -> Tensor:
    """What `measure` returns for each batch of inputs and labels, in a row."""
    check_count(caller, "batch_size", batch_size, 1)
    example = next(model.parameters(), inputs)
    found = []
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            part = slice(start, start + batch_size)
            # Copies, for autograd cannot save what a caller's inference mode has made.
            batch = inputs[part].detach().clone().to(example)
            others = [each[part].clone().to(example.device) for each in labels]
            found.append(measure(batch, *others).detach().to(inputs.device))
    return torch.cat(found)


def logits(caller: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs for a batch, checked."""
    outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{caller}: model must return a tensor, got {type(outputs).__name__}")
    if outputs.dim() != 2 or len(outputs) != len(inputs) or outputs.shape[1] < 2:
        raise ValueError(
            f"{caller}: model must return (N, classes) of at least two classes, "
            f"got {tuple(outputs.shape)} for {tuple(inputs.shape)}"
        )
    if not outputs.isfinite().all():
        raise ValueError(f"{caller}: model must return finite outputs, got infinite ones or NaN")
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def input_gradient(scalar: Tensor, inputs: Tensor) -> Tensor:
    """Zero where the scalar does not depend on the inputs, as behind a rounding."""
    if not scalar.requires_grad:
        return torch.zeros_like(inputs)
    (gradient,) = torch.autograd.grad(scalar, inputs, materialize_grads=True)
    return gradient


def check_inputs(caller: str, model: nn.Module, inputs: Tensor) -> None:
    """Refuse what is no network, or no samples."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_floating(caller, "inputs", inputs)
    if inputs.dim() < 2 or not inputs.numel():
        raise ValueError(
            f"{caller}: inputs must be (N, *D) with at least one sample, got {tuple(inputs.shape)}"
        )


def check_floating(caller: str, name: str, tensor: Tensor) -> None:
    """Refuse what is no floating-point tensor, or not finite."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{caller}: {name} must be a floating-point tensor, got {came}")
    if not tensor.isfinite().all():
        raise ValueError(f"{caller}: {name} must be finite, got infinite values or NaN")


def check_like(caller: str, name: str, tensor: Tensor, inputs: Tensor) -> None:
    """Refuse what does not lie beside the inputs, sample by sample."""
    check_floating(caller, name, tensor)
    if tensor.shape != inputs.shape or tensor.device != inputs.device:
        raise ValueError(
            f"{caller}: {name} must have inputs' shape and device, got {tuple(inputs.shape)} on "
            f"{inputs.device} and {tuple(tensor.shape)} on {tensor.device}"
        )


def check_targets(caller: str, targets: Tensor, inputs: Tensor) -> None:
    """Refuse what are no labels of the inputs; their range is `check_labels`'s."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{caller}: targets must be an int64 tensor, got {came}")
    if targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"{caller}: targets must be ({len(inputs)},), one for each input, "
            f"got {tuple(targets.shape)}"
        )


def check_labels(caller: str, labels: Tensor, outputs: Tensor) -> None:
    """Refuse labels that the model has no output for."""
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= outputs.shape[1]:
        raise ValueError(
            f"{caller}: targets must lie in [0, {outputs.shape[1]}), the model's classes, "
            f"got values from {low} to {high}"
        )


def check_count(caller: str, name: str, count: int, least: int) -> None:
    """Refuse a number that is too small."""
    if count < least:
        raise ValueError(f"{caller}: {name} must be at least {least}, got {count}")
