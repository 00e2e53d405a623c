"""The whole covariance matrix of perturbations (Roth et al. 2018, Eq. 15)."""

import math

import torch
from torch import Tensor

from robustkern.covariance.running import RunningAverage, check_size
from robustkern.reference.samples import sample_sum, widen


class FullCovariance(RunningAverage):
    """The whole covariance matrix of perturbations, for inputs of low dimension (Eq. 15).

    `values` is (D, D) float32, over samples flattened in row-major order.

    Args:
        dim: D, numbers in one sample.
        decay: share of the newest update (Eq. 14).

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a dim below 1, or a decay outside (0, 1].
    """

    def __init__(self, dim: int, decay: float = 0.1) -> None:
        check_size("FullCovariance", "dim", dim)
        super().__init__((dim, dim), decay)
        self.dim = dim

    @torch.no_grad()
    def update(self, perturbation: Tensor, *, strict: bool = True) -> None:
        r"""Move the running values towards the second moment of a batch, over all ranks.

        Args:
            perturbation: (N, \*D), floating, N at least 1. Ranks may have different N.
            strict: refuse a batch that is not finite; see `CovarianceFunction.update`.

        Raises:
            ValueError: for another number of elements, or a batch that is not finite; the running
                values are then as they were.
        """
        rows = self._rows("update", "perturbation", perturbation)
        if not len(rows):
            raise ValueError("FullCovariance.update: perturbation must not be empty, got N = 0")
        with torch.autocast(rows.device.type, enabled=False):
            moment = rows.T @ rows / len(rows)
        self._average(self.values, moment, len(rows), strict)

    def product(self, gradient: Tensor) -> Tensor:
        r""":math:`\Sigma g`, in the shape and dtype of `gradient` (N, \*D); differentiable.

        Args:
            gradient: (N, \*D), floating.

        Returns:
            (N, \*D).

        Raises:
            ValueError: for another number of elements, or before the first update.
        """
        rows = self._rows("product", "gradient", gradient)
        self._check_written("product")
        product = self._times(rows)
        return product.reshape(gradient.shape).to(gradient.dtype)

    def form(self, gradient: Tensor) -> Tensor:
        r""":math:`g_i^\top \Sigma g_i`, (N,), in the accumulation dtype; differentiable.

        Args:
            gradient: (N, \*D), floating.

        Returns:
            (N,).

        Raises:
            ValueError: for another number of elements, or before the first update.
        """
        rows = self._rows("form", "gradient", gradient)
        self._check_written("form")
        return sample_sum(rows * self._times(rows))

    def _times(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            product: Tensor = rows @ self._values_for(rows).T
        return product

    def dense(self) -> Tensor:
        """A copy of the matrix, (D, D)."""
        return self.values.clone()

    def _rows(self, method: str, argument: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"FullCovariance.{method}: {argument} must be a Tensor, got {type(tensor).__name__}"
            )
        if tensor.dim() < 2 or math.prod(tensor.shape[1:]) != self.dim:
            raise ValueError(
                f"FullCovariance.{method}: {argument} must be (N, *D) with {self.dim} numbers in "
                f"one sample, got {tuple(tensor.shape)}"
            )
        if tensor.device != self.values.device:
            raise ValueError(
                f"FullCovariance.{method}: {argument} must be on the covariance's device, "
                f"got {tensor.device} and {self.values.device}"
            )
        return widen(tensor).flatten(1)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.dim}, decay={self.decay}"
