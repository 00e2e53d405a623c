"""Penalties from plain data, as the command line gives them and a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from robustkern.covariance import CovarianceFunction
from robustkern.evaluation import deepfool_source, fgsm_source, gradient_source, pgd_source
from robustkern.evaluation.perturbations import Source
from robustkern.penalties import (
    CURE,
    SGR,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    LocalLinearity,
    Penalty,
    Sum,
)
from robustkern.training.models import Shape
from robustkern.training.schedules import Schedule

Options = Mapping[str, Any]

_CURE = {"weight": "4", "h": "1.5", "direction": "sign", "samples": 1, "norm": False, "every": 1}
# What each penalty can be told, and what holds otherwise. CURE's are the paper's.
DEFAULTS: dict[str, Options] = {
    "none": {},
    "cure": _CURE,
    "anchored-cure": _CURE,
    "gn": {"weight": "1", "every": 1},
    "tv": {"weight": "0.1", "p": 2.0, "every": 1},
    "lipschitz": {"weight": "0.1", "p": 2.0, "every": 1},
    "llr": {"weight": "1", "mu": 1.0, "eps": 0.1, "steps": 2, "every": 1},
    "sgr": {
        "weight": "1",
        "source": "sign",
        "attack_eps": 0.1,
        "standardize": None,
        "decay": 0.1,
        "update_every": 1,
        "every": 1,
    },
}
# What may give SGR its perturbations besides the step's own gradients; eps is --attack-eps.
_ATTACKS: dict[str, Callable[[nn.Module, float], Source]] = {
    "fgsm": fgsm_source,
    "pgd": pgd_source,
    "deepfool": lambda model, eps: deepfool_source(model),
    "predicted-sign": lambda model, eps: gradient_source(model),
    "predicted-gradient": lambda model, eps: gradient_source(model, sign=False),
}
SOURCES = ("sign", "gradient", *_ATTACKS)


def _cure(options: Options, anchored: bool) -> Penalty:
    return CURE(
        direction=options["direction"],
        samples=options["samples"],
        squared=not options["norm"],
        anchored=anchored,
    )


def _sgr(options: Options, shape: Shape, model: nn.Module | None, images: Tensor | None) -> Penalty:
    source = options["source"]
    if source in _ATTACKS:
        if model is None:
            raise ValueError(f"ScheduledPenalty: model must be given for source {source}, got None")
        source = _ATTACKS[source](model, options["attack_eps"])
    covariance = CovarianceFunction(*shape, decay=options["decay"])
    variance = options["standardize"]
    if variance == "data":
        if images is None:
            raise ValueError(
                "ScheduledPenalty: images must be given for standardize data, got None"
            )
        variance = images.var(0, correction=0).mean()
    if variance is not None:
        covariance.standardize(variance)
    return SGR(0.0, covariance, source, options["update_every"])


# Weight and h are set by their schedules.
_MAKE: dict[str, Callable[[Options], Penalty]] = {
    "cure": lambda options: _cure(options, anchored=False),
    "anchored-cure": lambda options: _cure(options, anchored=True),
    "gn": lambda options: GradientPenalty(0.0, p=2, power=2),
    "tv": lambda options: GradientPenalty(0.0, p=options["p"], power=1),
    "lipschitz": lambda options: LipschitzPenalty(0.0, p=options["p"]),
    "llr": lambda options: LocalLinearity(
        0.0, options["mu"], options["eps"], steps=options["steps"]
    ),
}


class ScheduledPenalty:
    """The sum of the penalties that `specs` describe, and the schedules of their weights and steps.

    Args:
        specs: for each penalty its `name` and any of its options in `DEFAULTS`; `weight` and `h`
            are texts that `Schedule.parse` reads. The penalty `none` adds nothing.
        shape: (C, H, W) of an image.
        model: the network in training, which the SGR sources `fgsm`, `pgd` and `deepfool` attack.
        images: (N, C, H, W), the training images, whose variance SGR's `standardize` `data` takes.

    Raises:
        ImportError: foolbox is missing, which `deepfool` needs.
        ValueError: an unknown penalty, an option that it does not have, a value out of range, or
            no model or images where they are needed.

    Attributes:
        penalty: the penalty, or None when there is nothing to add.

    Example:
        >>> specs = [{"name": "cure", "h": "0:0,5:1.5"}, {"name": "gn"}]
        >>> scheduled = ScheduledPenalty(specs, (1, 8, 8))
        >>> scheduled.set_epoch(2.5)
        >>> [term.weight for term in scheduled.penalty.terms], scheduled.penalty.terms[0].h
        ([4.0, 1.0], 0.75)
    """

    penalty: Penalty | None

    def __init__(
        self,
        specs: Sequence[Options],
        shape: Shape,
        *,
        model: nn.Module | None = None,
        images: Tensor | None = None,
    ) -> None:
        self._schedules: list[tuple[Penalty, str, Schedule]] = []
        terms = [self._term(spec, shape, model, images) for spec in specs if spec["name"] != "none"]
        self.penalty = None if not terms else terms[0] if len(terms) == 1 else Sum(*terms)

    def set_epoch(self, epoch: float) -> None:
        """Give every scheduled weight and h its value at `epoch`, which may be a fraction."""
        for penalty, attribute, schedule in self._schedules:
            setattr(penalty, attribute, schedule(epoch))

    def _term(
        self, spec: Options, shape: Shape, model: nn.Module | None, images: Tensor | None
    ) -> Penalty:
        name = spec["name"]
        if name not in DEFAULTS:
            raise ValueError(
                f"ScheduledPenalty: penalty must be one of {', '.join(DEFAULTS)}, got {name}"
            )
        strange = [key for key in spec if key != "name" and key not in DEFAULTS[name]]
        if strange:
            raise ValueError(
                f"ScheduledPenalty: penalty {name} takes the options {', '.join(DEFAULTS[name])}, "
                f"got {', '.join(strange)}"
            )
        options = {**DEFAULTS[name], **spec}
        make = _MAKE.get(name)
        penalty = make(options) if make else _sgr(options, shape, model, images)
        for attribute in ("weight", "h"):
            if attribute in options:
                schedule = Schedule.parse(f"{name}'s {attribute}", options[attribute])
                self._schedules.append((penalty, attribute, schedule))
        return penalty if options["every"] == 1 else Lazy(penalty, every=options["every"])
