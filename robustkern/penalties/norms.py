"""Penalties on the size of the input gradient: total variation, GN, Lipschitz."""

import torch
from torch import Tensor

from robustkern import functional
from robustkern.gradients import ranks
from robustkern.penalties.base import Penalty, check_weight

__all__ = ["GradientPenalty", "LipschitzPenalty"]


class GradientPenalty(Penalty):
    r"""The size of the input gradient (Finlay, Oberman and Abbasi 2019; GN of Roth et al. 2018).

    .. math:: R = \mathrm{weight}\; \frac{1}{N} \sum_i \|g_i\|_p^{\mathrm{power}}

    power=1 is total variation: with the weight at eps it is, to first order, training on attacks of
    size eps in the dual norm: p=2 against L2 attacks, p=1 against Linf, p=inf against L1. p=2,
    power=2 is GN. A step costs 2 plain training steps.

    Args:
        weight: non-negative.
        p: 1, 2 or infinity.
        power: 1 or 2.

    Raises:
        TypeError: for a weight that is no number.
        ValueError: for a weight that is negative or not finite, another p or another power.
    """

    def __init__(self, weight: float, p: float = 2, power: int = 1) -> None:
        super().__init__()
        self.weight = check_weight("GradientPenalty", "weight", weight)
        self.p = _check_p("GradientPenalty", p)
        if power not in (1, 2):
            raise ValueError(f"GradientPenalty: power must be 1 or 2, got {power!r}")
        self.power = power

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        return self.weight * functional.gradient_norm(gradient, self.p).pow(self.power).mean()

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weight={self.weight}, p={self.p}, power={self.power}"


class LipschitzPenalty(Penalty):
    r"""The largest input gradient of the batch (Finlay, Oberman and Abbasi 2019).

    .. math:: R = \mathrm{weight}\; \max_i \|g_i\|_p

    The maximum over the data underestimates the Lipschitz constant of the loss. In training mode
    (of this module) it is the maximum over all ranks of torch.distributed, and only the rank that
    holds it moves a sample; as a term of a loss the ranks' batches must then be equal. A step costs
    2 plain training steps.

    Args:
        weight: non-negative.
        p: 1, 2 or infinity.

    Raises:
        TypeError: for a weight that is no number.
        ValueError: for a weight that is negative or not finite, or another p.
    """

    def __init__(self, weight: float, p: float = 2) -> None:
        super().__init__()
        self.weight = check_weight("LipschitzPenalty", "weight", weight)
        self.p = _check_p("LipschitzPenalty", p)

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The maximum over the batch."""
        largest = functional.gradient_norm(gradient, self.p).max()
        if self.training:
            largest = ranks.maximum(largest, len(gradient))
        return self.weight * largest

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"weight={self.weight}, p={self.p}"


def _check_p(function: str, p: float) -> float:
    if p not in (1, 2, torch.inf):
        raise ValueError(f"{function}: p must be 1, 2 or inf, got {p!r}")
    return p
