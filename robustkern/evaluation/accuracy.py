"""Accuracy of a classifier: on the inputs as they are, and under attack over a range of eps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.evaluation.attacks import evaluating, fgsm, pgd

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


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
        ValueError: no samples, or `targets` of another length.

    Example:
        >>> accuracy(nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    _check_set("accuracy", inputs, targets)
    example = next(model.parameters(), inputs)
    right = 0
    with evaluating(model), torch.no_grad():
        for batch, labels in zip(
            torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True
        ):
            batch, labels = batch.to(example), labels.to(example.device)
            if attack is not None:
                batch = attack(model, batch, labels)
            right += int((model(batch).argmax(dim=1) == labels).sum())
            if advance is not None:
                advance(len(batch))
    return right / len(inputs)


def adversarial_inputs(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Attack,
    *,
    batch_size: int = 256,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    r"""The inputs under an attack, batch by batch.

    Args:
        model: maps (N, \*D) to (N, classes); batches are moved to its device and its dtype.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64 class indices.
        attack: `attack(model, inputs, targets)` gives the adversarial inputs of a batch.
        batch_size: samples that are attacked at a time.
        advance: called with the number of samples after each batch.

    Returns:
        (N, \*D) of the device of `inputs` and the dtype of the model, detached.

    Raises:
        ValueError: no samples, or `targets` of another length.

    Example:
        >>> from functools import partial
        >>> from robustkern.evaluation import pgd
        >>> attack = partial(pgd, eps=0.5, p=2)
        >>> inputs, targets = torch.rand(6, 4), torch.arange(6) % 3
        >>> adversarial_inputs(nn.Linear(4, 3), inputs, targets, attack, batch_size=4).shape
        torch.Size([6, 4])
    """
    _check_set("adversarial_inputs", inputs, targets)
    example = next(model.parameters(), inputs)
    found = []
    for batch, labels in zip(
        torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True
    ):
        attacked = attack(model, batch.to(example), labels.to(example.device))
        found.append(attacked.detach().to(inputs.device))
        if advance is not None:
            advance(len(batch))
    return torch.cat(found)


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


def _check_set(name: str, inputs: Tensor, targets: Tensor) -> None:
    if len(inputs) != len(targets):
        raise ValueError(
            f"{name}: targets must have inputs' length, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if len(inputs) == 0:
        raise ValueError(
            f"{name}: inputs must hold at least one sample, got shape {tuple(inputs.shape)}"
        )
