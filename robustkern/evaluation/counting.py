"""What training and attacks cost, whatever the machine: passes through the network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
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


@dataclass
class Cost:
    """Passes through networks, of all samples or of each, and the time that they took."""

    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.forward, -other.backward, -other.seconds)

    def per(self, samples: int) -> Cost:
        """The passes of each sample; the time remains that of all."""
        return Cost(self.forward / samples, self.backward / samples, self.seconds)


@contextmanager
def metered(models: Iterable[nn.Module]) -> Iterator[Cost]:
    """Take the cost of what is done with some models.

    Args:
        models: as `counted` takes them, each of them once.

    Yields:
        The cost, which is known at the end.
    """
    cost, start = Cost(), time.perf_counter()
    with ExitStack() as stack:
        counts = [stack.enter_context(counted(model)) for model in models]
        yield cost
    cost.forward = sum(passes.forward for passes in counts)
    cost.backward = sum(passes.backward for passes in counts)
    cost.seconds = time.perf_counter() - start
