"""Signs that an attack failed for another reason than the robustness of the network.

None of them proves it, and their absence proves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation.passes import (
    Advance,
    check_adversarial,
    check_data,
    outputs_of,
)
from robustkern.evaluation.sensitivity import norms

# Of the samples; a sign that fewer show than this is put down to chance.
_STRAY = 0.01


@dataclass(frozen=True)
class Indicator:
    """A sign of a failed attack: whether it shows, and the number that tells."""

    raised: bool
    value: float


@dataclass(frozen=True)
class FailureIndicators:
    """Signs that an attack failed for another reason than robustness; see `failure_indicators`.

    Attributes:
        zero_gradients: of the samples classified right, the share whose input gradient is zero;
            raised above 1%.
        flat_loss: of the samples classified right, the share whose loss the gradient attack did not
            raise; raised above 1%.
        black_box_stronger: accuracy under the gradient attack less that under the gradient-free
            one; raised above 1%.
        robust_at_large_eps: accuracy under the gradient attack at an eps that no network stands;
            raised above 0.
    """

    zero_gradients: Indicator
    flat_loss: Indicator
    black_box_stronger: Indicator
    robust_at_large_eps: Indicator

    @property
    def raised(self) -> tuple[str, ...]:
        """Names of those that are raised."""
        return tuple(name for name, indicator in vars(self).items() if indicator.raised)


def failure_indicators(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    white_box: Tensor,
    black_box: Tensor,
    large: Tensor,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> FailureIndicators:
    r"""Checks of an evaluation that Athalye et al. 2018 and Carlini et al. 2019 ask for.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        white_box: (N, \*D), adversarial inputs of a gradient attack, such as PGD.
        black_box: (N, \*D), those of a gradient-free attack at the same eps.
        large: (N, \*D), those of the gradient attack at an eps that no network can stand, in
            L-infinity 0.5 and more, where every image can become grey.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all 5 N samples.

    Returns:
        The indicators.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: no samples, values outside [0, 1], shapes that do not fit, `targets` out of
            range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
        >>> import torch
        >>> inputs, targets = torch.tensor([[0.75, 0.25], [0.0, 0.5]]), torch.tensor([0, 1])
        >>> moved = inputs.flip(1)
        >>> found = failure_indicators(
        ...     nn.Identity(), inputs, targets, white_box=inputs, black_box=moved, large=moved
        ... )
        >>> found.raised
        ('flat_loss', 'black_box_stronger')
        >>> found.black_box_stronger
        Indicator(raised=True, value=1.0)
    """
    caller = "failure_indicators"
    check_data(caller, model, inputs, targets)
    for name, found in (("white_box", white_box), ("black_box", black_box), ("large", large)):
        check_adversarial(caller, name, found, inputs)

    def outputs(found: Tensor) -> Tensor:
        return outputs_of(caller, model, found, batch_size, advance)

    def right(outputs: Tensor) -> Tensor:
        return outputs.argmax(1) == targets

    def count(outputs: Tensor) -> int:
        return int(right(outputs).sum())

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    gradients = norms(caller, model, inputs, targets, math.inf, batch_size, advance)
    clean, attacked = outputs(inputs), outputs(white_box)

    def share(samples: Tensor) -> float:
        # Misclassified ones an attack need not touch.
        before = right(clean)
        return int((samples & before).sum()) / max(int(before.sum()), 1)

    zero = share(gradients == 0)
    flat = share(loss(attacked) <= loss(clean))
    stronger = (count(attacked) - count(outputs(black_box))) / len(inputs)
    standing = count(outputs(large)) / len(inputs)
    return FailureIndicators(
        zero_gradients=Indicator(zero > _STRAY, zero),
        flat_loss=Indicator(flat > _STRAY, flat),
        black_box_stronger=Indicator(stronger > _STRAY, stronger),
        robust_at_large_eps=Indicator(standing > 0, standing),
    )
