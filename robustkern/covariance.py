"""Running covariances of perturbations: the state that SGR learns (Roth et al. 2018, Eq. 14-16)."""

import torch
from torch import Tensor, nn

from robustkern import functional
from robustkern.reference.samples import sample_sum, widen

__all__ = ["CovarianceFunction", "FullCovariance"]


class _RunningCovariance(nn.Module):
    """A moving average; the first update is taken whole, one that is not finite not at all."""

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
        self.register_buffer("values", torch.zeros(shape))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _average(self, estimate: Tensor) -> None:
        # All on the device, so that an update waits for nothing. An overflow, which a gradient
        # scaler handles, must not stay in the average.
        finite = estimate.isfinite().all()
        newest = torch.where(finite, estimate.to(self.values.dtype), self.values)
        share = torch.where(self.updates == 0, 1.0, self.decay).to(self.values.dtype)
        self.values.lerp_(newest, share)
        self.updates += finite

    def _values_for(self, gradient: Tensor) -> Tensor:
        # A graph keeps its own copy: the next update writes into the values.
        return self.values.to(widen(gradient).dtype, copy=gradient.requires_grad)


class CovarianceFunction(_RunningCovariance):
    r"""The covariance of image perturbations as a function of pixel displacement (Eq. 16).

    `values` is K, (C, C, 2H-1, 2W-1) float32, with displacement zero at [H-1, W-1]. It stands for
    the (CHW, CHW) matrix :math:`\Sigma[(c,i),(c',j)] = K[c, c', j-i]`.

    Args:
        channels: C.
        height: H, in pixels.
        width: W, in pixels.
        decay: share of the newest update: values <- (1 - decay) values + decay newest (Eq. 14).
        unbiased: see `functional.autocovariance`.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a size below 1, or a decay outside (0, 1].

    Example:
        >>> import torch, robustkern
        >>> covariance = robustkern.CovarianceFunction(3, 8, 8)
        >>> covariance.update(torch.randn(16, 3, 8, 8).sign())
        >>> covariance.product(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self, channels: int, height: int, width: int, decay: float = 0.1, unbiased: bool = True
    ) -> None:
        for name, size in (("channels", channels), ("height", height), ("width", width)):
            _check_size("CovarianceFunction", name, size)
        super().__init__((channels, channels, 2 * height - 1, 2 * width - 1), decay)
        self.channels, self.height, self.width = channels, height, width
        self.unbiased = unbiased

    @torch.no_grad()
    def update(self, perturbation: Tensor) -> None:
        """Move the running values towards the autocovariance of a batch.

        Args:
            perturbation: (N, C, H, W), floating, N at least 1.

        Raises:
            ValueError: for another shape.
        """
        self._check("update", "perturbation", perturbation)
        if not len(perturbation):
            raise ValueError("CovarianceFunction.update: perturbation must not be empty, got N = 0")
        self._average(functional.autocovariance(perturbation, self.unbiased))

    def product(self, gradient: Tensor) -> Tensor:
        r""":math:`\Sigma g`.

        Args:
            gradient: (N, C, H, W), floating.

        Returns:
            (N, C, H, W), dtype of `gradient`; twice differentiable.

        Raises:
            ValueError: for another shape.
        """
        self._check("product", "gradient", gradient)
        return functional.covariance_product(gradient, self._values_for(gradient))

    def form(self, gradient: Tensor) -> Tensor:
        r""":math:`g_i^\top \Sigma g_i`.

        Args:
            gradient: (N, C, H, W), floating.

        Returns:
            (N,), in the accumulation dtype; twice differentiable.

        Raises:
            ValueError: for another shape.
        """
        self._check("form", "gradient", gradient)
        return functional.covariance_form(gradient, self._values_for(gradient))

    def dense(self) -> Tensor:
        """The whole matrix, (CHW, CHW), pixels in row-major order; for small images and plots."""
        y, x = torch.meshgrid(
            torch.arange(self.height, device=self.values.device),
            torch.arange(self.width, device=self.values.device),
            indexing="ij",
        )
        y, x = y.flatten(), x.flatten()
        dy = y[None, :] - y[:, None] + self.height - 1
        dx = x[None, :] - x[:, None] + self.width - 1
        blocks = self.values[:, :, dy, dx]  # (C, C, HW, HW)
        size = self.channels * self.height * self.width
        return blocks.transpose(1, 2).reshape(size, size)

    def _check(self, method: str, argument: str, tensor: Tensor) -> None:
        expected = (self.channels, self.height, self.width)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"CovarianceFunction.{method}: {argument} must be a Tensor, "
                f"got {type(tensor).__name__}"
            )
        if tensor.dim() != 4 or tuple(tensor.shape[1:]) != expected:
            raise ValueError(
                f"CovarianceFunction.{method}: {argument} must be (N, C, H, W) with (C, H, W) = "
                f"{expected}, got {tuple(tensor.shape)}"
            )

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return (
            f"{self.channels}, {self.height}, {self.width}, decay={self.decay}, "
            f"unbiased={self.unbiased}"
        )


class FullCovariance(_RunningCovariance):
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
        _check_size("FullCovariance", "dim", dim)
        super().__init__((dim, dim), decay)
        self.dim = dim

    @torch.no_grad()
    def update(self, perturbation: Tensor) -> None:
        r"""Move the running values towards the second moment of a batch.

        Args:
            perturbation: (N, \*D), floating, N at least 1.

        Raises:
            ValueError: for another number of elements.
        """
        rows = self._rows("update", "perturbation", perturbation)
        if not len(rows):
            raise ValueError("FullCovariance.update: perturbation must not be empty, got N = 0")
        self._average(rows.T @ rows / len(rows))

    def product(self, gradient: Tensor) -> Tensor:
        r""":math:`\Sigma g`, in the shape and dtype of `gradient` (N, \*D); differentiable.

        Args:
            gradient: (N, \*D), floating.

        Returns:
            (N, \*D).

        Raises:
            ValueError: for another number of elements.
        """
        rows = self._rows("product", "gradient", gradient)
        product = rows @ self._values_for(rows).T
        return product.reshape(gradient.shape).to(gradient.dtype)

    def form(self, gradient: Tensor) -> Tensor:
        r""":math:`g_i^\top \Sigma g_i`, (N,), in the accumulation dtype; differentiable.

        Args:
            gradient: (N, \*D), floating.

        Returns:
            (N,).

        Raises:
            ValueError: for another number of elements.
        """
        rows = self._rows("form", "gradient", gradient)
        return sample_sum(rows * (rows @ self._values_for(rows).T))

    def dense(self) -> Tensor:
        """The matrix itself, (D, D)."""
        return self.values

    def _rows(self, method: str, argument: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"FullCovariance.{method}: {argument} must be a Tensor, got {type(tensor).__name__}"
            )
        if tensor.dim() < 2 or tensor[:1].numel() not in (0, self.dim):
            raise ValueError(
                f"FullCovariance.{method}: {argument} must be (N, *D) with {self.dim} numbers in "
                f"one sample, got {tuple(tensor.shape)}"
            )
        return widen(tensor).flatten(1)

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.dim}, decay={self.decay}"


def _check_size(function: str, argument: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{function}: {argument} must be an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{function}: {argument} must be at least 1, got {size}")
