"""Accuracy against the strength of an attack: over eps, and over a ladder of attacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from torch import Tensor, nn

from robustkern.evaluation.passes import Advance, check_adversarial, check_data, correct

SizedAttack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def wilson_interval(right: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, which fits small samples and shares near 0 and 1.

    Args:
        right: samples counted.
        samples: out of so many.
        confidence: probability with which such an interval holds the true share, in (0, 1).

    Returns:
        Its ends, in [0, 1].

    Raises:
        ValueError: `samples` below 1, `right` outside [0, samples], or `confidence` outside (0, 1).

    Example:
        >>> low, high = wilson_interval(45, 50)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.786 to 0.957
    """
    if samples < 1 or not 0 <= right <= samples:
        raise ValueError(
            "wilson_interval: right must lie in [0, samples] and samples be at least 1, "
            f"got {right} and {samples}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"wilson_interval: confidence must lie in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = right / samples, 1 + z**2 / samples
    centre = (share + z**2 / (2 * samples)) / scale
    reach = z * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2)) / scale
    return max(0.0, centre - reach), min(1.0, centre + reach)


@dataclass(frozen=True)
class AccuracyCurve:
    """Samples that an attack leaves classified right, over a range of eps.

    Attributes:
        eps: rising, in input units.
        right: at each eps so many samples.
        samples: of so many.
    """

    eps: tuple[float, ...]
    right: tuple[int, ...]
    samples: int

    @property
    def accuracy(self) -> tuple[float, ...]:
        """At each eps the share classified right."""
        return tuple(right / self.samples for right in self.right)

    @property
    def area(self) -> float:
        """Mean accuracy over the range of eps, by trapezoids (Roth et al. 2018); in [0, 1]."""
        if len(self.eps) == 1:
            return self.accuracy[0]
        slices = zip(pairwise(self.eps), pairwise(self.accuracy), strict=True)
        area = sum((right - left) * (high + low) / 2 for (left, right), (high, low) in slices)
        return area / (self.eps[-1] - self.eps[0])

    def intervals(self, confidence: float = 0.95) -> tuple[tuple[float, float], ...]:
        """At each eps `wilson_interval` of the accuracy.

        Args:
            confidence: probability with which such an interval holds the true accuracy.

        Returns:
            For each eps the ends of the interval.

        Raises:
            ValueError: `confidence` outside (0, 1).
        """
        return tuple(wilson_interval(right, self.samples, confidence) for right in self.right)


def accuracy_curve(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: SizedAttack,
    eps: Sequence[float],
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> AccuracyCurve:
    r"""Accuracy under an attack at each eps.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        attack: `attack(model, inputs, targets, eps)` gives adversarial inputs for a batch, as
            `fgsm` and `pgd` do.
        eps: strictly rising, not negative, in input units.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N len(eps) samples.

    Returns:
        The curve.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point, `targets` not int64, or
            the attack returns no tensor.
        ValueError: `eps` empty, negative, not finite or not rising; no samples, values outside
            [0, 1], `targets` out of range or all of one class, an attack that returns another
            shape, outputs that are not (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> import torch
        >>> from robustkern.evaluation import fgsm
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> model.bias.data[0] = 1.0  # the boundary is at 0.5
        >>> inputs, targets = torch.tensor([[0.4], [0.3], [0.9], [1.0]]), torch.tensor([0, 0, 1, 1])
        >>> curve = accuracy_curve(model, inputs, targets, fgsm, eps=[0.0, 0.15, 0.3])
        >>> curve.accuracy, curve.area
        ((1.0, 0.75, 0.5), 0.75)
    """
    caller = "accuracy_curve"
    check_data(caller, model, inputs, targets)
    check_eps(caller, eps)

    def right(radius: float) -> int:
        found = correct(
            caller,
            model,
            inputs,
            targets,
            lambda model, batch, labels: attack(model, batch, labels, radius),
            batch_size,
            advance,
        )
        return int(found.sum())

    return AccuracyCurve(tuple(eps), tuple(right(radius) for radius in eps), len(inputs))


def check_eps(caller: str, eps: Sequence[float]) -> None:
    """Refuse what is no range of eps."""
    rising = all(low < high for low, high in pairwise(eps))
    if not (len(eps) and rising and eps[0] >= 0 and math.isfinite(eps[-1])):
        raise ValueError(
            f"{caller}: eps must rise strictly from 0 or above and be finite, got {list(eps)}"
        )


@dataclass(frozen=True)
class AttackLadder:
    """Accuracy under attacks of rising strength.

    Attributes:
        accuracy: for each attack, weakest first.
    """

    accuracy: dict[str, float]

    @property
    def gap(self) -> float:
        """Accuracy under the weakest attack less that under the strongest.

        It is large where the loss is curved, for a weak attack then misses what a strong one finds
        (Moosavi-Dezfooli et al. 2019, table 1).
        """
        steps = list(self.accuracy.values())
        return steps[0] - steps[-1]


def attack_ladder(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    adversarial: Mapping[str, Tensor],
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> AttackLadder:
    r"""Accuracy under attacks of one eps, from weak to strong, such as FGSM, PGD(7) and PGD(20).

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        adversarial: for each attack's name, weakest first, its (N, \*D) adversarial inputs.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N len(adversarial)
            samples.

    Returns:
        The ladder.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: no attack, no samples, values outside [0, 1], shapes that do not fit, `targets`
            out of range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> model.bias.data[0] = 1.0  # the boundary is at 0.5
        >>> inputs, targets = torch.tensor([[0.4], [0.9]]), torch.tensor([0, 1])
        >>> strong = torch.tensor([[0.6], [0.7]])
        >>> attack_ladder(model, inputs, targets, {"none": inputs, "strong": strong}).gap
        0.5
    """
    caller = "attack_ladder"
    check_data(caller, model, inputs, targets)
    if not adversarial:
        raise ValueError(f"{caller}: adversarial must hold at least one attack, got none")
    for name, found in adversarial.items():
        check_adversarial(caller, f"adversarial[{name!r}]", found, inputs)

    def accuracy(found: Tensor) -> float:
        right = correct(caller, model, found, targets, None, batch_size, advance)
        return int(right.sum()) / len(right)

    return AttackLadder({name: accuracy(found) for name, found in adversarial.items()})
