"""Samples and the networks that take each on its own: checks, and vectors of unit length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkern.gradients.replay import is_random

__all__ = ["check_count", "check_inputs", "check_network", "check_rows", "normalized"]


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


def check_network(caller: str, model: nn.Module) -> None:
    """Refuse layers that mix the samples of a batch, or draw random numbers.

    Args:
        caller: whose name the error has.
        model: the network, in the modes that it is used in.

    Raises:
        ValueError: naming the layer.
    """
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


def check_inputs(caller: str, model: nn.Module, inputs: Tensor) -> None:
    """Refuse what is no network or no samples.

    Args:
        caller: whose name the error has.
        model: the network.
        inputs: (N, *D).

    Raises:
        TypeError: for another type or dtype.
        ValueError: for no samples, or values that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a Module, got {type(model).__name__}")
    check_rows(caller, "inputs", inputs)
    if not inputs.isfinite().all():
        raise ValueError(f"{caller}: inputs must be finite, got infinite values or NaN")


def check_count(caller: str, argument: str, value: int) -> None:
    """Refuse what is no int of at least 1.

    Args:
        caller: whose name the error has.
        argument: the argument's name.
        value: what came.

    Raises:
        TypeError: it is no int.
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {argument} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{caller}: {argument} must be at least 1, got {value}")


def check_rows(caller: str, argument: str, rows: Tensor) -> None:
    """Refuse what has no row for each sample.

    Args:
        caller: whose name the error has.
        argument: the argument's name.
        rows: (N, *D) floating point.

    Raises:
        TypeError: for another type or dtype.
        ValueError: for no samples, or samples without elements.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        came = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{caller}: {argument} must be a floating-point tensor, got {came}")
    if rows.dim() < 2 or not rows.numel():
        raise ValueError(
            f"{caller}: {argument} must be (N, *D) with at least one sample, "
            f"got {tuple(rows.shape)}"
        )
