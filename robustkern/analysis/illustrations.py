"""Theorem 1 of Moosavi-Dezfooli et al. 2019 (CURE) in two pictures: what curvature does alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustkern.analysis.bounds import RobustnessBounds, robustness_bounds
from robustkern.analysis.samples import check_count

__all__ = ["bounds_against_curvature", "losses_along_line"]


def bounds_against_curvature(
    curvatures: Sequence[float],
    *,
    gap: float = 1.0,
    gradient_norm: float = 1.0,
    projection: float = 0.5,
) -> RobustnessBounds:
    """The bounds as functions of nu: Fig. 4 of Moosavi-Dezfooli et al. 2019, by default as there.

    Args:
        curvatures: values of nu.
        gap: c, not negative.
        gradient_norm: that of g.
        projection: of g on u.

    Returns:
        The bounds in float64, one for each nu: a local quadratic estimate, not a certificate.

    Raises:
        ValueError: no `curvatures`, a negative number for another argument, or one not finite.

    Example:
        >>> bounds_against_curvature([0.0, 4.0]).lower
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    check_count("bounds_against_curvature", "the number of curvatures", len(curvatures))
    if gap < 0:
        raise ValueError(f"bounds_against_curvature: gap must not be negative, got {gap}")
    nu = torch.tensor(curvatures, dtype=torch.float64)
    c, norm, along = (torch.full_like(nu, value) for value in (gap, gradient_norm, projection))
    return robustness_bounds(c, norm, nu, along)


def losses_along_line(
    curvatures: Sequence[float],
    *,
    loss: float = 0.0,
    slope: float = 1.0,
    threshold: float = 1.0,
    radius: float = 1.5,
    points: int = 101,
) -> dict[str, list[float] | list[list[float]] | float]:
    """Parabolas of one loss and slope at x: Fig. 5 of Moosavi-Dezfooli et al. 2019.

    The more curved, the nearer the point at which the threshold is passed. On a line both bounds of
    Theorem 1 are that point.

    Args:
        curvatures: values of nu, one for each parabola.
        loss: l at x.
        slope: its derivative there, positive.
        threshold: t, at least `loss`.
        radius: the offsets from x reach from 0 to here.
        points: so many of them.

    Returns:
        Lists for a plot: "curvatures", "offsets" r, for each curvature the "losses" at r and the
        "crossings" (infinite where the threshold is out of reach), and "threshold".

    Raises:
        ValueError: a `threshold` below `loss`, a `slope` or `radius` not positive and finite, no
            `curvatures`, or `points` below 2.

    Example:
        >>> losses_along_line([0.0, 4.0])["crossings"]
        [1.0, 0.5]
    """
    caller = "losses_along_line"
    check_count(caller, "points", points, 2)
    if not threshold >= loss or not 0 < slope < torch.inf or not 0 < radius < torch.inf:
        raise ValueError(
            f"{caller}: threshold must be at least loss, slope and radius positive and finite, "
            f"got {threshold}, {loss}, {slope} and {radius}"
        )
    bounds = bounds_against_curvature(
        curvatures, gap=threshold - loss, gradient_norm=slope, projection=slope
    )
    r = torch.linspace(0, radius, points, dtype=torch.float64)
    nu = torch.tensor(curvatures, dtype=torch.float64).unsqueeze(1)
    return {
        "curvatures": list(curvatures),
        "offsets": r.tolist(),
        "losses": (loss + slope * r + nu / 2 * r.square()).tolist(),
        "crossings": bounds.lower.tolist(),
        "threshold": threshold,
    }
