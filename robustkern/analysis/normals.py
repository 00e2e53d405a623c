r"""What one perturbation of many inputs needs: normals that agree, or directions that curve alike.

Moosavi-Dezfooli et al. 2018, Robustness of classifiers to universal perturbations: in the flat
model the normals of the boundary near many inputs lie in a subspace of few dimensions; in the
curved model the boundary bends towards all inputs along the same directions. In a random subspace
the boundary is farther, by a law of Fawzi et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern.analysis.samples import applied, check_count, check_floating

__all__ = [
    "NormalSpectrum",
    "SharedCurvature",
    "SubspaceLaw",
    "normal_spectrum",
    "shared_curvature",
    "subspace_law",
]


@dataclass(frozen=True)
class NormalSpectrum:
    """Singular values of stacked unit normals: the flat model of universal perturbations.

    Attributes:
        normals: (min(M, D),), falling, of M normals; their squares sum to M.
        random: (min(M, D),), the same of M random unit vectors.
        samples: M.
        excluded: normals that are zero, left out.
    """

    normals: Tensor
    random: Tensor
    samples: int
    excluded: int


def normal_spectrum(normals: Tensor, *, generator: torch.Generator | None = None) -> NormalSpectrum:
    r"""Singular values of the matrix of rows r_i/\|\|r_i\|\|, beside those of random vectors.

    Where the first fall fast and the others do not, the normals have a subspace of few dimensions
    in common, in which one perturbation crosses the boundary near many inputs.

    Args:
        normals: (N, \*D) floating point, x_adv - x of a minimal attack such as DeepFool at N
            inputs, of any length; where none was found, zero.
        generator: source of the random vectors, on the device of `normals`; when None, a new one
            with seed 0, so that two calls give the same.

    Returns:
        The spectra in float64.

    Raises:
        TypeError: `normals` are no floating-point tensor.
        ValueError: not (N, \*D), values that are not finite, or none that is not zero.

    Example:
        >>> normals = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
        >>> spectrum = normal_spectrum(normals)
        >>> spectrum.normals, spectrum.excluded
        (tensor([2., 0.], dtype=torch.float64), 1)
    """
    caller = "normal_spectrum"
    check_floating(caller, "normals", normals)
    if normals.dim() < 2:
        raise ValueError(f"{caller}: normals must be (N, *D), got {tuple(normals.shape)}")
    rows = normals.detach().flatten(1).double()
    lengths = rows.norm(dim=1, keepdim=True)
    found = lengths.squeeze(1) > 0
    if not found.any():
        raise ValueError(f"{caller}: normals must hold at least one that is not zero, got none")
    rows = rows[found] / lengths[found]
    source = generator or torch.Generator(rows.device).manual_seed(0)
    drawn = torch.randn(rows.shape, generator=source, device=rows.device, dtype=rows.dtype)
    return NormalSpectrum(
        normals=torch.linalg.svdvals(rows),
        random=torch.linalg.svdvals(drawn / drawn.norm(dim=1, keepdim=True)),
        samples=len(rows),
        excluded=len(normals) - len(rows),
    )


@dataclass(frozen=True)
class SharedCurvature:
    """Curvature along M directions, over N samples: the curved model of universal perturbations.

    Attributes:
        mean: (M,), over samples, of v^T H v, v of unit length.
        error: (M,), its standard error; 0 for a single sample.
        upward: (M,), share of the samples with v^T H v > 0.
    """

    mean: Tensor
    error: Tensor
    upward: Tensor


def shared_curvature(
    product: Callable[[Tensor], Tensor], directions: Tensor, samples: int
) -> SharedCurvature:
    r"""Whether the samples curve alike along each direction.

    Args:
        product: Hessian-vector products: takes (N, \*D), one vector for each sample, and returns
            the (N, \*D) products of each with its sample's Hessian. For the curvature of the
            boundary that is the Hessian of the logits' difference over its gradient's length, at a
            point of the boundary.
        directions: (M, \*D) floating point, of any length but 0: candidates, or random ones for
            comparison. One call of `product` each.
        samples: N.

    Returns:
        Mean, error and sign of the curvatures, of the dtype of `directions`.

    Raises:
        TypeError: `directions` are no floating-point tensor, or products no tensor.
        ValueError: not (M, \*D), values that are not finite, a zero direction, `samples` below 1,
            or products of another shape or not finite.

    Example:
        >>> curvatures = torch.tensor([[2.0, -1.0], [4.0, 1.0]])  # of two diagonal Hessians
        >>> shared_curvature(lambda vectors: curvatures * vectors, torch.eye(2), samples=2)
        SharedCurvature(mean=tensor([3., 0.]), error=tensor([1., 1.]),
            upward=tensor([1.0000, 0.5000]))
    """
    caller = "shared_curvature"
    check_floating(caller, "directions", directions)
    check_count(caller, "samples", samples)
    if directions.dim() < 2:
        raise ValueError(f"{caller}: directions must be (M, *D), got {tuple(directions.shape)}")
    found = []
    for direction in directions.detach():
        length = direction.norm()
        if not length:
            raise ValueError(f"{caller}: directions must not be zero, got one that is")
        vectors = (direction / length).expand(samples, *direction.shape)
        products = applied(caller, "product", product, vectors)
        found.append((vectors * products).flatten(1).sum(1))
    curvatures = torch.stack(found)
    deviation = curvatures.std(1) if samples > 1 else torch.zeros_like(curvatures[:, 0])
    return SharedCurvature(
        mean=curvatures.mean(1),
        error=deviation / math.sqrt(samples),
        upward=(curvatures > 0).to(curvatures.dtype).mean(1),
    )


@dataclass(frozen=True)
class SubspaceLaw:
    """Distances within random subspaces of m dimensions, as expected and as measured.

    Medians over samples, since those that no perturbation was found for are at infinity.

    Attributes:
        dims: (M,), m.
        expected: (M,), sqrt(D/m) times the median distance in the whole space, in input units.
        measured: (M,), median distance, in input units; infinite if half were not found.
        ratios: (M, 3), quartiles over samples of measured over expected distance.
        excluded: samples at distance 0 or infinity in the whole space, left out.
    """

    dims: Tensor
    expected: Tensor
    measured: Tensor
    ratios: Tensor
    excluded: int


def subspace_law(
    size: int, dims: Sequence[int], distances: Tensor, measured: Tensor
) -> SubspaceLaw:
    r"""The law of flat boundaries, :math:`\|r_S\| \approx \sqrt{D/m}\, \|r^*\|`, beside distances.

    S is a random subspace of m dimensions (Fawzi et al. 2016, Robustness of classifiers: from
    adversarial to random noise). A boundary that curves towards the inputs is nearer than that.

    Args:
        size: D, the number of an input's elements.
        dims: those of the subspaces, each from 1 to D.
        distances: (N,) floating point, \|\|r*\|\| in the whole space, in input units; 0 for what
            was misclassified before, infinite where none was found.
        measured: (M, N), \|\|r_S\|\| for each of `dims`, infinite where none was found.

    Returns:
        Law and measurement, in float64.

    Raises:
        TypeError: `distances` or `measured` are no floating-point tensor.
        ValueError: `dims` empty or out of range, shapes that do not fit, a negative distance or
            NaN, or no sample with a distance that is neither 0 nor infinite.

    Example:
        >>> law = subspace_law(100, [25], torch.tensor([1.0, 3.0]), torch.tensor([[2.0, 3.0]]))
        >>> law.expected, law.ratios
        (tensor([4.], dtype=torch.float64),
         tensor([[0.6250, 0.7500, 0.8750]], dtype=torch.float64))
    """
    caller = "subspace_law"
    if not dims or not all(1 <= dim <= size for dim in dims):
        raise ValueError(f"{caller}: dims must lie from 1 to {size}, got {list(dims)}")
    for name, tensor in (("distances", distances), ("measured", measured)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{caller}: {name} must be a floating-point tensor, got {came}")
        if not (tensor >= 0).all():
            raise ValueError(f"{caller}: {name} must not be negative or NaN")
    if distances.dim() != 1 or measured.shape != (len(dims), len(distances)):
        raise ValueError(
            f"{caller}: distances must be (N,) and measured ({len(dims)}, N), one row for each of "
            f"dims, got {tuple(distances.shape)} and {tuple(measured.shape)}"
        )
    kept = (distances > 0) & distances.isfinite()
    if not kept.any():
        raise ValueError(f"{caller}: distances must hold one that is neither 0 nor infinite")
    shortest, within = distances[kept].double(), measured[:, kept].double()
    m = torch.tensor(list(dims), device=distances.device)
    law = (size / m.double()).sqrt()
    return SubspaceLaw(
        dims=m,
        expected=law * _quantile(shortest, 0.5),
        measured=_quantile(within, 0.5),
        ratios=torch.stack(
            [_quantile(within / shortest / law.unsqueeze(1), q) for q in (0.25, 0.5, 0.75)], dim=1
        ),
        excluded=int((~kept).sum()),
    )


def _quantile(values: Tensor, q: float) -> Tensor:
    """Along the last dimension, interpolated; torch's own makes NaN of infinite neighbours."""
    ordered = values.sort(dim=-1).values
    place = q * (ordered.shape[-1] - 1)
    low, high = ordered[..., math.floor(place)], ordered[..., math.ceil(place)]
    part = place - math.floor(place)
    return low if part == 0 else torch.where(high.isinf(), high, low + part * (high - low))
