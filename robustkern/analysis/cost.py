"""What a step with a penalty costs beside a plain one: passes, time, memory."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.analysis.trial import Trial, eager

__all__ = ["Passes", "memory", "seconds"]

_ROUNDS = 5


@dataclass
class Passes:
    """The forward and backward passes of a network, in a context that runs eagerly."""

    trial: Trial
    forward: int = 0
    backward: int = 0

    def __enter__(self) -> "Passes":
        self._handle = self.trial.model.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _count(self, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        self.forward += 1
        logits = self.trial.logits(outputs)
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += 1


def seconds(trial: Trial, shift: float | str) -> tuple[float, float]:
    """Median time of a step with the penalty and of a plain one, taken in turns."""
    steps: list[Callable[[], object]] = [lambda: trial.penalized(shift), trial.plain]
    times: list[list[float]] = [[], []]
    parameters, device = list(trial.parameters().values()), trial.device()
    with trial.untouched():
        for _ in range(_ROUNDS):
            for step, taken in zip(steps, times, strict=True):
                for parameter in parameters:
                    parameter.grad = None
                _wait(device)
                start = time.perf_counter()
                step()
                _wait(device)
                taken.append(time.perf_counter() - start)
    penalized, plain = map(statistics.median, times)
    return penalized, plain


def memory(trial: Trial, step: Callable[[], object]) -> int:
    """Peak bytes of a step: allocated on a CUDA device, elsewhere saved for backward."""
    with trial.untouched():
        if trial.device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(trial.device())
            before = torch.cuda.memory_allocated(trial.device())
            step()
            return torch.cuda.max_memory_allocated(trial.device()) - before
        saved = _Saved()
        with eager(), torch.autograd.graph.saved_tensors_hooks(saved.pack, _Held.unpack):
            step()
        return saved.peak


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


class _Saved:
    """The bytes that autograd keeps."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(self, tensor)


class _Held:
    def __init__(self, saved: _Saved, tensor: Tensor) -> None:
        self.saved, self.tensor, self.bytes = saved, tensor.detach(), tensor.nbytes
        saved.now += self.bytes
        saved.peak = max(saved.peak, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.bytes

    def unpack(self) -> Tensor:
        return self.tensor
