"""The covariance of image perturbations over pixel displacements (Roth et al. 2018, Eq. 16)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustkern import functional
from robustkern.covariance import displacements
from robustkern.covariance.running import RunningAverage, check_size
from robustkern.reference.samples import widen

_ROUNDING = 1e-6  # of the largest eigenvalue: below it a negative one is the values' rounding
_CHOLESKY_LIMIT = 4096  # numbers in a sample whose matrix is factored: 128 MB, a second or two


class CovarianceFunction(RunningAverage):
    r"""The covariance of image perturbations as a function of pixel displacement (Eq. 16).

    `values` is K, (C, C, 2H-1, 2W-1) float32, with displacement zero at [H-1, W-1]. It stands for
    the (CHW, CHW) matrix :math:`\Sigma[(c,i),(c',j)] = K[c, c', j-i]`.

    `project`, `taper` and `standardize` change the values and stay in force: what later updates
    make of the running average is changed alike, in this order, whatever that of the calls. They
    are no part of `state_dict`: call them before it is loaded.

    Where torch.distributed is initialized, an update is a collective call: all ranks must make it.

    Args:
        channels: C.
        height: H, in pixels.
        width: W, in pixels.
        decay: share of the newest update: values <- (1 - decay) values + decay newest (Eq. 14).
        unbiased: see `functional.autocovariance`.
        isotropic: average an update over displacements whose length rounds to the same integer, as
            Eq. 16 is printed. What comes out is positive semidefinite only after `project`.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a size below 1, or a decay outside (0, 1].

    Example:
        >>> import torch, robustkern
        >>> covariance = robustkern.CovarianceFunction(3, 8, 8).taper(4.0).standardize(1.0)
        >>> covariance.update(torch.randn(16, 3, 8, 8).sign())
        >>> covariance.product(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    average: Tensor | None

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        decay: float = 0.1,
        unbiased: bool = True,
        isotropic: bool = False,
    ) -> None:
        for name, size in (("channels", channels), ("height", height), ("width", width)):
            check_size("CovarianceFunction", name, size)
        super().__init__((channels, channels, 2 * height - 1, 2 * width - 1), decay)
        self.channels, self.height, self.width = channels, height, width
        self.dim = channels * height * width
        self.unbiased, self.isotropic = unbiased, isotropic
        self.projected = False
        self.radius: float | None = None
        self.variance: float | None = None
        # The running average itself, where the values are made from it.
        self.register_buffer("average", None)
        self._factor: tuple[tuple[object, ...], Tensor] | None = None
        self._scale: Tensor | None = None  # of `standardize`, as it was last
        self._law: tuple[float, float] | None = None  # decay length and cross of `exponential`

    @classmethod
    def exponential(
        cls, channels: int, height: int, width: int, decay_length: float, cross: float = 0.5
    ) -> "CovarianceFunction":
        r"""The long-range-correlated noise of Roth et al. 2018, sec. 4.3, of variance 1.

        .. math:: K[c, c', d] = (1 \text{ if } c = c' \text{, else cross})\;
            \exp(-\|d\|_2 / \mathrm{decay\_length})

        Lengths are exact, not rounded to integers, and so it is positive semidefinite.

        Args:
            channels: C.
            height: H, in pixels.
            width: W, in pixels.
            decay_length: in pixels.
            cross: the correlation between channels.

        Returns:
            A covariance that stays as it is, unless it is updated.

        Raises:
            TypeError: for an argument of another type.
            ValueError: for a size below 1, a decay length that is not positive and finite, or a
                correlation that no `channels` numbers can have with one another.

        Example:
            >>> import robustkern
            >>> noise = robustkern.CovarianceFunction.exponential(1, 2, 3, decay_length=2.0)
            >>> noise.values[0, 0, 1]
            tensor([0.3679, 0.6065, 1.0000, 0.6065, 0.3679])
        """
        name = "CovarianceFunction.exponential"
        _check_positive(name, "decay_length", decay_length)
        found = cls(channels, height, width)
        least = -1 / (channels - 1) if channels > 1 else -math.inf
        if isinstance(cross, bool) or not isinstance(cross, int | float):
            raise TypeError(f"{name}: cross must be a number, got {type(cross).__name__}")
        if not least <= cross <= 1:
            raise ValueError(f"{name}: cross must be in [{least:.3g}, 1], got {cross!r}")
        between = torch.full((channels, channels), float(cross)).fill_diagonal_(1.0)
        within = torch.exp(-displacements.lengths(found.values) / decay_length)
        found.values.copy_(between[:, :, None, None] * within)
        found.updates.fill_(1)
        found._law = float(decay_length), float(cross)
        return found

    @torch.no_grad()
    def update(self, perturbation: Tensor, *, strict: bool = True) -> None:
        """Move the running values towards the autocovariance of a batch, over all ranks.

        Args:
            perturbation: (N, C, H, W), floating, N at least 1. Ranks may have different N.
            strict: refuse a batch that is not finite, which makes the host wait for the device;
                otherwise such a batch is left out without a word, as a gradient scaler's overflow
                should be.

        Raises:
            ValueError: for another shape, or a batch that is not finite; the running values are
                then as they were.
        """
        self._check("update", "perturbation", perturbation)
        if not len(perturbation):
            raise ValueError("CovarianceFunction.update: perturbation must not be empty, got N = 0")
        estimate = functional.autocovariance(perturbation, self.unbiased)
        if self.isotropic:
            estimate = displacements.isotropic(estimate)
        running = self.values if self.average is None else self.average
        self._average(running, estimate, len(perturbation), strict)
        self._make_values()

    def project(self) -> "CovarianceFunction":
        """Make it positive semidefinite: a spectrum without its negative parts.

        The spectrum is that of the values as they are, periodic with 2H-1 and 2W-1, and at each
        frequency a (C, C) matrix; Sigma is part of the periodic matrix. The eigenvalues make the
        host wait for the device at every update.

        Returns:
            Itself.
        """
        self.projected = True
        return self._follow()

    def taper(self, radius: float) -> "CovarianceFunction":
        r"""Make it vanish beyond a radius, and the product a short stencil.

        The values are multiplied by Wendland's function :math:`(1 - r)^4 (4 r + 1)` of
        :math:`r = \|d\|_2 / \mathrm{radius}`, which is positive definite in the plane (Wendland
        1995): what was positive semidefinite still is.

        Args:
            radius: in pixels.

        Returns:
            Itself.

        Raises:
            TypeError: for a radius that is no number.
            ValueError: for a radius that is not positive and finite.
        """
        _check_positive("CovarianceFunction.taper", "radius", radius)
        self.radius = float(radius)
        return self._follow()

    def standardize(self, variance: float | Tensor = 1.0) -> "CovarianceFunction":
        """Make the mean of the diagonal that of the data, so that SGR's weight compares the two.

        Its weight is a noise-to-signal ratio then.

        Args:
            variance: of the data, the mean over pixels and channels, a number or a tensor of one; 1
                gives unit noise.

        Returns:
            Itself.

        Raises:
            TypeError: for a variance that is no number.
            ValueError: for a variance that is not positive and finite.
        """
        _check_positive("CovarianceFunction.standardize", "variance", variance)
        self.variance = float(variance)
        return self._follow()

    @torch.no_grad()
    def _follow(self) -> "CovarianceFunction":
        if self.average is None:
            self.average = self.values.clone()
        if self._has_values():
            self._make_values()
        return self

    def _make_values(self) -> None:
        if self.average is None:
            return
        made = self.average
        if self.projected:
            made = displacements.projected(made)
        if self.radius is not None:
            r = (displacements.lengths(made) / self.radius).clamp(max=1)
            made = made * ((1 - r) ** 4 * (4 * r + 1))
        if self.variance is not None:
            mean = self._variance(made)
            self._scale = torch.where(mean > 0, self.variance / mean, 0)
            made = made * self._scale
        self.values.copy_(made)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._scale = None
        super()._load_from_state_dict(*args, **kwargs)

    def amplitude(self) -> Tensor | float:
        """By how much the noise is larger than the perturbations: see `standardize`.

        Returns:
            A root of a ratio of variances.
        """
        if self.average is None or self.variance is None:
            return 1.0
        if self._scale is None:  # of a state that was loaded
            self._make_values()
        assert self._scale is not None
        return self._scale.sqrt()

    def _variance(self, values: Tensor) -> Tensor:
        return values[..., self.height - 1, self.width - 1].diagonal().mean()

    def product(self, gradient: Tensor) -> Tensor:
        r""":math:`\Sigma g`.

        Args:
            gradient: (N, C, H, W), floating.

        Returns:
            (N, C, H, W), dtype of `gradient`; twice differentiable.

        Raises:
            ValueError: for another shape, or before the first update.
        """
        self._check("product", "gradient", gradient)
        self._check_written("product")
        return functional.covariance_product(gradient, self._values_for(gradient))

    def form(self, gradient: Tensor) -> Tensor:
        r""":math:`g_i^\top \Sigma g_i`.

        Args:
            gradient: (N, C, H, W), floating.

        Returns:
            (N,), in the accumulation dtype; twice differentiable.

        Raises:
            ValueError: for another shape, or before the first update.
        """
        self._check("form", "gradient", gradient)
        self._check_written("form")
        return functional.covariance_form(gradient, self._values_for(gradient))

    def _values_for(self, gradient: Tensor) -> Tensor:
        if self.radius is None:
            return super()._values_for(gradient)
        reach = math.ceil(self.radius) - 1  # beyond it the taper is zero
        y, x = max(self.height - 1 - reach, 0), max(self.width - 1 - reach, 0)
        rows, columns = self.values.shape[2:]
        short = self.values[..., y : rows - y, x : columns - x]
        return short.to(widen(gradient).dtype, copy=gradient.requires_grad)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Gaussian noise of this covariance and mean zero.

        By circulant embedding (Dietrich and Newsam 1997): exact, in the time of a transform, if the
        values continued periodically are positive semidefinite. Those of `exponential`, whose
        values further out are known, are continued with a longer period where that is needed; of
        others that are positive semidefinite themselves, a Cholesky factor is taken for C * H * W
        up to 4096.

        Args:
            n: how many draws.
            generator: for repeatable draws; they are made on its device.

        Returns:
            (n, C, H, W) float32, on the covariance's device.

        Raises:
            TypeError: for `n` that is no int.
            ValueError: for `n` below 0, before the first update, or for a covariance for which none
                of this holds (`project` makes it hold).
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"CovarianceFunction.sample: n must be an int, got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"CovarianceFunction.sample: n must not be negative, got {n}")
        self._check_written("sample")
        factor = self._sampling_factor()
        device = factor.device if generator is None else generator.device
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        image = (self.channels, self.height, self.width)
        if n == 0:  # some FFT libraries refuse it
            return self.values.new_empty(0, *image)
        if not factor.is_complex():
            white = torch.randn(n, factor.shape[0], generator=generator, **options)
            return (white.to(factor.device) @ factor.T).view(n, *image)
        pairs = (n + 1) // 2  # real and imaginary parts are draws of their own
        shape = (pairs, self.channels, *factor.shape[-2:], 2)
        white = torch.randn(shape, generator=generator, **options).to(factor.device)
        # Channel by channel: `einsum` would multiply a small matrix for every frequency.
        sources = torch.view_as_complex(white).unsqueeze(1).unbind(2)
        colored = factor[:, 0] * sources[0]
        for channel in range(1, self.channels):
            colored += factor[:, channel] * sources[channel]
        noise = torch.fft.fft2(colored, norm="ortho")[..., : self.height, : self.width]
        return torch.cat([noise.real, noise.imag])[:n].contiguous()

    def _sampling_factor(self) -> Tensor:
        """A root of a spectrum, (C, C, rows, columns) complex, or of Sigma, (D, D) real."""
        if self.values.is_inference():  # it has no version to tell whether it changed
            return self._make_sampling_factor()
        key = (self.values._version, self.values.data_ptr(), self.values.device)
        if self._factor is None or self._factor[0] != key:
            self._factor = key, self._make_sampling_factor()
        return self._factor[1]

    def _make_sampling_factor(self) -> Tensor:
        for values in self._continued():
            eigenvalues, vectors = torch.linalg.eigh(displacements.spectrum(values.double()))
            if eigenvalues.min() >= -_ROUNDING * eigenvalues.abs().max():
                roots: Tensor = vectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)
                return roots.movedim((0, 1), (2, 3)).to(torch.complex64).contiguous()
        if self.dim <= _CHOLESKY_LIMIT:
            sigma = self.dense().double()
            sigma = (sigma + sigma.T) / 2
            sigma.diagonal().add_(_ROUNDING * sigma.diagonal().mean())
            root: Tensor
            root, failed = torch.linalg.cholesky_ex(sigma)
            if not failed:
                return root.float()
        least, largest = eigenvalues.min().item(), eigenvalues.max().item()
        raise ValueError(
            "CovarianceFunction.sample: the covariance must be positive semidefinite, continued "
            f"periodically (project() makes it so), got eigenvalues from {least:.3g} to "
            f"{largest:.3g}"
        )

    def _continued(self) -> Iterator[Tensor]:
        """The values, and those of `exponential` also at displacements further out."""
        yield self.values
        if self._law is None:
            return
        for times in (1, 2, 4):
            size = times * self.height, times * self.width
            wider = self.exponential(self.channels, *size, *self._law).values.to(self.values.device)
            if times == 1:
                scale = self._variance(self.values) / wider[0, 0, self.height - 1, self.width - 1]
                if not torch.allclose(scale * wider, self.values, rtol=1e-6, atol=0):
                    return  # they have been changed by more than `standardize`
            yield scale * wider

    @torch.no_grad()
    def profile(self) -> tuple[Tensor, Tensor]:
        """The covariance against the length of the displacement, within and between channels.

        Returns:
            (R,) mean lengths in pixels of the displacements that round to 0, 1, 2, ..., and
            (C, C, R) mean values there.

        Raises:
            ValueError: before the first update.
        """
        self._check_written("profile")
        lengths = displacements.lengths(self.values)
        return displacements.ring_means(lengths), displacements.ring_means(self.values)

    def decay_length(self) -> float:
        """Where the covariance within channels has fallen to 1/e of its value at zero, in pixels.

        Returns:
            The length, between those of `profile`; infinity if it does not fall so far.

        Raises:
            ValueError: before the first update, or if the variance is not positive.
        """
        self._check_written("decay_length")
        radii, values = (tensor.double().cpu() for tensor in self.profile())
        within = values.diagonal().mean(1)
        if not within[0] > 0:
            raise ValueError(
                "CovarianceFunction.decay_length: the variance must be positive, "
                f"got {within[0].item():.3g}"
            )
        below = (within <= within[0] / math.e).nonzero()
        if not len(below):
            return math.inf
        last = int(below[0])
        step = (within[last - 1] - within[0] / math.e) / (within[last - 1] - within[last])
        return float(radii[last - 1] + step * (radii[last] - radii[last - 1]))

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
        return blocks.transpose(1, 2).reshape(self.dim, self.dim)

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
        if tensor.device != self.values.device:
            raise ValueError(
                f"CovarianceFunction.{method}: {argument} must be on the covariance's device, "
                f"got {tensor.device} and {self.values.device}"
            )

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        options = {
            "isotropic": self.isotropic or None,
            "projected": self.projected or None,
            "radius": self.radius,
            "variance": self.variance,
        }
        chosen = "".join(f", {k}={v}" for k, v in options.items() if v is not None)
        return (
            f"{self.channels}, {self.height}, {self.width}, decay={self.decay}, "
            f"unbiased={self.unbiased}{chosen}"
        )


def _check_positive(function: str, argument: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: {argument} must be positive and finite, got {value!r}")
