"""Signs that a network hides its gradients, so that gradient attacks overrate it.

Hidden gradients make an attack fail without making the network robust. None of these signs proves
it, and their absence proves nothing: always report a gradient-free attack too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.evaluation.passes import (
    Advance,
    Attack,
    attacked,
    by_batch,
    check_adversarial,
    check_data,
    check_samples,
    correct,
    logit_gaps,
    logits,
    losses,
    predictions,
)
from robustkern.evaluation.sensitivity import norms

# Of the samples; a sign that fewer show than this is put down to chance.
_STRAY = 0.01


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
        >>> inputs, targets = torch.tensor([[0.75, 0.25], [0.0, 0.5]]), torch.tensor([0, 1])
        >>> weak = torch.tensor([[0.5, 0.25], [0.0, 0.5]])
        >>> masking_scatter(nn.Identity(), inputs, targets, inputs, weak).below
        0.5
    """
    caller = "masking_scatter"
    check_data(caller, model, inputs, targets)
    check_adversarial(caller, "white_box", white_box, inputs)
    check_adversarial(caller, "black_box", black_box, inputs)
    return MaskingScatter(
        logit_gaps(caller, model, white_box, targets, batch_size, advance),
        logit_gaps(caller, model, black_box, targets, batch_size, advance),
    )


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
        """Whether inputs attacked at their true labels are the easier ones."""
        return self.true_labels > min(self.clean, self.predicted_labels)


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
        advance: called with the number of samples after each batch; in all 6 N samples.

    Returns:
        The accuracies and `leaks`.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point, `targets` not int64, or
            the attack returns no tensor.
        ValueError: no samples, values outside [0, 1], `targets` out of range or all of one class,
            an attack that returns another shape, outputs that are not (N, classes) or not finite,
            or `batch_size` below 1.

    Example:
        >>> def telling(model, inputs, labels):
        ...     return torch.nn.functional.one_hot(labels, 2).to(inputs)
        >>> inputs, targets = torch.tensor([[0.75, 0.25], [0.5, 0.25]]), torch.tensor([0, 1])
        >>> label_leaking(nn.Identity(), inputs, targets, telling)
        LabelLeaking(clean=0.5, true_labels=1.0, predicted_labels=0.5)
    """
    caller = "label_leaking"
    check_data(caller, model, inputs, targets)

    def accuracy(found: Tensor) -> float:
        right = correct(caller, model, found, targets, None, batch_size, advance)
        return int(right.sum()) / len(right)

    predicted = predictions(caller, model, inputs, batch_size, advance)
    at_true, at_predicted = (
        attacked(caller, model, inputs, labels, attack, batch_size, advance)
        for labels in (targets, predicted)
    )
    return LabelLeaking(accuracy(inputs), accuracy(at_true), accuracy(at_predicted))


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
            one; raised above 0.
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
        advance: called with the number of samples after each batch; in all 7 N samples.

    Returns:
        The indicators.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: no samples, values outside [0, 1], shapes that do not fit, `targets` out of
            range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
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

    def right(found: Tensor) -> Tensor:
        return correct(caller, model, found, targets, None, batch_size, advance)

    def loss(found: Tensor) -> Tensor:
        return losses(caller, model, found, targets, batch_size, advance)

    before = right(inputs)

    def share(samples: Tensor) -> float:
        # Misclassified ones an attack need not touch.
        return int((samples & before).sum()) / max(int(before.sum()), 1)

    def accuracy(found: Tensor) -> float:
        return int(right(found).sum()) / len(inputs)

    zero = share(norms(caller, model, inputs, targets, torch.inf, batch_size, advance) == 0)
    flat = share(loss(white_box) <= loss(inputs))
    stronger = accuracy(white_box) - accuracy(black_box)
    standing = accuracy(large)
    return FailureIndicators(
        zero_gradients=Indicator(zero > _STRAY, zero),
        flat_loss=Indicator(flat > _STRAY, flat),
        black_box_stronger=Indicator(stronger > 0, stronger),
        robust_at_large_eps=Indicator(standing > 0, standing),
    )


def softmax_along_segment(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    *,
    points: int = 21,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> Tensor:
    r"""Class probabilities on the way from clean to adversarial inputs (Roth et al. 2018, fig. 6).

    .. math:: \mathrm{softmax}\, f((1 - t)\, x + t\, x_{\mathrm{adv}}), \qquad t \in [0, 1]

    Args:
        model: maps (N, \*D) to (N, classes), logits; taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        adversarial: (N, \*D), values in [0, 1].
        points: values of t, evenly spaced, both ends among them.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N points samples.

    Returns:
        (N, points, classes), float32 or better, detached.

    Raises:
        TypeError: `model` is no module or a tensor is not floating point.
        ValueError: `points` below 2, no samples, values outside [0, 1], shapes that do not fit,
            outputs that are not (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> inputs, adversarial = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> softmax_along_segment(nn.Identity(), inputs, adversarial, points=3)
        tensor([[[0.7311, 0.2689],
                 [0.5000, 0.5000],
                 [0.2689, 0.7311]]])
    """
    caller = "softmax_along_segment"
    check_samples(caller, model, inputs)
    check_adversarial(caller, "adversarial", adversarial, inputs)
    if points < 2:
        raise ValueError(f"{caller}: points must be at least 2, got {points}")

    def softmax(batch: Tensor) -> Tensor:
        return logits(caller, model, batch).softmax(1)

    return torch.stack(
        [
            by_batch(caller, model, softmax, between, None, batch_size, advance)
            for between in (
                inputs.lerp(adversarial.to(inputs.dtype), step / (points - 1))
                for step in range(points)
            )
        ],
        dim=1,
    )
