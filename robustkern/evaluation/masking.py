"""Signs that a network hides its gradients or learned to read attacks, rather than stand them.

Where gradients are hidden a gradient attack fails on a network that is not robust. None of these
signs proves it, and their absence proves nothing: always report a gradient-free attack too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustkern.analysis.samples import check_labels
from robustkern.evaluation.attacks import _margin
from robustkern.evaluation.passes import (
    Advance,
    Attack,
    attacked,
    check_adversarial,
    check_data,
    outputs_of,
)

_STRAY = 0.01  # of accuracy; a smaller difference is put down to chance


@dataclass(frozen=True, eq=False)
class MaskingScatter:
    """What two attacks leave of each sample's logit gap (Moosavi-Dezfooli et al. 2019, fig. 7).

    Attributes:
        white_box: (N,), the true class's logit less the largest other one, after a gradient attack.
        black_box: (N,), the same after a gradient-free attack.
    """

    white_box: Tensor
    black_box: Tensor

    @property
    def below(self) -> float:
        """Share of samples below the diagonal: there the attack without gradients did better."""
        return (self.black_box < self.white_box).double().mean().item()


def masking_scatter(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    white_box: Tensor,
    black_box: Tensor,
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> MaskingScatter:
    r"""Logit gaps under a gradient attack, such as PGD(100), against a gradient-free one, as SPSA.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        white_box: (N, \*D), adversarial inputs of the gradient attack.
        black_box: (N, \*D), those of the gradient-free one, at the same eps.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all 2 N samples.

    Returns:
        The points of the scatter plot; most lie on or above the diagonal if nothing is hidden.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: no samples, values outside [0, 1], shapes that do not fit, `targets` out of
            range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
        >>> import torch
        >>> inputs, targets = torch.tensor([[0.75, 0.25], [0.0, 0.5]]), torch.tensor([0, 1])
        >>> weak = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
        >>> masking_scatter(nn.Identity(), inputs, targets, inputs, weak).below
        0.5
    """
    caller = "masking_scatter"
    check_data(caller, model, inputs, targets)
    check_adversarial(caller, "white_box", white_box, inputs)
    check_adversarial(caller, "black_box", black_box, inputs)

    def gap(found: Tensor) -> Tensor:
        outputs = outputs_of(caller, model, found, batch_size, advance)
        check_labels(caller, targets, outputs)
        return _margin(outputs, targets)

    return MaskingScatter(gap(white_box), gap(black_box))


@dataclass(frozen=True)
class LabelLeaking:
    """Accuracies that tell whether an attack betrays the labels it was told.

    Attributes:
        clean: accuracy without attack.
        true_labels: under the attack that moves away from the true labels.
        predicted_labels: under the attack that moves away from the predictions.
    """

    clean: float
    true_labels: float
    predicted_labels: float

    @property
    def leaks(self) -> bool:
        """Whether inputs attacked at their true labels are the easier ones, by more than 1%."""
        return self.true_labels > min(self.clean, self.predicted_labels) + _STRAY


def label_leaking(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Attack,
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> LabelLeaking:
    r"""Whether a network reads the label off a one-step attack (Kurakin et al. 2017).

    One trained on FGSM may learn that its perturbations, made with the true labels, depend on them:
    then it is more accurate on them than on clean inputs, or than where the attack did not know.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        attack: `attack(model, inputs, labels)` gives adversarial inputs for a batch, as `fgsm` of
            some eps does.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all 5 N samples.

    Returns:
        The accuracies and `leaks`.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point, `targets` not int64, or
            the attack returns no tensor.
        ValueError: no samples, values outside [0, 1], `targets` out of range or all of one class,
            an attack that returns another shape, outputs that are not (N, classes) or not finite,
            or `batch_size` below 1.

    Example:
        >>> import torch
        >>> def telling(model, inputs, labels):
        ...     return torch.nn.functional.one_hot(labels, 2).to(inputs)
        >>> inputs, targets = torch.tensor([[0.75, 0.25], [0.5, 0.25]]), torch.tensor([0, 1])
        >>> label_leaking(nn.Identity(), inputs, targets, telling)
        LabelLeaking(clean=0.5, true_labels=1.0, predicted_labels=0.5)
    """
    caller = "label_leaking"
    check_data(caller, model, inputs, targets)

    clean = outputs_of(caller, model, inputs, batch_size, advance)
    check_labels(caller, targets, clean)
    predicted = clean.argmax(1)

    def accuracy(labels: Tensor) -> float:
        found = attacked(caller, model, inputs, labels, attack, batch_size, advance)
        right = outputs_of(caller, model, found, batch_size, advance).argmax(1) == targets
        return int(right.sum()) / len(right)

    right = int((predicted == targets).sum())
    return LabelLeaking(right / len(inputs), accuracy(targets), accuracy(predicted))
