"""The mode of a network for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating"]


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
