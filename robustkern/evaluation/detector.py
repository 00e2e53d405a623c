"""Detection of adversarial inputs by the norm of their input gradient (Finlay et al. 2018).

Attacks end near a decision boundary, where the loss at the predicted label is steep. A network
with a gradient penalty is flat elsewhere, so there the norm tells attacked inputs from others. It
is no defence by itself: an attack that knows of it can keep the norm small.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.evaluation.balls import distances
from robustkern.evaluation.passes import (
    Advance,
    check_adversarial,
    check_data,
    check_samples,
    correct,
)
from robustkern.evaluation.sensitivity import norms


@dataclass(frozen=True)
class Detector:
    """Flags inputs whose gradient norm at the predicted label exceeds a threshold.

    Attributes:
        threshold: norms above it are flagged; per input unit.
        p: of the norm; 1, 2 or infinity.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[8.0], [0.0]]))
        >>> detector = Detector.fit(model, torch.linspace(0.2, 1, 39).unsqueeze(1))
        >>> detector.flag(model, torch.tensor([[0.1], [0.9]]))  # near the boundary, which is at 0
        tensor([ True, False])
    """

    threshold: float
    p: float = 2

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        inputs: Tensor,
        false_positive_rate: float = 0.05,
        *,
        p: float = 2,
        batch_size: int = 256,
        advance: Advance | None = None,
    ) -> Detector:
        r"""Choose the threshold on clean inputs.

        It is the r-th smallest norm, r = N + 1 - floor((N + 1) rate), for which a further clean
        input is flagged with a probability of at most `rate`, if it comes from where these do: take
        inputs that the model was not trained on.

        Args:
            model: maps (N, \*D) to (N, classes); taken in eval mode.
            inputs: (N, \*D) floating point, values in [0, 1]; misclassified ones belong to them.
            false_positive_rate: share of clean inputs that may be flagged, in (0, 1).
            p: of the norm; 1, 2 or infinity.
            batch_size: samples per pass.
            advance: called with the number of samples after each batch; in all N samples.

        Returns:
            The detector.

        Raises:
            TypeError: `model` is no module or `inputs` are not floating point.
            ValueError: another p, a rate outside (0, 1), fewer samples than 1 / rate - 1, `inputs`
                outside [0, 1], outputs that are not (N, classes) or not finite, or `batch_size`
                below 1.
        """
        if not 0 < false_positive_rate < 1:
            raise ValueError(
                f"Detector.fit: false_positive_rate must lie in (0, 1), got {false_positive_rate}"
            )
        check_samples("Detector.fit", model, inputs)
        allowed = math.floor((len(inputs) + 1) * false_positive_rate)
        if not allowed:
            raise ValueError(
                f"Detector.fit: inputs must hold at least {math.ceil(1 / false_positive_rate) - 1} "
                f"samples for a false_positive_rate of {false_positive_rate}, got {len(inputs)}"
            )
        scores = norms("Detector.fit", model, inputs, None, p, batch_size, advance)
        return cls(scores.kthvalue(len(inputs) + 1 - allowed).values.item(), p)

    def score(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        batch_size: int = 256,
        advance: Advance | None = None,
    ) -> Tensor:
        r"""The norm of each sample's input gradient of the cross entropy at the predicted label.

        Args:
            model: the one fitted to.
            inputs: (N, \*D) floating point, values in [0, 1].
            batch_size: samples per pass.
            advance: called with the number of samples after each batch; in all N samples.

        Returns:
            (N,), float32 or better, detached.

        Raises:
            TypeError: as `fit` raises it.
            ValueError: as `fit` raises it.
        """
        check_samples("Detector.score", model, inputs)
        return norms("Detector.score", model, inputs, None, self.p, batch_size, advance)

    def flag(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        batch_size: int = 256,
        advance: Advance | None = None,
    ) -> Tensor:
        r"""Whether each sample looks adversarial.

        Args:
            model: the one fitted to.
            inputs: (N, \*D) floating point, values in [0, 1].
            batch_size: samples per pass.
            advance: called with the number of samples after each batch; in all N samples.

        Returns:
            (N,) bool.

        Raises:
            TypeError: as `fit` raises it.
            ValueError: as `fit` raises it.
        """
        check_samples("Detector.flag", model, inputs)
        scores = norms("Detector.flag", model, inputs, None, self.p, batch_size, advance)
        return scores > self.threshold


@dataclass(frozen=True, eq=False)
class ROC:
    """Receiver operating characteristic: what each threshold flags, from none to all.

    Attributes:
        thresholds: (T,) float64, falling; scores above are flagged; the last is minus infinity.
        false_positive_rate: (T,) float64, share of clean samples flagged.
        true_positive_rate: (T,) float64, share of adversarial samples flagged.
    """

    thresholds: Tensor
    false_positive_rate: Tensor
    true_positive_rate: Tensor

    @property
    def auc(self) -> float:
        """Area under it: how often an adversarial score exceeds a clean one, ties half counted."""
        return torch.trapezoid(self.true_positive_rate, self.false_positive_rate).item()


def roc_curve(clean: Tensor, adversarial: Tensor) -> ROC:
    """The receiver operating characteristic of a detector's scores.

    Args:
        clean: (N,) scores of clean samples, finite.
        adversarial: (M,) scores of adversarial ones, finite.

    Returns:
        The curve; its area is `.auc`.

    Raises:
        TypeError: scores are not floating-point tensors.
        ValueError: no scores, another number of dimensions, or scores that are not finite.

    Example:
        >>> roc_curve(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.9])).auc
        0.75
    """
    for name, scores in (("clean", clean), ("adversarial", adversarial)):
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            came = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"roc_curve: {name} must be a floating-point tensor, got {came}")
        if scores.dim() != 1 or not len(scores) or not scores.isfinite().all():
            raise ValueError(
                f"roc_curve: {name} must be (N,) finite scores, at least one, "
                f"got {tuple(scores.shape)}, {int(scores.isfinite().sum())} of them finite"
            )
    each = torch.cat([clean, adversarial]).double().sort(descending=True).values
    thresholds = torch.cat([each, each.new_tensor([-torch.inf])])

    def above(scores: Tensor) -> Tensor:
        below = torch.searchsorted(scores.double().sort().values, thresholds, right=True)
        return (len(scores) - below).double() / len(scores)

    return ROC(thresholds, above(clean), above(adversarial))


@dataclass(frozen=True)
class Detection:
    """How one attack fares against a detector. What needs a fooled sample is None without one.

    Attributes:
        fooled: samples classified right before the attack and wrong after it.
        flagged: share of those that the detector flags.
        auc: area under their receiver operating characteristic, against all clean samples.
        median_distance: of those to their clean samples, L2, in input units.
    """

    fooled: int
    flagged: float | None
    auc: float | None
    median_distance: float | None


@dataclass(frozen=True)
class DetectionTable:
    """What a detector makes of clean samples and of attacks.

    Attributes:
        samples: clean ones.
        false_positive_rate: share of clean samples flagged.
        attacks: for each attack how it fares.
    """

    samples: int
    false_positive_rate: float
    attacks: dict[str, Detection]


def detection_table(
    detector: Detector,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    adversarial: Mapping[str, Tensor],
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> DetectionTable:
    r"""Share of adversarial inputs flagged, among those that fool the model, and their distance.

    Args:
        detector: fitted to other samples than these.
        model: the one fitted to.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        adversarial: for each attack's name its (N, \*D) adversarial inputs, in [0, 1].
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all
            2 N (1 + len(adversarial)) samples.

    Returns:
        The table, in the order of `adversarial`.

    Raises:
        TypeError: `model` is no module, a tensor is not floating point, or `targets` not int64.
        ValueError: no samples, values outside [0, 1], shapes that do not fit, `targets` out of
            range or all of one class, outputs that are not (N, classes) or not finite, or
            `batch_size` below 1.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.weight), model.bias.data.copy_(torch.tensor([1.0, 0.0]))
        >>> inputs, targets = torch.tensor([[0.0], [0.5]]), torch.tensor([0, 1])
        >>> detection_table(Detector(1.0), model, inputs, targets, {"none": inputs})
        DetectionTable(samples=2, false_positive_rate=0.0, attacks={'none': Detection(fooled=0,
            flagged=None, auc=None, median_distance=None)})
    """
    caller = "detection_table"
    check_data(caller, model, inputs, targets)
    for name, found in adversarial.items():
        check_adversarial(caller, f"adversarial[{name!r}]", found, inputs)
    clean = norms(caller, model, inputs, None, detector.p, batch_size, advance)
    right = correct(caller, model, inputs, targets, None, batch_size, advance)

    def detection(found: Tensor) -> Detection:
        scores = norms(caller, model, found, None, detector.p, batch_size, advance)
        fooled = right & ~correct(caller, model, found, targets, None, batch_size, advance)
        if not fooled.any():
            return Detection(0, None, None, None)
        lengths = distances(found[fooled], inputs[fooled], 2)
        return Detection(
            fooled=int(fooled.sum()),
            flagged=(scores[fooled] > detector.threshold).double().mean().item(),
            auc=roc_curve(clean, scores[fooled]).auc,
            median_distance=statistics.median(lengths.tolist()),
        )

    return DetectionTable(
        samples=len(inputs),
        false_positive_rate=(clean > detector.threshold).double().mean().item(),
        attacks={name: detection(found) for name, found in adversarial.items()},
    )
