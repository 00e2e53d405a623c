"""SGR: structured gradient regularization (Roth, Lucchi, Nowozin and Hofmann 2018)."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustkern.covariance import CovarianceFunction, FullCovariance
from robustkern.penalties.base import Penalty, check_every, check_weight

__all__ = ["SGR"]

Source = str | Callable[[Tensor, Tensor], Tensor] | None
_SOURCES = ("sign", "gradient")


class SGR(Penalty):
    r"""The variance that noise of a given covariance gives the loss, to first order (Eq. 11).

    .. math:: R = \frac{\mathrm{weight}}{2}\; \frac{1}{N} \sum_i g_i^\top \Sigma\, g_i

    In training mode (of this module) the covariance follows the perturbations that the source
    names, at no extra pass (Eq. 14, 16). A step costs 2 plain training steps.

    Args:
        weight: lambda of the paper.
        covariance: a `CovarianceFunction` for images, a `FullCovariance` for other inputs.
        source: of the perturbations: "sign", sign(g); "gradient", g; a callable that is given
            inputs and gradient, both (N, *D), and returns perturbations of their shape; or None for
            a covariance that stays as it is.
        update_every: training calls from one update of the covariance to the next.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a weight that is negative or not finite, `update_every` below 1, or another
            source.
    """

    def __init__(
        self,
        weight: float,
        covariance: CovarianceFunction | FullCovariance,
        source: Source = "sign",
        update_every: int = 1,
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
        self.calls = 0

    def points(self, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """No further points; here the covariance is updated."""
        if self.training and self.source is not None:
            if self.calls % self.update_every == 0:
                self.covariance.update(self._perturbation(inputs, gradient))
            self.calls += 1
        return ()

    def _perturbation(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        if self.source == "sign":
            return gradient.sign()
        if self.source == "gradient":
            return gradient
        assert callable(self.source)
        return self.source(inputs, gradient)

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        return 0.5 * self.weight * self.covariance.form(gradient).mean()

    def get_extra_state(self) -> Tensor:
        """The count of training calls, for `state_dict`."""
        return torch.tensor(self.calls, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the count from a `state_dict`."""
        self.calls = int(state)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weight={self.weight}, source={self.source!r}, update_every={self.update_every}"
