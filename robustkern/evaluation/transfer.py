"""Attacks made against one network and tried on another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from robustkern.evaluation.passes import Advance, Attack, attacked, check_data, correct


@dataclass(frozen=True)
class TransferMatrix:
    """Accuracies of networks on the adversarial inputs of others (Roth et al. 2018, table 1).

    Attributes:
        evaluated: names of the rows, the networks that classify.
        sources: names of the columns, the networks that were attacked.
        accuracy: a row for each network that classifies. Where both are one network the attack is
            white box; a row that falls lower elsewhere speaks of masked gradients.
    """

    evaluated: tuple[str, ...]
    sources: tuple[str, ...]
    accuracy: tuple[tuple[float, ...], ...]


def transfer_matrix(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    targets: Tensor,
    attack: Attack,
    *,
    sources: Mapping[str, nn.Module] | None = None,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> TransferMatrix:
    r"""Accuracy of each model on the adversarial inputs of each source.

    Args:
        models: for each name a network that maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        attack: `attack(model, inputs, targets)` gives adversarial inputs for a batch.
        sources: the networks to attack; `models` when None. How a model's own attack transfers is
            seen with a twin of it, trained the same way from another seed:
            `sources={**models, "twin of a": twin}`.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all
            N len(sources) (1 + len(models)) samples.

    Returns:
        The matrix, in the orders of `models` and `sources`.

    Raises:
        TypeError: a model is no module, `inputs` are not floating point, `targets` not int64, or
            the attack returns no tensor.
        ValueError: no model, no source, no samples, values outside [0, 1], `targets` out of range
            or all of one class, an attack that returns another shape, outputs that are not
            (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> import torch
        >>> from robustkern.evaluation import fgsm
        >>> one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        >>> _ = one.weight.data.copy_(torch.eye(2)), other.weight.data.copy_(torch.eye(2))
        >>> other.weight.data[:, 1] *= 3
        >>> inputs, targets = torch.tensor([[0.75, 0.5], [0.25, 0.5]]), torch.tensor([0, 1])
        >>> found = transfer_matrix(
        ...     {"one": one, "other": other}, inputs, targets, lambda *batch: fgsm(*batch, eps=0.25)
        ... )
        >>> found.accuracy
        ((0.0, 0.0), (0.5, 0.5))
    """
    caller = "transfer_matrix"
    sources = models if sources is None else sources
    for name, networks in (("models", models), ("sources", sources)):
        if not networks:
            raise ValueError(f"{caller}: {name} must hold at least one network, got none")
    for model in {**models, **sources}.values():
        check_data(caller, model, inputs, targets)
    columns = []
    for source in sources.values():
        adversarial = attacked(caller, source, inputs, targets, attack, batch_size, advance)
        right = [
            correct(caller, model, adversarial, targets, None, batch_size, advance)
            for model in models.values()
        ]
        columns.append([int(each.sum()) / len(inputs) for each in right])
    return TransferMatrix(tuple(models), tuple(sources), tuple(zip(*columns, strict=True)))
