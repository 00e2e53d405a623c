"""CURE: curvature regularization (Moosavi-Dezfooli, Fawzi, Uesato and Frossard, CVPR 2019)."""

from collections.abc import Hashable

import torch
from torch import Tensor

from robustkern import functional
from robustkern.penalties.base import Penalty, check_every, check_weight

__all__ = ["CURE"]

_DIRECTIONS = ("sign", "gradient", "gaussian")


class CURE(Penalty):
    r"""How much the input gradient changes over a step of length h: the curvature of the loss.

    .. math:: R = \mathrm{weight}\; \frac{1}{N} \sum_i \|g_i(x_i + h z_i) - g_i(x_i)\|_2^2

    z has unit L2 length and is a constant for the parameters; 1/h^2 is part of the weight, as in
    the paper. In plain training steps a step costs 4, anchored 3; each further sample 2.

    Args:
        weight: gamma of the paper.
        h: L2 length in input units; the paper's 1.5 is meant for pixels scaled to about [0, 1].
        direction: "sign", z along sign(g); "gradient", along g; "gaussian", uniform on the sphere
            (the paper's normal z, scaled to unit length, so that h means the same for all three).
        samples: draws to average over, for "gaussian".
        squared: False for the norm itself, as in the authors' code.
        anchored: hold g(x) constant in the parameter gradient and double what is left: one pass
            fewer.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a weight or h that is negative or not finite, another direction, or several
            samples of a direction that is not random.
    """

    def __init__(
        self,
        weight: float = 4.0,
        h: float = 1.5,
        direction: str = "sign",
        *,
        samples: int = 1,
        squared: bool = True,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        if direction not in _DIRECTIONS:
            raise ValueError(f"CURE: direction must be one of {_DIRECTIONS}, got {direction!r}")
        self.weight = check_weight("CURE", "weight", weight)
        self.h = check_weight("CURE", "h", h)
        self.direction = direction
        self.samples = check_every("CURE", "samples", samples)
        if samples > 1 and direction != "gaussian":
            raise ValueError(
                f"CURE: samples must be 1 for direction {direction!r}, which is not random, "
                f"got {samples}"
            )
        self.squared, self.anchored = squared, anchored

    def points(self, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """The points x + h z, one for each sample of z."""
        if self.direction != "gaussian":
            return [functional.perturb(inputs, gradient, self.h, self.direction)]
        return [
            functional.perturb(inputs, torch.randn_like(inputs), self.h, "gradient")
            for _ in range(self.samples)
        ]

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch and the samples."""
        if self.anchored:
            gradient = gradient.detach()
        changes = [self._change(s, gradient).mean() for s in shifted]
        value = self.weight * torch.stack(changes).mean()
        return 2 * value - value.detach() if self.anchored else value

    def _change(self, shifted: Tensor, gradient: Tensor) -> Tensor:
        if self.squared:
            return functional.gradient_difference(shifted, gradient)
        return functional.gradient_norm(shifted - gradient, 2)

    def points_key(self) -> Hashable:
        """Equal for equal steps; a random direction is shared with no other term."""
        return id(self) if self.direction == "gaussian" else (type(self), self.h, self.direction)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"weight={self.weight}, h={self.h}, direction={self.direction!r}, "
            f"samples={self.samples}, squared={self.squared}, anchored={self.anchored}"
        )
