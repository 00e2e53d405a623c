"""Running averages over batches and ranks (Roth et al. 2018, Eq. 14)."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from robustkern.gradients import ranks
from robustkern.reference.samples import widen

_Running = TypeVar("_Running", bound="RunningAverage")


class RunningAverage(nn.Module):
    """A moving average, in float32 whatever the model's dtype; the first update is taken whole."""

    values: Tensor
    updates: Tensor

    def __init__(self, shape: tuple[int, ...], decay: float) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(decay, bool) or not isinstance(decay, int | float):
            raise TypeError(f"{name}: decay must be a number, got {type(decay).__name__}")
        if not 0 < decay <= 1:
            raise ValueError(f"{name}: decay must be in (0, 1], got {decay!r}")
        self.decay = decay
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._written = False

    def _average(self, running: Tensor, estimate: Tensor, samples: int, strict: bool) -> None:
        """Move the running values towards the mean of all ranks' estimates."""
        estimate = estimate.to(running.dtype)
        if ranks.size() > 1:
            weighted = [estimate.flatten() * samples, estimate.new_full((1,), samples)]
            total = ranks.total(torch.cat(weighted))
            estimate = (total[:-1] / total[-1]).view_as(estimate)
        finite = estimate.isfinite().all()
        if strict and not finite:
            raise ValueError(
                f"{type(self).__name__}.update: perturbation must be finite, "
                f"got {samples} samples with NaN or infinity among them"
            )
        # All on the device: an update that is not strict waits for nothing.
        newest = torch.where(finite, estimate, running)
        share = torch.where(self.updates == 0, 1.0, self.decay).to(running.dtype)
        running.lerp_(newest, share)
        self.updates += finite
        self._written = True

    def _has_values(self) -> bool:
        """Whether anything was ever written; until then, this waits for the device."""
        if not self._written and not self.values.is_meta:
            self._written = bool((self.values != 0).any() | (self.updates > 0))
        return self._written or self.values.is_meta

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._written = False  # what is loaded may be a state before any update
        super()._load_from_state_dict(*args, **kwargs)

    def amplitude(self) -> Tensor | float:
        """By how much the noise is larger than the perturbations: see `standardize`."""
        return 1.0

    def _check_written(self, method: str) -> None:
        if not self._has_values():
            raise ValueError(
                f"{type(self).__name__}.{method}: the covariance must be updated first, "
                "got none so far"
            )

    def _values_for(self, gradient: Tensor) -> Tensor:
        # A graph keeps its own copy: the next update writes into the values.
        return self.values.to(widen(gradient).dtype, copy=gradient.requires_grad)

    def _apply(self: _Running, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Running:
        def moved(tensor: Tensor) -> Tensor:
            # Half a model's precision is not enough for an average: only the device is taken.
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class RunningMean(RunningAverage):
    """The mean of perturbations, (D,), that the uncentred SGR has besides (Eq. 12)."""

    def __init__(self, dim: int, decay: float) -> None:
        super().__init__((dim,), decay)

    @torch.no_grad()
    def update(self, perturbation: Tensor) -> None:
        """Move it towards the mean of a batch, over all ranks; one not finite is left out."""
        mean = widen(perturbation).flatten(1).mean(0)
        self._average(self.values, mean, len(perturbation), strict=False)


def check_size(function: str, argument: str, size: int) -> None:
    """A size: an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{function}: {argument} must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{function}: {argument} must be at least 1, got {size}")
