r"""Planes through inputs: a network's classes and loss there, and where its boundary runs.

Around an input x the plane is x + a r + b v. r is a unit vector, as a rule the normal of the
decision boundary, the direction in which DeepFool moves x; v is a unit vector orthogonal to it.
Points may leave [0, 1]: nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.points import (
    by_batch,
    check_count,
    check_floating,
    check_inputs,
    check_labels,
    check_like,
    check_targets,
    logits,
    outputs_at,
)

__all__ = ["NormalSections", "PlaneSections", "normal_sections", "plane_axes", "plane_sections"]

_BISECTIONS = 12  # of a cell of the grid


@dataclass(frozen=True)
class PlaneSections:
    """Squares around N inputs: a grid of P by P points each.

    Attributes:
        offsets: (P,), rising, those of a and of b, in input units.
        classes: (N, P, P) int64, predicted at [sample, b, a].
        losses: (N, P, P), cross-entropy at the sample's label there.
        targets: (N,), the labels.
    """

    offsets: Tensor
    classes: Tensor
    losses: Tensor
    targets: Tensor


def plane_axes(
    normals: Tensor, directions: Tensor | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Unit vectors r along the normals, and v orthogonal to them.

    Args:
        normals: (N, \*D) floating point, of any length but 0.
        directions: (\*D), one for all samples, of which v is the part orthogonal to r; when None,
            one is drawn at random for all.
        generator: source of the random direction, on the device of `normals`; when None, a new one
            with seed 0, so that two calls, and two networks, get the same.

    Returns:
        r and v, (N, \*D) each.

    Raises:
        TypeError: `normals` or `directions` is no floating-point tensor.
        ValueError: `normals` of zero length, values that are not finite, `directions` of another
            shape, or parallel to a normal, or samples of a single element.

    Example:
        >>> r, v = plane_axes(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 1.0]))
        >>> r, v
        (tensor([[0., 1.],
                [1., 0.]]), tensor([[1., 0.],
                [0., 1.]]))
    """
    caller = "plane_axes"
    check_floating(caller, "normals", normals)
    if normals.dim() < 2 or normals[:1].numel() < 2:
        raise ValueError(
            f"{caller}: normals must be (N, *D) with at least two elements a sample, "
            f"got {tuple(normals.shape)}"
        )
    if directions is None:
        source = generator or torch.Generator(normals.device).manual_seed(0)
        directions = torch.randn(
            normals.shape[1:], generator=source, device=normals.device, dtype=torch.float64
        )
    check_floating(caller, "directions", directions)
    if directions.shape != normals.shape[1:]:
        raise ValueError(
            f"{caller}: directions must have the shape of one sample, {tuple(normals.shape[1:])}, "
            f"got {tuple(directions.shape)}"
        )
    along = normals.detach().flatten(1).double()
    lengths = along.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise ValueError(
            f"{caller}: normals must not be zero, got {int((lengths == 0).sum())} such"
        )
    r = along / lengths
    shared = directions.detach().flatten().double()
    v = shared - (r @ shared).unsqueeze(1) * r
    if not (v.norm(dim=1) > 1e-6 * shared.norm()).all():
        raise ValueError(f"{caller}: directions must not be parallel to a normal, nor zero")
    v -= (v * r).sum(1, keepdim=True) * r  # again: rounding, where the two were close
    v /= v.norm(dim=1, keepdim=True)
    return r.to(normals.dtype).view_as(normals), v.to(normals.dtype).view_as(normals)


