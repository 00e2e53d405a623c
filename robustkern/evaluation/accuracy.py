"""Accuracy of a classifier: on the inputs as they are, and under attack over a range of eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.evaluation.attacks import fgsm, pgd
from robustkern.evaluation.passes import Attack, correct


@dataclass(frozen=True)
class RobustAccuracy:
    """Fractions classified right: `clean`, and under each attack at each of `eps` (input units)."""

    clean: float
    eps: tuple[float, ...]
    fgsm: tuple[float, ...]
    pgd: tuple[float, ...]


def accuracy(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    attack: Attack | None = None,
    batch_size: int = 256,
    advance: Callable[[int], object] | None = None,
) -> float:
    r"""Fraction of samples whose largest output is at the target, in eval mode.

    Args:
        model: maps (N, \*D) to (N, classes); batches are moved to its device and its dtype.
        inputs: (N, \*D) floating point; for an attack, values in [0, 1].
        targets: (N,) int64 class indices.
        attack: `attack(model, inputs, targets)` gives the inputs to classify instead.
        batch_size: samples per forward pass; the memory used depends on it, the result does not.
        advance: called with the number of samples after each batch, as a progress bar's `update`
            wants it.

    Returns:
        A number in [0, 1].

    Raises:
        TypeError: `model` or `attack` returns no tensor.
        ValueError: no samples, `targets` of another length or out of range, outputs that are not
            (N, classes) or not finite, an attack that returns another shape or values outside
            [0, 1], or `batch_size` below 1.

    Example:
        >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    if len(inputs) != len(targets):
        raise ValueError(
            f"accuracy: targets must have inputs' length, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if len(inputs) == 0:
        raise ValueError(
            f"accuracy: inputs must hold at least one sample, got shape {tuple(inputs.shape)}"
        )
    right = correct("accuracy", model, inputs, targets, attack, batch_size, advance)
    return int(right.sum()) / len(inputs)


def robust_accuracy(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: Sequence[float],
    *,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    advance: Callable[[int], object] | None = None,
) -> RobustAccuracy:
    r"""Clean, FGSM and PGD accuracy over a range of eps.

    Args:
        model: maps (N, \*D) to (N, classes); batches are moved to its device and its dtype.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64 class indices.
        eps: L-infinity radii, in input units.
        steps: steps of PGD.
        seed: of PGD's random starts; they are the same at every eps, up to its length.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N (1 + 2 len(eps))
            samples.

    Returns:
        The accuracies, in the order of `eps`.

    Raises:
        TypeError: as `accuracy`, `fgsm` and `pgd` raise it.
        ValueError: as `accuracy`, `fgsm` and `pgd` raise it.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> robust_accuracy(model, torch.tensor([[0.0], [0.2]]), torch.tensor([0, 0]), [0.0, 0.3])
        RobustAccuracy(clean=1.0, eps=(0.0, 0.3), fgsm=(1.0, 1.0), pgd=(1.0, 1.0))
    """
    device = next(model.parameters(), inputs).device

    def measure(attack: Attack | None) -> float:
        return accuracy(
            model, inputs, targets, attack=attack, batch_size=batch_size, advance=advance
        )

    def by_fgsm(radius: float) -> Attack:
        return lambda model, batch, labels: fgsm(model, batch, labels, radius)

    def by_pgd(radius: float) -> Attack:
        starts = torch.Generator(device).manual_seed(seed)
        return lambda model, batch, labels: pgd(
            model, batch, labels, radius, steps=steps, generator=starts
        )

    return RobustAccuracy(
        clean=measure(None),
        eps=tuple(eps),
        fgsm=tuple(measure(by_fgsm(radius)) for radius in eps),
        pgd=tuple(measure(by_pgd(radius)) for radius in eps),
    )
