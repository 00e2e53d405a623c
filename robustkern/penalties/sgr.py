"""SGR: structured gradient regularization (Roth, Lucchi, Nowozin and Hofmann 2018)."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustkern.covariance import CovarianceFunction, FullCovariance, RunningMean
from robustkern.penalties.base import Penalty, check_every, check_weight
from robustkern.reference.samples import widen

__all__ = ["SGR"]

Source = str | Callable[[Tensor, Tensor], Tensor] | None
_SOURCES = ("sign", "gradient")


class SGR(Penalty):
    r"""The variance that noise of a given covariance gives the loss, to first order (Eq. 11).

    .. math:: R = \frac{\mathrm{weight}}{2}\; \frac{1}{N} \sum_i g_i^\top \Sigma\, g_i

    In training mode (of this module) the covariance follows the perturbations that the source
    names, at no extra pass (Eq. 14, 16). A step costs 2 plain training steps. With `mean` the
    noise has one, :math:`\mu`, and :math:`\frac{\mathrm{weight}}{N} \sum_i g_i^\top \mu` is added
    (Eq. 12); the authors found it small.

    Args:
        weight: lambda of the paper; a noise-to-signal ratio if the covariance is standardized.
        covariance: a `CovarianceFunction` for images, a `FullCovariance` for other inputs.
        source: of the perturbations: "sign", sign(g); "gradient", g; a callable that is given
            inputs and gradient, both (N, \*D), and returns perturbations of their shape; or None
            for a covariance that stays as it is.
            The gradients of "sign" and "gradient" are those of the training loss, at the true
            labels; `robustkern.evaluation` has sources that keep to predicted ones, for a pass or
            more.
        update_every: training calls from one update of the covariance to the next.
        mean: add the uncentred term, with a running mean of the perturbations.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a weight that is negative or not finite, `update_every` below 1, or another
            source.

    Example:
        >>> import torch, robustkern
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = [(torch.rand(8, 3, 2, 2), torch.arange(8) % 5) for _ in range(3)]
        >>> variance = data[0][0].var(0).mean()  # of the data: the weight is noise over signal
        >>> covariance = robustkern.CovarianceFunction(3, 2, 2).standardize(variance)
        >>> penalty = robustkern.SGR(0.1, covariance)
        >>> for images, labels in data:
        ...     optimizer.zero_grad()
        ...     step = robustkern.backward(model, images, labels, penalty)
        ...     optimizer.step()
        >>> bool(step.penalty > 0)
        True
    """

    def __init__(
        self,
        weight: float,
        covariance: CovarianceFunction | FullCovariance,
        source: Source = "sign",
        update_every: int = 1,
        mean: bool = False,
    ) -> None:
        super().__init__()
        self.weight = check_weight("SGR", "weight", weight)
        if not isinstance(covariance, CovarianceFunction | FullCovariance):
            raise TypeError(
                "SGR: covariance must be a CovarianceFunction or FullCovariance, "
                f"got {type(covariance).__name__}"
            )
        if source is not None and source not in _SOURCES and not callable(source):
            raise ValueError(
                f"SGR: source must be one of {_SOURCES}, a callable or None, got {source!r}"
            )
        self.covariance, self.source = covariance, source
        self.update_every = check_every("SGR", "update_every", update_every)
        if not isinstance(mean, bool):
            raise TypeError(f"SGR: mean must be a bool, got {type(mean).__name__}")
        self.mean = RunningMean(covariance.dim, covariance.decay) if mean else None
        if self.mean is not None:
            self.mean.to(covariance.values.device)
        self.calls = 0

    def points(self, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """No further points; here the covariance is updated."""
        if self.training and self.source is not None:
            if self.calls % self.update_every == 0:
                perturbation = self._perturbation(inputs, gradient)
                self.covariance.update(perturbation, strict=False)
                if self.mean is not None:
                    self.mean.update(perturbation)
            self.calls += 1
        return ()

    def _perturbation(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        if self.source == "sign":
            # The sign of NaN is 0: an overflow must not pass for a gradient.
            return torch.where(gradient.isfinite(), gradient.sign(), torch.nan)
        if self.source == "gradient":
            return gradient
        assert callable(self.source)
        return self.source(inputs, gradient)

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        variance = 0.5 * self.covariance.form(gradient).mean()
        if self.mean is not None:
            rows = widen(gradient).flatten(1)
            mu = self.mean.values * self.covariance.amplitude()
            variance = variance + (rows * mu.to(rows.dtype)).sum(1).mean()
        return self.weight * variance

    def get_extra_state(self) -> Tensor:
        """The count of training calls, for `state_dict`."""
        return torch.tensor(self.calls, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the count from a `state_dict`."""
        self.calls = int(state)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        options = f"weight={self.weight}, source={self.source!r}, update_every={self.update_every}"
        return f"{options}, mean=True" if self.mean is not None else options
