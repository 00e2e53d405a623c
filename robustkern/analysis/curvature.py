"""Statistics of curvature: Frobenius norms, the norm of Hz, alignment, the curvature profile."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern import functional
from robustkern.analysis.hessian import InputHessian
from robustkern.analysis.samples import applied, check_count, check_rows, normalized

__all__ = [
    "Alignment",
    "CurvatureProfile",
    "FrobeniusNorm",
    "alignment",
    "curvature_profile",
    "frobenius_norm",
    "sign_curvature",
]


@dataclass(frozen=True)
class FrobeniusNorm:
    r"""Estimates of :math:`\|H_i\|_F^2`; see `frobenius_norm`.

    Attributes:
        squared: (N,), unbiased.
        error: (N,), their standard errors.
    """

    squared: Tensor
    error: Tensor

    @property
    def norm(self) -> Tensor:
        """The square root of `squared`, (N,)."""
        return self.squared.sqrt()

    @property
    def mean(self) -> float:
        """Of `squared` over the samples."""
        return float(self.squared.mean())

    @property
    def mean_error(self) -> float:
        """Standard error of `mean` as an estimate for these samples: that of the draws."""
        return float(self.error.square().sum().sqrt() / len(self.error))


def frobenius_norm(
    operator: Callable[[Tensor], Tensor],
    like: Tensor,
    draws: int = 100,
    *,
    generator: torch.Generator | None = None,
) -> FrobeniusNorm:
    r"""The Frobenius norm of each sample's matrix from products with Gaussian vectors.

    .. math:: \|H\|_F^2 = E_{z \sim N(0, I)} \|H z\|_2^2

    (Hutchinson 1990 of :math:`H^T H`; Moosavi-Dezfooli et al. 2019, Fig. 10 and 14.)

    Args:
        operator: maps (N, \*D) to (N, \*D), such as an `InputHessian`.
        like: (N, \*D) floating point: shape, dtype and device of the vectors, such as the inputs.
        draws: of z, at least 2; the paper takes 100.
        generator: source of z, on the device of `like`; when None, a new one with seed 0.

    Returns:
        Estimates and their standard errors, float64, detached.

    Raises:
        TypeError: `operator` is not callable or returns no tensor, `like` is no floating-point
            tensor or `draws` no int.
        ValueError: no samples, fewer than two draws, or products of another shape or not finite.

    Example:
        >>> import torch
        >>> found = frobenius_norm(lambda z: 2 * z, torch.zeros(1, 100), draws=1000)
        >>> found.squared, found.error
        (tensor([403.2551], dtype=torch.float64), tensor([1.7548], dtype=torch.float64))
    """
    caller = "frobenius_norm"
    if not callable(operator):
        raise TypeError(f"{caller}: operator must be callable, got {type(operator).__name__}")
    check_rows(caller, "like", like)
    check_count(caller, "draws", draws, 2)
    generator = generator or torch.Generator(like.device).manual_seed(0)
    squares = []
    for _ in range(draws):
        z = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        squares.append(_length(applied(caller, "operator", operator, z)).square())
    deviation, mean = torch.std_mean(torch.stack(squares), dim=0)
    return FrobeniusNorm(mean, deviation / math.sqrt(draws))


def sign_curvature(hessian: InputHessian) -> Tensor:
    r"""The length of :math:`H z` along CURE's direction, z = sign(g) / \|\|sign(g)\|\|_2.

    With finite differences this is :math:`\|g(x + h z) - g(x)\| / h`, the square root of what CURE
    penalizes over h (Moosavi-Dezfooli et al. 2019, Fig. 10 and 14).

    Args:
        hessian: of N samples.

    Returns:
        (N,), float64, detached; zero for a gradient of zero, which has no direction.

    Raises:
        TypeError: `hessian` is no `InputHessian`.
    """
    if not isinstance(hessian, InputHessian):
        raise TypeError(
            f"sign_curvature: hessian must be an InputHessian, got {type(hessian).__name__}"
        )
    origin = torch.zeros_like(hessian.gradient)
    return _length(hessian(functional.perturb(origin, hessian.gradient, 1.0, "sign")))


@dataclass(frozen=True)
class Alignment:
    """Cosines between gradients and directions; see `alignment`.

    Attributes:
        cosines: (M,), of the samples of which it is defined, between 0 and 1.
        undefined: how many samples have none: a gradient, or a direction, of zero.
    """

    cosines: Tensor
    undefined: int

    @property
    def mean(self) -> float | None:
        """Of the cosines; None if there are none."""
        return float(self.cosines.mean()) if len(self.cosines) else None


def alignment(gradient: Tensor, direction: Tensor) -> Alignment:
    r"""How far the gradient points along the direction of largest curvature u.

    .. math:: |g^T u| / (\|g\|_2 \|u\|_2)

    (Moosavi-Dezfooli et al. 2019.) For a random direction in d dimensions its root mean
    square is :math:`1 / \sqrt d`, and its mean 0.8 of that.

    Args:
        gradient: (N, \*D) floating point, such as `InputHessian.gradient`.
        direction: (N, \*D), such as the first eigenvectors: `lanczos(...).vectors[:, 0]`.

    Returns:
        The cosines, float64, and how many are undefined.

    Raises:
        TypeError: a tensor is none, or not floating point.
        ValueError: no samples, another shape, or values that are not finite.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> alignment(gradient, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        Alignment(cosines=tensor([0.8000], dtype=torch.float64), undefined=1)
    """
    caller = "alignment"
    for name, rows in (("gradient", gradient), ("direction", direction)):
        check_rows(caller, name, rows)
    if gradient.shape != direction.shape:
        raise ValueError(
            f"{caller}: direction must have gradient's shape, "
            f"got {tuple(gradient.shape)} and {tuple(direction.shape)}"
        )
    g, u = (rows.detach().flatten(1).double() for rows in (gradient, direction))
    g, u = (normalized(rows)[0] for rows in (g, u))
    defined = (g != 0).any(1) & (u != 0).any(1)
    cosines = (g * u).sum(1).abs().clamp(max=1)
    return Alignment(cosines[defined], int((~defined).sum()))


@dataclass(frozen=True)
class CurvatureProfile:
    """Mean sorted eigenvalues; see `curvature_profile`.

    Attributes:
        mean: (d,), of the largest eigenvalue of each sample, of the second, and so on.
        low: (d,), lower ends of the confidence intervals of the means over samples.
        high: (d,), upper ends.
        samples: how many.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    samples: int


def curvature_profile(spectra: Tensor) -> CurvatureProfile:
    """Sorted eigenvalues, mean over samples (Moosavi-Dezfooli et al. 2019, Fig. 2, 9 and 12).

    There are two views of a network. That of finite length is what the paper shows: `spectrum` of
    an `InputHessian` with its h. The other is exact: `spectrum` with method "exact", or at once
    `gauss_newton(...).spectrum()` for a piecewise-linear network.

    Args:
        spectra: (N, d), eigenvalues in descending order of at least two samples.

    Returns:
        Means and their 95% intervals, 1.96 standard errors over samples to either side, float64.

    Raises:
        TypeError: `spectra` is no floating-point tensor.
        ValueError: another shape, fewer than two samples, or rows that do not descend.

    Example:
        >>> import torch
        >>> curvature_profile(torch.tensor([[3.0, 0.0], [1.0, 0.0]])).mean
        tensor([2., 0.], dtype=torch.float64)
    """
    caller = "curvature_profile"
    check_rows(caller, "spectra", spectra)
    if spectra.dim() != 2 or len(spectra) < 2:
        raise ValueError(
            f"{caller}: spectra must be (N, d) of at least two samples, got {tuple(spectra.shape)}"
        )
    if not (spectra.diff(dim=1) <= 0).all():
        raise ValueError(f"{caller}: spectra must descend along each row, got others")
    deviation, mean = torch.std_mean(spectra.detach().double(), dim=0)
    half = 1.96 * deviation / math.sqrt(len(spectra))
    return CurvatureProfile(mean, mean - half, mean + half, len(spectra))


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows.detach().flatten(1).double(), dim=1)
    return length
