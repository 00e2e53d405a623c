"""Samples and the networks that take each on its own: outputs, gradients, and the checks of both.

`by_batch` runs a network in eval mode; its modes, `.grad` and the random state are left as they
were. Batches move to its device and dtype, results come back to the inputs' device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustkern.gradients.modes import evaluating
from robustkern.gradients.replay import RandomState, Replay, is_random

__all__ = [
    "applied",
    "by_batch",
    "check_count",
    "check_floating",
    "check_inputs",
    "check_labels",
    "check_length",
    "check_like",
    "check_network",
    "check_rows",
    "check_targets",
    "input_gradient",
    "logits",
    "normalized",
    "outputs_at",
    "repeatable",
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
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """What `measure` returns for each batch of inputs and labels, in a row."""
    check_count(caller, "batch_size", batch_size)
    example = next((p for p in model.parameters() if p.is_floating_point()), inputs)
    found = []
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            part = slice(start, start + batch_size)
            # Copies, for autograd cannot save what a caller's inference mode has made.
            batch = inputs[part].detach().clone().to(example)
            others = [each[part].clone().to(example.device) for each in labels]
            found.append(measure(batch, *others).detach().to(inputs.device))
            if advance is not None:
                advance(len(batch))
    return torch.cat(found)


def logits(caller: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's outputs for a batch, checked: (N, classes), float32 or better."""
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


def input_gradient(scalar: Tensor, inputs: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Zero where the scalar does not depend on the inputs, as behind a rounding."""
    if not scalar.requires_grad:
        return torch.zeros_like(inputs)
    (gradient,) = torch.autograd.grad(
        scalar, inputs, retain_graph=retain_graph, materialize_grads=True
    )
    return gradient


def applied(
    caller: str, argument: str, operator: Callable[[Tensor], Tensor], vectors: Tensor
) -> Tensor:
    """The product of an operator with a vector for each sample, checked and detached."""
    product = operator(vectors)
    if not isinstance(product, Tensor):
        raise TypeError(f"{caller}: {argument} must return a tensor, got {type(product).__name__}")
    if product.shape != vectors.shape:
        raise ValueError(
            f"{caller}: {argument} must return the shape it is given, {tuple(vectors.shape)}, "
            f"got {tuple(product.shape)}"
        )
    if not product.isfinite().all():
        raise ValueError(
            f"{caller}: {argument} must return finite products, got infinite ones or NaN"
        )
    return product.detach()


def normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths, (N, 1, ..); a vector of zeros stays one."""
    flat = vectors.flatten(1)
    # Squares of what is very long or short would leave the dtype's range.
    scale = flat.abs().amax(1, keepdim=True)
    flat = flat / scale.masked_fill(scale == 0, 1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / length.masked_fill(length == 0, 1)
    shape = (len(vectors), *[1] * (vectors.dim() - 1))
    return unit.view_as(vectors), (scale * length).view(shape)


def check_inputs(caller: str, model: nn.Module, inputs: Tensor) -> None:
    """Refuse what is no network, or no samples."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    check_rows(caller, "inputs", inputs)


def check_network(caller: str, model: nn.Module) -> None:
    """Refuse layers that mix the samples of a batch, or draw random numbers, in their modes."""
    for name, module in model.named_modules():
        layer = f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{caller}: model must treat each sample on its own, got {layer}, whose batch "
                "statistics make each loss depend on all samples: there is no Hessian of one "
                "sample; call model.eval()"
            )
        if is_random(module) or (isinstance(module, nn.RReLU) and module.training):
            raise ValueError(
                f"{caller}: model must be deterministic, got {layer} in training mode, which draws "
                "other random numbers at each gradient; call model.eval()"
            )


@contextmanager
def repeatable(caller: str, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Refuse a network of which the next pass is another one, and take back what this one moved.

    Functions that draw random numbers, and buffers that move in training mode, such as spectral
    norm's, are not seen before.

    Args:
        caller: whose name the error has.
        model: the network.
        device: where its pass, taken inside, draws.

    Yields:
        Nothing.

    Raises:
        ValueError: random numbers were drawn, or a buffer moved.
    """
    replay = Replay(caller, [*model.modules()], device)
    before = RandomState.now(device), _buffer_versions(model)
    yield
    if not before[0].equals(RandomState.now(device)) or before[1] != _buffer_versions(model):
        replay.rewind()
        raise ValueError(
            f"{caller}: model must be the same at each gradient, got one that draws random numbers "
            "or moves its buffers; call model.eval()"
        )


def _buffer_versions(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (id(buffer), buffer._version)
        for module in model.modules()
        if module.training
        for buffer in module.buffers(recurse=False)
        if not buffer.is_inference()  # they have none
    ]


def check_rows(caller: str, argument: str, rows: Tensor) -> None:
    """Refuse what is not (N, *D) with a row for each sample, finite."""
    check_floating(caller, argument, rows)
    if rows.dim() < 2 or not rows.numel():
        raise ValueError(
            f"{caller}: {argument} must be (N, *D) with at least one sample, "
            f"got {tuple(rows.shape)}"
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


def check_count(caller: str, argument: str, value: int, least: int = 1) -> None:
    """Refuse what is no int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {argument} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{caller}: {argument} must be at least {least}, got {value}")


def check_length(caller: str, argument: str, value: float) -> None:
    """Refuse what is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{caller}: {argument} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{caller}: {argument} must be positive and finite, got {value!r}")
