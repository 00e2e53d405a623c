"""How far the nearest adversarial inputs are that an attack for minimal distances found."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.evaluation.balls import distances
from robustkern.evaluation.curves import AccuracyCurve, check_eps
from robustkern.evaluation.passes import (
    Advance,
    check_adversarial,
    check_data,
    check_samples,
    correct,
    outputs_of,
)


@dataclass(frozen=True)
class AdversarialDistances:
    """Distances from samples to their adversarial inputs.

    A sample that is misclassified as it is has no adversarial input: it is counted, and no distance
    is taken. A sample that the attack does not fool is farther than any that it does.

    Attributes:
        distances: of each sample that was fooled, rising, in input units.
        misclassified: samples that were wrong before the attack.
        standing: samples that the attack did not fool.
    """

    distances: tuple[float, ...]
    misclassified: int
    standing: int

    @property
    def median(self) -> float | None:
        """Of all that were right before, standing ones at infinity; None if there are none."""
        attacked = [*self.distances, *[math.inf] * self.standing]
        return statistics.median(attacked) if attacked else None

    @property
    def mean(self) -> float | None:
        """Of those that were fooled; None if none was."""
        return statistics.fmean(self.distances) if self.distances else None

    def curve(self, eps: Sequence[float]) -> AccuracyCurve:
        """Accuracy against eps: at each of them a sample is lost if it is no farther than that.

        Args:
            eps: strictly rising, not negative, in input units.

        Returns:
            The curve, of all samples, misclassified ones too.

        Raises:
            ValueError: `eps` empty, negative, not finite or not rising.
        """
        check_eps("AdversarialDistances.curve", eps)
        right = len(self.distances) + self.standing
        return AccuracyCurve(
            tuple(eps),
            tuple(right - bisect_right(self.distances, radius) for radius in eps),
            right + self.misclassified,
        )


def adversarial_distances(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    adversarial: Tensor,
    *,
    p: float = 2,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> AdversarialDistances:
    r"""Distances that a minimal-distance attack needs, as DeepFool, CW and Boundary attack do.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        adversarial: (N, \*D), in [0, 1]; one that does not fool the model counts as a failure.
        p: norm, 1, 2 or infinity.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all 2 N samples.

    Returns:
        The distances.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: another p, no samples, values outside [0, 1], shapes that do not fit, `targets`
            out of range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> model.bias.data[0] = 1.0  # the boundary is at 0.5
        >>> inputs, targets = torch.tensor([[0.25], [0.75], [0.0]]), torch.tensor([0, 1, 1])
        >>> adversarial_distances(model, inputs, targets, torch.tensor([[0.75], [0.75], [0.0]]))
        AdversarialDistances(distances=(0.5,), misclassified=1, standing=1)
    """
    caller = "adversarial_distances"
    check_data(caller, model, inputs, targets)
    check_adversarial(caller, "adversarial", adversarial, inputs)
    if p not in (1, 2, math.inf):
        raise ValueError(f"{caller}: p must be 1, 2 or inf, got {p!r}")
    right = correct(caller, model, inputs, targets, None, batch_size, advance)
    after = correct(caller, model, adversarial, targets, None, batch_size, advance)
    lengths = distances(adversarial, inputs, p)
    return AdversarialDistances(
        distances=tuple(lengths[right & ~after].sort().values.tolist()),
        misclassified=int((~right).sum()),
        standing=int((right & after).sum()),
    )


@dataclass(frozen=True)
class DeepFoolRobustness:
    """Length of the perturbations that change predictions, beside the inputs' own.

    Attributes:
        rho: mean of the ratios; None if no prediction changed.
        changed: samples it is the mean of.
        unchanged: samples whose prediction stayed, left out.
    """

    rho: float | None
    changed: int
    unchanged: int


def deepfool_robustness(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> DeepFoolRobustness:
    r"""The robustness of Moosavi-Dezfooli, Fawzi and Frossard 2016 (DeepFool), Eq. 2.

    .. math:: \hat\rho_{\mathrm{adv}} = \frac{1}{|D|} \sum_{x \in D} \frac{\|r(x)\|_2}{\|x\|_2}

    r(x) is the smallest perturbation found that changes the prediction, right or wrong.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1], none all zero.
        adversarial: (N, \*D), x + r(x), such as DeepFool finds at predicted labels.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all 2 N samples.

    Returns:
        The robustness, of no unit.

    Raises:
        TypeError: `model` is no module or a tensor is not floating point.
        ValueError: no samples, a sample all zero, values outside [0, 1], shapes that do not fit,
            outputs that are not (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> model.bias.data[0] = 1.0  # the boundary is at 0.5
        >>> inputs, adversarial = torch.tensor([[0.25], [1.0]]), torch.tensor([[0.5625], [0.25]])
        >>> deepfool_robustness(model, inputs, adversarial)
        DeepFoolRobustness(rho=1.0, changed=2, unchanged=0)
    """
    caller = "deepfool_robustness"
    check_samples(caller, model, inputs)
    check_adversarial(caller, "adversarial", adversarial, inputs)
    lengths = distances(inputs, torch.zeros_like(inputs), 2)
    if not lengths.all():
        raise ValueError(
            f"{caller}: inputs must not be all zero, got {int((lengths == 0).sum())} such samples"
        )
    before, after = (
        outputs_of(caller, model, x, batch_size, advance).argmax(1) for x in (inputs, adversarial)
    )
    changed = before != after
    ratios = distances(adversarial, inputs, 2) / lengths
    found = int(changed.sum())
    rho = ratios[changed].mean().item() if found else None
    return DeepFoolRobustness(rho=rho, changed=found, unchanged=len(inputs) - found)
