"""What training costs, whatever the machine: passes through the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Passes:
    """How many samples went forward through a network, and how many gradients came back."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counted(model: nn.Module) -> Iterator[Passes]:
    """Count the passes of a model, those of attacks among them.

    A pass back counts as one whether it ends at the inputs or at the parameters.

    Args:
        model: called as model(inputs), returns a tensor.

    Yields:
        The counts, which rise as the model is used.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with counted(model) as passes:
        ...     model(torch.ones(3, 2)).sum().backward()
        >>> passes
        Passes(forward=3, backward=3)
    """
    passes = Passes()

    def count(model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        passes.forward += len(args[0])
        if isinstance(outputs, Tensor) and outputs.requires_grad:
            outputs.register_hook(count_backward)  # type: ignore[no-untyped-call]

    def count_backward(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    # A compiled model would take the hook for a part of itself.
    handle = model.register_forward_hook(
        torch.compiler.disable(count)  # type: ignore[no-untyped-call]
    )
    try:
        yield passes
    finally:
        handle.remove()
