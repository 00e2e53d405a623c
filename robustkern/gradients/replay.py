"""Makes every pass of a step see what the first one saw."""

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

__all__ = ["RandomState", "Replay", "is_random"]


@dataclass(frozen=True)
class RandomState:
    """Of all generators that a layer may draw from: Python's, numpy's, torch's and the device's."""

    of_python: tuple[Any, ...]
    of_numpy: tuple[Any, ...]
    of_torch: tuple[Tensor, ...]

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """As they are; while a CUDA graph is captured the device's cannot be read."""
        states = [torch.get_rng_state()]
        if device.type != "cpu" and not _captured(device):
            states.append(torch.get_device_module(device).get_rng_state(device))
        of_numpy: Any = numpy.random.get_state()  # noqa: NPY002 - which layers use is not ours
        return cls(random.getstate(), of_numpy, tuple(states))

    def restore(self, device: torch.device) -> None:
        """Make them so again."""
        random.setstate(self.of_python)
        numpy.random.set_state(self.of_numpy)  # noqa: NPY002
        torch.set_rng_state(self.of_torch[0])
        for state in self.of_torch[1:]:
            torch.get_device_module(device).set_rng_state(state, device)

    def equals(self, other: "RandomState") -> bool:
        """Whether nothing was drawn in between."""
        name, keys, *rest = self.of_numpy
        other_name, other_keys, *other_rest = other.of_numpy
        return (
            self.of_python == other.of_python
            and (name, rest) == (other_name, other_rest)
            and bool((keys == other_keys).all())
            and all(map(torch.equal, self.of_torch, other.of_torch))
        )


class Replay:
    """The random state and the buffers of modules, taken back before each pass.

    Running statistics move once, and a buffer that enters the computation (spectral norm's) is the
    same in all passes.

    Args:
        caller: whose name an error has.
        modules: all whose buffers are meant, each on its own; none of a penalty that a model holds.
        device: the passes'.

    Raises:
        RuntimeError: while a CUDA graph is captured, for modules that draw random numbers.
    """

    def __init__(self, caller: str, modules: list[nn.Module], device: torch.device) -> None:
        self._device = device
        if _captured(device) and any(is_random(module) for module in modules):
            raise RuntimeError(
                f"{caller}: passes captured in a CUDA graph cannot share random numbers; "
                "model must have no dropout in training mode"
            )
        self._modules = modules if any(module.training for module in modules) else []
        self._buffers_before = self._buffers_after = self._buffers()
        self._random_before = self._random_after = RandomState.now(device)
        # CuDNN's dropout begins anew where the state is set: so must the first pass's.
        self._set([], self._random_before)

    def mark_buffers(self) -> None:
        """These buffers are the ones to leave."""
        self._buffers_after = self._buffers()

    def mark_random(self) -> None:
        """This random state is the one to leave."""
        self._random_after = RandomState.now(self._device)

    def rewind(self) -> None:
        """Back to the state before the first pass."""
        self._set(self._buffers_before, self._random_before)

    def settle(self) -> None:
        """On to the state that was marked."""
        self._set(self._buffers_after, self._random_after)

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """Each buffer's place, the tensor that is there, and a copy of its values."""
        return [
            (module, name, buffer, buffer.clone())
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _set(
        self, buffers: list[tuple[nn.Module, str, Tensor, Tensor]], state: RandomState
    ) -> None:
        for module, name, buffer, value in buffers:
            if 0 not in buffer.stride():  # an expanded one cannot have been written to
                # .data: a graph of the caller's may have saved the buffer, and gets its value back.
                buffer.data.copy_(value)
            module._buffers[name] = buffer
        state.restore(self._device)


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_random(module: nn.Module) -> bool:
    """Whether one of torch's layers draws random numbers in its forward."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.training and module.dropout > 0
    return False
