"""Penalties from plain data, as the command line gives them and a checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustkern.covariance import CovarianceFunction
from robustkern.penalties import CURE, SGR, GradientPenalty, Lazy, LipschitzPenalty, Penalty, Sum
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
    "sgr": {"weight": "1", "source": "sign", "decay": 0.1, "update_every": 1, "every": 1},
}


def _cure(options: Options, anchored: bool) -> Penalty:
    return CURE(
        direction=options["direction"],
        samples=options["samples"],
        squared=not options["norm"],
        anchored=anchored,
    )


def _sgr(options: Options, shape: Shape) -> Penalty:
    covariance = CovarianceFunction(*shape, decay=options["decay"])
    return SGR(0.0, covariance, options["source"], options["update_every"])


# Weight and h are set by their schedules.
_MAKE: dict[str, Callable[[Options, Shape], Penalty]] = {
    "cure": lambda options, shape: _cure(options, anchored=False),
    "anchored-cure": lambda options, shape: _cure(options, anchored=True),
    "gn": lambda options, shape: GradientPenalty(0.0, p=2, power=2),
    "tv": lambda options, shape: GradientPenalty(0.0, p=options["p"], power=1),
    "lipschitz": lambda options, shape: LipschitzPenalty(0.0, p=options["p"]),
    "sgr": _sgr,
}


class ScheduledPenalty:
    """The sum of the penalties that `specs` describe, and the schedules of their weights and steps.

    Args:
        specs: for each penalty its `name` and any of its options in `DEFAULTS`; `weight` and `h`
            are texts that `Schedule.parse` reads. The penalty `none` adds nothing.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: an unknown penalty, an option that it does not have, or a value out of range.

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

    def __init__(self, specs: Sequence[Options], shape: Shape) -> None:
        self._schedules: list[tuple[Penalty, str, Schedule]] = []
        terms = [self._term(spec, shape) for spec in specs if spec["name"] != "none"]
        self.penalty = None if not terms else terms[0] if len(terms) == 1 else Sum(*terms)

    def set_epoch(self, epoch: float) -> None:
        """Give every scheduled weight and h its value at `epoch`, which may be a fraction."""
        for penalty, attribute, schedule in self._schedules:
            setattr(penalty, attribute, schedule(epoch))

    def _term(self, spec: Options, shape: Shape) -> Penalty:
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
        penalty = _MAKE[name](options, shape)
        for attribute in ("weight", "h"):
            if attribute in options:
                schedule = Schedule.parse(f"{name}'s {attribute}", options[attribute])
                self._schedules.append((penalty, attribute, schedule))
        return penalty if options["every"] == 1 else Lazy(penalty, every=options["every"])