def plane_sections(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    normals: Tensor,
    *,
    radius: float,
    points: int = 41,
    directions: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> PlaneSections:
    r"""Classes and loss on the plane of boundary normal and random direction, around each input.

    Figs. 1, 3, 8 and 13 of Moosavi-Dezfooli et al. 2019 (CURE). To compare networks, call it with
    each, with the normals of each: the random direction is the same.

    Args:
        model: maps (N, \*D) to (N, classes), logits; taken in eval mode.
        inputs: (N, \*D) floating point, a few samples.
        targets: (N,) int64, the labels.
        normals: (N, \*D), x_adv - x of a minimal attack such as DeepFool, of any length.
        radius: of the square: a and b go from -radius to radius, in input units.
        points: P on each side, odd if x itself shall be one of them.
        directions: (\*D) to span the plane in place of a random direction.
        generator: source of the random direction; see `plane_axes`.
        batch_size: points per pass; in all N P^2 points go forward.

    Returns:
        The sections, on the device of `inputs`.

    Raises:
        TypeError: `model` is no module, a tensor not floating point or `targets` not int64.
        ValueError: no samples, shapes that do not fit, values that are not finite, a zero normal,
            `radius` not positive, `points` below 2, `targets` out of range, outputs that are not
            (N, classes), or `batch_size` below 1.

    Example:
        >>> inputs, normals = torch.tensor([[0.75, 0.25]]), torch.tensor([[-1.0, 1.0]])
        >>> found = plane_sections(
        ...     nn.Identity(), inputs, torch.tensor([0]), normals, radius=1.0, points=4
        ... )
        >>> found.classes  # the boundary is a straight line, half a unit along the normal away
        tensor([[[0, 0, 0, 1],
                 [0, 0, 0, 1],
                 [0, 0, 0, 1],
                 [0, 0, 0, 1]]])
    """
    caller = "plane_sections"
    check_inputs(caller, model, inputs)
    check_targets(caller, targets, inputs)
    check_like(caller, "normals", normals, inputs)
    offsets = _offsets(caller, radius, points, inputs)
    r, v = plane_axes(normals, directions, generator=generator)

    def measure(batch: Tensor, labels: Tensor) -> Tensor:
        outputs = logits(caller, model, batch)
        check_labels(caller, labels, outputs)
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return torch.stack([losses, outputs.argmax(1).to(losses.dtype)], dim=1)

    found = []
    b, a = (grid.flatten() for grid in torch.meshgrid(offsets, offsets, indexing="ij"))
    for sample, label in enumerate(targets):
        square = _points(inputs[sample], r[sample], v[sample], a, b)
        found.append(
            by_batch(caller, model, measure, batch_size, square, label.expand(len(square)))
        )
    grids = torch.stack(found).view(len(inputs), points, points, 2)
    return PlaneSections(
        offsets=offsets,
        classes=grids[..., 1].long(),
        losses=grids[..., 0].contiguous(),
        targets=targets.clone(),
    )


@dataclass(frozen=True)
class NormalSections:
    """The decision boundary over a shared direction, at N inputs.

    Attributes:
        offsets: (P,), rising, b along the shared direction, in input units.
        heights: (N, P), where along r the prediction at x is lost, in input units; negative where
            it is lost at x + b v already. Infinite, of that sign, where no boundary was found.
    """

    offsets: Tensor
    heights: Tensor


def normal_sections(
    model: nn.Module,
    inputs: Tensor,
    normals: Tensor,
    direction: Tensor,
    *,
    radius: float,
    points: int = 41,
    batch_size: int = 256,
) -> NormalSections:
    r"""Sections of the boundary at several inputs: the normal of each, one direction of all.

    Where they curve alike, one perturbation along the direction changes the predictions of all of
    them (Moosavi-Dezfooli et al. 2018, Robustness of classifiers to universal perturbations).

    Along each line x + b v + a r the prediction of x is followed from a = 0: to where it is first
    lost on the way up or, if it is lost there already, first regained on the way down. Of P steps
    the one that does is bisected; what is crossed twice within one step is not seen.

    Args:
        model: maps (N, \*D) to (N, classes), logits; taken in eval mode.
        inputs: (N, \*D) floating point, a few samples.
        normals: (N, \*D), x_adv - x of a minimal attack such as DeepFool, of any length.
        direction: (\*D), shared; of it the part orthogonal to each normal is taken.
        radius: of a and b, in input units.
        points: P.
        batch_size: points per pass; in all about N P (P + 12) points go forward.

    Returns:
        The sections, on the device of `inputs`.

    Raises:
        TypeError: `model` is no module or a tensor not floating point.
        ValueError: no samples, shapes that do not fit, values that are not finite, a zero normal or
            one parallel to `direction`, `radius` not positive, `points` below 2, outputs that are
            not (N, classes), or `batch_size` below 1.

    Example:
        >>> inputs, normals = torch.tensor([[0.75, 0.25]]), torch.tensor([[-1.0, 1.0]])
        >>> direction = torch.tensor([1.0, 0.0])
        >>> normal_sections(nn.Identity(), inputs, normals, direction, radius=1.0, points=3).heights
        tensor([[0.3536, 0.3536, 0.3536]])
    """
    caller = "normal_sections"
    check_inputs(caller, model, inputs)
    check_like(caller, "normals", normals, inputs)
    offsets = _offsets(caller, radius, points, inputs)
    r, v = plane_axes(normals, direction)
    steps = torch.linspace(0, radius, points, dtype=inputs.dtype, device=inputs.device)
    b, a = (grid.flatten() for grid in torch.meshgrid(offsets, steps, indexing="ij"))
    own = outputs_at(caller, model, inputs, batch_size).argmax(1)

    heights = []
    for sample, label in enumerate(own):
        place = inputs[sample], r[sample], v[sample]

        def lost(a: Tensor, b: Tensor, place: _Place = place, label: Tensor = label) -> Tensor:
            outputs = outputs_at(caller, model, _points(*place, a, b), batch_size)
            return outputs.argmax(1) != label

        at_start = lost(torch.zeros_like(offsets), offsets)
        way = torch.where(at_start, -1, 1)  # down or up
        changed = lost(way.repeat_interleave(points) * a, b).view(points, points)
        changed ^= at_start.unsqueeze(1)
        first = changed.int().argmax(1)  # 0 if there is none
        high, low = steps[first], steps[(first - 1).clamp(min=0)]
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            beyond = lost(way * middle, offsets) ^ at_start
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        heights.append(way * torch.where(changed.any(1), high, torch.inf))
    return NormalSections(offsets=offsets, heights=torch.stack(heights))


_Place = tuple[Tensor, Tensor, Tensor]


def _offsets(caller: str, radius: float, points: int, inputs: Tensor) -> Tensor:
    check_count(caller, "points", points, 2)
    if not 0 < radius < torch.inf:
        raise ValueError(f"{caller}: radius must be positive and finite, got {radius}")
    return torch.linspace(-radius, radius, points, dtype=inputs.dtype, device=inputs.device)


def _points(x: Tensor, r: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(len(a), *D): x + a r + b v."""
    shape = (-1, *[1] * x.dim())
    return x + a.view(shape) * r + b.view(shape) * v
