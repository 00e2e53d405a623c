"""Passes of a classifier over a data set, batch by batch, and the checks they begin with.

Every measure is made of these. They run the model in eval mode and leave it, its `.grad` and the
random state as they were; batches move to its device and dtype, results come back to the inputs'.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustkern.analysis.samples import by_batch, check_labels, logits
from robustkern.evaluation.attacks import _check

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Advance = Callable[[int], object]


def adversarial_inputs(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Attack,
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> Tensor:
    r"""What an attack makes of a data set: attack once, then measure as often as needed.

    Args:
        model: maps (N, \*D) to (N, classes); attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the labels that the attack is told.
        attack: `attack(model, inputs, targets)` gives adversarial inputs for a batch.
        batch_size: samples per batch.
        advance: called with the number of samples after each batch; in all N samples.

    Returns:
        (N, \*D), on the device of `inputs`, of the dtype that the attack returns, detached.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point, `targets` not int64, or
            the attack returns no tensor.
        ValueError: no samples, `inputs` outside [0, 1], `targets` of another shape, `batch_size`
            below 1, or the attack returns another shape or values outside [0, 1].

    Example:
        >>> from robustkern.evaluation import fgsm
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> inputs, targets = torch.tensor([[0.5], [0.25]]), torch.tensor([0, 1])
        >>> adversarial_inputs(model, inputs, targets, lambda *batch: fgsm(*batch, eps=0.25))
        tensor([[0.7500],
                [0.0000]])
    """
    caller = "adversarial_inputs"
    check_samples(caller, model, inputs, targets)
    return attacked(caller, model, inputs, targets, attack, batch_size, advance)


def attacked(
    caller: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Attack,
    batch_size: int,
    advance: Advance | None,
) -> Tensor:
    """`adversarial_inputs` of data that are checked."""

    def found(batch: Tensor, labels: Tensor) -> Tensor:
        return _attack_batch(caller, model, batch, labels, attack)

    return by_batch(caller, model, found, batch_size, inputs, targets, advance=advance)


def outputs_of(
    caller: str, model: nn.Module, inputs: Tensor, batch_size: int, advance: Advance | None
) -> Tensor:
    """The model's outputs, checked: (N, classes), float32 or better."""

    def found(batch: Tensor) -> Tensor:
        return logits(caller, model, batch)

    return by_batch(caller, model, found, batch_size, inputs, advance=advance)


def correct(
    caller: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Attack | None,
    batch_size: int,
    advance: Advance | None,
) -> Tensor:
    """Whether each sample is classified right, after the attack if there is one: (N,) bool."""

    def right(batch: Tensor, labels: Tensor) -> Tensor:
        if attack is not None:
            batch = _attack_batch(caller, model, batch, labels, attack)
        outputs = logits(caller, model, batch)
        check_labels(caller, labels, outputs)
        return outputs.argmax(1) == labels

    return by_batch(caller, model, right, batch_size, inputs, targets, advance=advance)


def check_data(caller: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Refuse samples as `check_samples` does, and those on which a constant would be right."""
    check_samples(caller, model, inputs, targets)
    if targets.min() == targets.max():
        raise ValueError(
            f"{caller}: targets must hold at least two classes, got {int(targets[0])} only"
        )


def check_samples(
    caller: str, model: nn.Module, inputs: Tensor, targets: Tensor | None = None
) -> None:
    """Refuse what is no network, no inputs or no labels; the labels' range is `check_labels`'s."""
    labels = inputs if targets is None else targets
    if targets is not None and not (isinstance(targets, Tensor) and targets.dtype == torch.int64):
        came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{caller}: targets must be an int64 tensor, got {came}")
    _check(caller, model, inputs, labels, 0.0)
    if inputs.dim() < 2 or not inputs.numel():
        raise ValueError(
            f"{caller}: inputs must be (N, *D) with at least one sample, got {tuple(inputs.shape)}"
        )
    if labels.device != inputs.device:
        raise ValueError(
            f"{caller}: targets must be on inputs' device, got {inputs.device} and {labels.device}"
        )
    if targets is not None and targets.dim() != 1:
        raise ValueError(f"{caller}: targets must be (N,), got {tuple(targets.shape)}")


def check_adversarial(caller: str, name: str, adversarial: Tensor, inputs: Tensor) -> None:
    """Refuse adversarial inputs that cannot come from these inputs."""
    if not isinstance(adversarial, Tensor) or not adversarial.is_floating_point():
        came = adversarial.dtype if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise TypeError(f"{caller}: {name} must be a floating-point tensor, got {came}")
    if adversarial.shape != inputs.shape:
        raise ValueError(
            f"{caller}: {name} must have inputs' shape, "
            f"got {tuple(inputs.shape)} and {tuple(adversarial.shape)}"
        )
    if adversarial.device != inputs.device:
        raise ValueError(
            f"{caller}: {name} must be on inputs' device, "
            f"got {inputs.device} and {adversarial.device}"
        )
    low, high = (bound.item() for bound in adversarial.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{caller}: {name} must lie in [0, 1], got values from {low:g} to {high:g}"
        )


def _attack_batch(
    caller: str, model: nn.Module, batch: Tensor, labels: Tensor, attack: Attack
) -> Tensor:
    with torch.enable_grad():
        adversarial = attack(model, batch, labels)
    check_adversarial(caller, "what attack returns", adversarial, batch)
    return adversarial
