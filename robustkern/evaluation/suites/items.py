"""The measures of a report, each as plain data: what `evaluate_networks` takes of a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robustkern.evaluation.attacks import fgsm
from robustkern.evaluation.curves import AccuracyCurve, attack_ladder, wilson_interval
from robustkern.evaluation.detector import Detector, detection_table, roc_curve
from robustkern.evaluation.distances import adversarial_distances, deepfool_robustness
from robustkern.evaluation.failures import failure_indicators
from robustkern.evaluation.masking import label_leaking, masking_scatter
from robustkern.evaluation.report.verdict import strongest_attack
from robustkern.evaluation.segment import softmax_along_segment
from robustkern.evaluation.sensitivity import gradient_norms, gradient_statistics
from robustkern.evaluation.suites.subject import TWIN, Subject
from robustkern.evaluation.universal import universal

# In L-infinity every image can become grey within this radius, which no network stands.
LARGE_EPS = 0.5
_SHOWN = 5  # images in the report
_SEGMENTS = 3
_NORMS = 1000  # of a histogram
_ROC_POINTS = 50


def _clean(subject: Subject) -> dict[str, Any]:
    return _share(subject.right(subject.inputs))


def _fgsm_curve(subject: Subject) -> dict[str, Any]:
    return _curve(subject, "FGSM", subject.eps)


def _pgd_curve(subject: Subject) -> dict[str, Any]:
    return _curve(subject, "PGD-20", subject.eps)


def _lrc_curve(subject: Subject) -> dict[str, Any]:
    return _curve(subject, "LRC", subject.eps)


def _pgd_l2_curve(subject: Subject) -> dict[str, Any]:
    # A quarter of the way to the corner of the L-infinity ball: radii as they are usual in L2.
    scale = math.sqrt(subject.inputs[0].numel()) / 4
    return _curve(subject, "PGD-20 L2", tuple(scale * eps for eps in subject.eps))


def _curve(subject: Subject, name: str, radii: tuple[float, ...]) -> dict[str, Any]:
    """From the clean accuracy, at eps 0, on."""
    positive = [eps for eps in radii if eps > 0]
    tried = [subject.inputs, *(subject.attacked(name, eps).found for eps in positive)]
    count = min(map(len, tried))
    right = tuple(int(subject.right(found[:count]).sum()) for found in tried)
    curve = AccuracyCurve((0.0, *positive), right, count)
    low, high = zip(*curve.intervals(), strict=True)
    return {
        **dataclasses.asdict(curve),
        "accuracy": curve.accuracy,
        "low": low,
        "high": high,
        "area": curve.area,
    }


def _targeted(subject: Subject) -> dict[str, Any]:
    """PGD towards another label, drawn at random (Roth et al. 2018)."""
    source = torch.Generator().manual_seed(subject.seed)
    away = torch.randint(1, subject.classes, subject.targets.shape, generator=source)
    labels = (subject.targets + away.to(subject.targets)) % subject.classes
    attacked = subject.attacked("Targeted PGD-20", labels=labels)
    found = subject.predictions(attacked.found)
    reached = found == labels[: len(found)]
    return {**_share(found == attacked.targets), "reached": reached.double().mean()}


def _ladder(subject: Subject) -> dict[str, Any]:
    nearest = subject.attacked("DeepFool Linf")
    count = len(nearest.inputs)
    far = (nearest.found - nearest.inputs).flatten(1).abs().amax(1) > subject.radius
    left = far | (subject.predicted[:count] != nearest.targets)
    rungs = {
        "FGSM": subject.attacked("FGSM").found[:count],
        "DeepFool Linf": nearest.inputs.where(left.view(-1, 1, 1, 1), nearest.found),
        "PGD-7": subject.attacked("PGD-7").found[:count],
        "PGD-20": subject.attacked("PGD-20").found[:count],
    }
    ladder = attack_ladder(
        subject.model, nearest.inputs, nearest.targets, rungs, batch_size=subject.batch_size
    )
    return {"accuracy": ladder.accuracy, "gap": ladder.gap, "samples": count}


def _attacks(subject: Subject) -> dict[str, Any]:
    names = [*subject.attacks, *([TWIN] if subject.twin is not None else [])]
    right = {name: subject.right(subject.attacked(name).found) for name in names}
    standing = subject.right(subject.inputs)
    for each in right.values():
        standing[: len(each)] &= each
    found: dict[str, Any] = {
        "accuracy": {name: each.double().mean().item() for name, each in right.items()},
        "samples": {name: len(each) for name, each in right.items()},
    }
    # The worst case must not look better than the strongest attack, so it is of no more samples.
    largest = found["samples"][strongest_attack(found)]
    counts = {largest, *(count for count in found["samples"].values() if count < largest)}
    return {**found, "worst": _worst(standing, counts)}


def _worst(standing: Tensor, counts: set[int]) -> dict[str, Any]:
    """Of most samples, unless of those that more attacks were made on fewer stand beyond chance."""
    shares = [_share(standing[:count]) for count in sorted(counts, reverse=True)]
    return min(shares, key=lambda each: each["high" if each is not shares[0] else "accuracy"])


def _masking(subject: Subject) -> dict[str, Any]:
    white, black = subject.together("PGD-100", "SPSA")
    scatter = masking_scatter(
        subject.model,
        black.inputs,
        black.targets,
        white.found,
        black.found,
        batch_size=subject.batch_size,
    )
    return {**dataclasses.asdict(scatter), "below": scatter.below}


def _distances(subject: Subject) -> dict[str, Any]:
    return {name: _distance(subject, name) for name in subject.suite.distances}


def _distance(subject: Subject, name: str) -> dict[str, Any]:
    attacked = subject.attacked(name)
    p = math.inf if name.endswith("Linf") else 2
    found = adversarial_distances(
        subject.model,
        attacked.inputs,
        attacked.targets,
        attacked.found,
        p=p,
        batch_size=subject.batch_size,
    )
    return {
        "p": "inf" if p == math.inf else p,
        "median": found.median,
        "mean": found.mean,
        "misclassified": found.misclassified,
        "standing": found.standing,
        "samples": len(attacked.inputs),
    }


def _deepfool_robustness(subject: Subject) -> dict[str, Any]:
    attacked = subject.attacked("DeepFool L2")
    kept = attacked.inputs.flatten(1).any(1)  # beside an image all black no ratio can be taken
    if not kept.any():
        return {"rho": None, "changed": 0, "unchanged": 0}
    found = deepfool_robustness(
        subject.model, attacked.inputs[kept], attacked.found[kept], batch_size=subject.batch_size
    )
    return dataclasses.asdict(found)


def _gradients(subject: Subject) -> dict[str, Any]:
    found = gradient_statistics(
        subject.model, subject.inputs, subject.targets, batch_size=subject.batch_size
    )

    def norms(inputs: Tensor) -> Tensor:
        return gradient_norms(subject.model, inputs[:_NORMS], batch_size=subject.batch_size)

    return {
        "loss": {"mean": found.loss_mean, "max": found.loss_max},
        "outputs": {"mean": found.outputs_mean, "max": found.outputs_max},
        "clean_norms": norms(subject.inputs),
        "pgd_norms": norms(subject.attacked("PGD-20").found),
    }


def _detection(subject: Subject) -> dict[str, Any]:
    assert subject.calibration is not None
    model, size = subject.model, subject.batch_size
    detector = Detector.fit(model, subject.calibration[0].to(subject.inputs), batch_size=size)
    # The attacker knows the threshold.
    subject.attacked("Evasive CW", threshold=detector.threshold)
    names = {"PGD": "PGD-20", "Boundary": "Boundary", "CW": "CW L2", "Evasive CW": "Evasive CW"}
    attacks = dict(zip(names, subject.together(*names.values()), strict=True))
    inputs, targets = attacks["CW"].inputs, attacks["CW"].targets
    adversarial = {name: attacked.found for name, attacked in attacks.items()}
    table = detection_table(detector, model, inputs, targets, adversarial, batch_size=size)
    clean, right = detector.score(model, inputs, batch_size=size), subject.right(inputs)

    def roc(found: Tensor) -> dict[str, Any] | None:
        fooled = right & ~subject.right(found)
        if not fooled.any():
            return None
        curve = roc_curve(clean, detector.score(model, found[fooled], batch_size=size))
        kept = torch.linspace(0, len(curve.thresholds) - 1, _ROC_POINTS).long()
        return {
            "false_positive": curve.false_positive_rate[kept],
            "true_positive": curve.true_positive_rate[kept],
            "auc": curve.auc,
        }

    return {
        **dataclasses.asdict(table),
        "threshold": detector.threshold,
        "calibration": len(subject.calibration[0]),
        "roc": {name: roc(found) for name, found in adversarial.items()},
    }


def _segments(subject: Subject) -> dict[str, Any]:
    attacked = subject.attacked("PGD-20")
    return {
        "labels": attacked.targets[:_SEGMENTS],
        "probabilities": softmax_along_segment(
            subject.model,
            attacked.inputs[:_SEGMENTS],
            attacked.found[:_SEGMENTS],
            batch_size=subject.batch_size,
        ),
    }


def _label_leaking(subject: Subject) -> dict[str, Any]:
    found = label_leaking(
        subject.model,
        subject.inputs,
        subject.targets,
        lambda model, batch, labels: fgsm(model, batch, labels, subject.radius),
        batch_size=subject.batch_size,
    )
    return {**dataclasses.asdict(found), "leaks": found.leaks}


def _failures(subject: Subject) -> dict[str, Any]:
    white, black = subject.together("PGD-20", "Square")
    large = subject.attacked("PGD-20", LARGE_EPS).found
    count = min(len(white.found), len(large))
    found = failure_indicators(
        subject.model,
        white.inputs[:count],
        white.targets[:count],
        white_box=white.found[:count],
        black_box=black.found[:count],
        large=large[:count],
        batch_size=subject.batch_size,
    )
    return dataclasses.asdict(found)


def _subspace(subject: Subject) -> dict[str, Any]:
    size = subject.inputs[0].numel()
    dimensions = sorted({max(1, size // part) for part in (64, 16, 4, 1)})

    def median(dim: int) -> float | None:
        attacked = subject.attacked(f"Subspace, {dim} dimensions", dim=dim)
        return adversarial_distances(
            subject.model,
            attacked.inputs,
            attacked.targets,
            attacked.found,
            batch_size=subject.batch_size,
        ).median

    return {"dimensions": dimensions, "median_distance": [median(dim) for dim in dimensions]}


def _universal(subject: Subject) -> dict[str, Any]:
    """Learned on the calibration samples, tried on the others."""
    assert subject.calibration is not None
    inputs, targets = subject.calibration
    place = next(subject.model.parameters(), inputs)
    shared = universal(
        subject.model, inputs.to(place), targets.to(place.device), subject.radius
    ).to(subject.inputs)
    before = subject.predictions(subject.inputs)
    after = subject.predictions((subject.inputs + shared).clamp(0, 1))
    return {"fooled": (before != after).double().mean(), "eps": subject.radius}


def _images(subject: Subject) -> dict[str, Any]:
    names = [*subject.attacks, *subject.suite.distances]
    names += ["LRC"] if "lrc_curve" in subject.suite.items else []
    adversarial = {name: subject.attacked(name).found for name in names}
    shown = {
        name: images[:_SHOWN] for name, images in {"clean": subject.inputs, **adversarial}.items()
    }
    bytes_of = {name: (255 * images).round().to(torch.uint8) for name, images in shown.items()}
    return {
        "labels": subject.targets[:_SHOWN],
        "clean": bytes_of.pop("clean"),
        "adversarial": bytes_of,
        "predictions": {name: subject.predictions(images) for name, images in shown.items()},
    }


ITEMS: Mapping[str, Callable[[Subject], dict[str, Any]]] = {
    "clean": _clean,
    "fgsm_curve": _fgsm_curve,
    "pgd_curve": _pgd_curve,
    "attacks": _attacks,
    "failures": _failures,
    "gradients": _gradients,
    "images": _images,
    "lrc_curve": _lrc_curve,
    "pgd_l2_curve": _pgd_l2_curve,
    "targeted": _targeted,
    "label_leaking": _label_leaking,
    "segments": _segments,
    "ladder": _ladder,
    "masking": _masking,
    "distances": _distances,
    "deepfool_robustness": _deepfool_robustness,
    "detection": _detection,
    "subspace": _subspace,
    "universal": _universal,
}


def _share(right: Tensor) -> dict[str, Any]:
    found, samples = int(right.sum()), len(right)
    low, high = wilson_interval(found, samples)
    accuracy = found / samples
    return {"right": found, "samples": samples, "accuracy": accuracy, "low": low, "high": high}
