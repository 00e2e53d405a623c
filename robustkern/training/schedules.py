"""Hyper-parameters that change over the epochs: learning rate, h, weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """A piecewise linear function of the epoch, constant outside its points.

    Args:
        points: (epoch, value) pairs, epochs rising.

    Example:
        >>> rise = Schedule.parse("h", "0:0,5:1.5")
        >>> rise(0), rise(2.5), rise(20)
        (0.0, 0.75, 1.5)
        >>> Schedule.parse("h", "1.5")(3)
        1.5
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, epoch: float) -> float:
        """Value at `epoch`, which may be a fraction: 0.5 is half way through the first epoch."""
        epochs, values = zip(*self.points, strict=True)
        return float(np.interp(epoch, epochs, values))

    @classmethod
    def parse(cls, name: str, text: str) -> Schedule:
        """Read a number, or `EPOCH:VALUE,EPOCH:VALUE,...`.

        Args:
            name: what the schedule is for; named in the message.
            text: as above; epochs rise from 0, values are finite and not negative.

        Returns:
            The schedule.

        Raises:
            ValueError: anything else.
        """
        parts = text.split(",") if ":" in text else [f"0:{text}"]
        try:
            points = tuple((float(a), float(b)) for a, b in (part.split(":") for part in parts))
        except ValueError:
            points = ()
        epochs = [epoch for epoch, _ in points]
        rising = all(a < b for a, b in pairwise(epochs))
        valid = all(math.isfinite(number) and number >= 0 for point in points for number in point)
        if not (points and rising and valid):
            raise ValueError(
                f"Schedule: {name} must be a number or EPOCH:VALUE,EPOCH:VALUE,... with rising "
                f"epochs, finite and not negative, got {text}"
            )
        return cls(points)
