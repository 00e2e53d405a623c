"""Spectra of symmetric operators on many samples at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustkern.analysis.hessian import InputHessian
from robustkern.analysis.samples import applied, check_count, check_rows

__all__ = ["Eigenpairs", "lanczos", "spectrum"]

Operator = Callable[[Tensor], Tensor]
_SPARE = 5  # steps beyond the eigenpairs asked for: a multiple eigenvalue comes once a start


@dataclass(frozen=True)
class Eigenpairs:
    r"""Eigenpairs of each sample's matrix, from the largest eigenvalue to the smallest.

    Attributes:
        values: (N, k).
        vectors: (N, k, \*D), orthonormal.
        residuals: (N, k), :math:`\|H u - \lambda u\|_2`. An eigenvalue of a symmetric H is at most
            so far away.
        steps: products that were taken.
        converged: (N, k), whether the residual is within the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    steps: int
    converged: Tensor


def lanczos(
    operator: Operator,
    like: Tensor,
    top: int = 1,
    bottom: int = 0,
    *,
    tolerance: float = 1e-5,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    r"""Extreme eigenpairs of all samples at once, by Lanczos with full reorthogonalization.

    Each step is one product for all samples. Where a Krylov space is exhausted, as it is for a
    Hessian of low rank or of zeros, it goes on from a new random direction. Of an eigenvalue that
    occurs several times in a matrix of higher rank, copies can be missed.

    The eigenpairs are the Rayleigh-Ritz ones of :math:`(T + T^T) / 2, T = V^T H V`, with V the
    orthonormal basis. For a symmetric H this is Lanczos; for one that is not, such as that of
    finite differences, they belong to the symmetric part :math:`S = (H + H^T) / 2` within the span
    of V, because :math:`V^T S V` is the symmetric part of T although S itself is out of reach. Then
    the largest value is one that S takes on a direction in V, so a lower bound of its largest
    eigenvalue, and the residuals, which are those of H, need not fall to the tolerance.

    Args:
        operator: maps (N, \*D) to (N, \*D), a matrix for each sample, such as an `InputHessian`.
        like: (N, \*D) floating point: shape, dtype and device of the vectors, such as the inputs.
        top: how many of the largest eigenvalues.
        bottom: how many of the smallest.
        tolerance: stop when all residuals are below it, in units of the largest absolute
            eigenvalue of the sample; float32 resolves about 1e-6.
        steps: at most; when None, ten for each eigenpair and at least 100. Never more than d. Each
            keeps a float64 vector for each sample.
        generator: source of the start, on the device of `like`; when None, a new one with seed 0.

    Returns:
        The eigenpairs in float32 or better, detached.

    Raises:
        TypeError: `like` is no floating-point tensor, a count is no int, the tolerance no number,
            or the operator returns no tensor.
        ValueError: counts that are negative, that sum to 0 or to more than d, or that exceed
            `steps`, a tolerance that is not positive, or products that are not finite or of another
            shape.

    Example:
        >>> import torch
        >>> scales = torch.tensor([[3.0, 2.0, -1.0], [5.0, 0.0, 0.0]])
        >>> found = lanczos(lambda vectors: scales * vectors, torch.zeros(2, 3), top=2)
        >>> found.values.round(decimals=4).abs()
        tensor([[3., 2.],
                [5., 0.]])
    """
    size = _check(operator, like, top, bottom, tolerance, steps)
    most = min(size, max(100, 10 * (top + bottom)) if steps is None else steps)
    fewest = min(most, top + bottom + _SPARE)
    generator = generator or torch.Generator(like.device).manual_seed(0)
    basis, look = _Krylov(like, most, generator), fewest
    with torch.no_grad():
        for step in range(1, most + 1):
            basis.extend(applied("lanczos", "operator", operator, basis.last().to(like.dtype)))
            if step < look:
                continue
            look = min(most, step + 1 + step // 10)  # eigh of many steps costs more than a product
            values, weights, residuals, scale = basis.ritz()
            chosen = [*range(-1, -top - 1, -1), *range(bottom - 1, -1, -1)]
            converged = residuals[:, chosen] <= tolerance * scale
            if converged.all():
                break
    dtype = torch.promote_types(like.dtype, torch.float32)
    return Eigenpairs(
        values[:, chosen].to(dtype),
        basis.vectors(weights[:, :, chosen]).to(dtype),
        residuals[:, chosen].to(dtype),
        step,
        converged,
    )


class _Krylov:
    """An orthonormal basis V for each sample, and T = V^T H V, zero below the subdiagonal."""

    def __init__(self, like: Tensor, most: int, generator: torch.Generator) -> None:
        self._shape, self._generator, self._count = like.shape, generator, 0
        self._noise = 10 * torch.finfo(like.dtype).eps  # of a product, relative to the matrix
        # The squares of a confident network's curvature leave float32's range.
        dtype = torch.float64
        samples, size = len(like), like[0].numel()
        self._basis = torch.zeros(samples, most + 1, size, dtype=dtype, device=like.device)
        self._projected = torch.zeros(samples, most + 1, most, dtype=dtype, device=like.device)
        self._basis[:, 0] = self._new_direction()

    def last(self) -> Tensor:
        return self._basis[:, self._count].view(self._shape)

    def extend(self, product: Tensor) -> None:
        """With the product of the last vector."""
        self._count += 1
        rest = product.flatten(1).to(self._basis.dtype)
        whole = torch.linalg.vector_norm(rest, dim=1)
        rest, inside = self._outside(rest)
        length = torch.linalg.vector_norm(rest, dim=1)
        scale = torch.maximum(whole, self._projected.flatten(1).abs().amax(1))
        noise = self._noise * scale
        ended = (length <= noise) | (length == 0)
        length = length.masked_fill(ended, 0)
        following = rest / length.masked_fill(ended, 1)[:, None]
        if ended.any():
            following = torch.where(ended[:, None], self._new_direction(), following)
        self._projected[:, : self._count, self._count - 1] = inside
        self._projected[:, self._count, self._count - 1] = length
        self._basis[:, self._count] = following

    def ritz(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, ascending, their vectors in the basis, residuals, largest absolute value."""
        square = self._projected[:, : self._count, : self._count]
        values, weights = torch.linalg.eigh((square + square.mT) / 2)
        # H V = V T + b v e^T with v the next vector, so H u - l u has a part in V and one along v.
        within = square @ weights - weights * values[:, None]
        beyond = self._projected[:, self._count, self._count - 1, None] * weights[:, -1]
        residuals = torch.hypot(torch.linalg.vector_norm(within, dim=1), beyond.abs())
        return values, weights, residuals, values.abs().amax(1, keepdim=True)

    def vectors(self, weights: Tensor) -> Tensor:
        """The combinations of the basis, (N, k, *D)."""
        flat = weights.mT @ self._basis[:, : self._count]
        return flat.view(*flat.shape[:2], *self._shape[1:])

    def _outside(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is orthogonal to the basis, and the coefficients of the rest."""
        basis = self._basis[:, : self._count]
        coefficients = torch.zeros_like(basis[:, :, 0])
        for _ in range(2):  # twice is enough for orthogonality to rounding
            inside = (basis @ rows[:, :, None])[:, :, 0]
            rows = rows - (inside[:, None] @ basis)[:, 0]
            coefficients = coefficients + inside
        return rows, coefficients

    def _new_direction(self) -> Tensor:
        shape = self._basis[:, 0].shape
        drawn = torch.randn(
            shape, generator=self._generator, dtype=self._basis.dtype, device=self._basis.device
        )
        for _ in range(2):  # of the few directions that are left little may remain
            drawn, _ = self._outside(drawn)
            length = torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
            drawn = drawn / length.masked_fill(length == 0, 1)
        return drawn


def spectrum(hessian: InputHessian, *, advance: Callable[[int], object] | None = None) -> Tensor:
    r"""All eigenvalues of each sample's :math:`(H + H^T) / 2`, by dense matrices one at a time.

    Takes d products and d^3 operations a sample, and the memory of one matrix.

    Args:
        hessian: of inputs with up to a few thousand elements.
        advance: called with 1 after each sample.

    Returns:
        (N, d), in descending order, float32 or better, detached.

    Raises:
        TypeError: `hessian` is no `InputHessian`.

    Example:
        >>> import torch
        >>> model, inputs = torch.nn.Linear(2, 2), torch.zeros(1, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2)), torch.nn.init.zeros_(model.bias)
        >>> spectrum(InputHessian(model, inputs, torch.tensor([0]), method="exact"))
        tensor([[0.5000, 0.0000]])
    """
    if not isinstance(hessian, InputHessian):
        raise TypeError(f"spectrum: hessian must be an InputHessian, got {type(hessian).__name__}")
    rows = []
    for matrix in hessian.matrices():
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        rows.append(torch.linalg.eigvalsh(matrix.to(dtype)).flip(0))
        if advance is not None:
            advance(1)
    return torch.stack(rows)


def _check(
    operator: Operator, like: Tensor, top: int, bottom: int, tolerance: float, steps: int | None
) -> int:
    if not callable(operator):
        raise TypeError(f"lanczos: operator must be callable, got {type(operator).__name__}")
    check_rows("lanczos", "like", like)
    for name, value in (("top", top), ("bottom", bottom)):
        if value != 0:
            check_count("lanczos", name, value)
    size = like[0].numel()
    if not 1 <= top + bottom <= size:
        raise ValueError(
            f"lanczos: top and bottom must sum to 1 at least and {size} at most, the elements of "
            f"an input, got {top} and {bottom}"
        )
    if steps is not None:
        check_count("lanczos", "steps", steps)
        if steps < top + bottom:
            raise ValueError(
                f"lanczos: steps must be at least top + bottom, got {steps} and {top + bottom}"
            )
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise TypeError(f"lanczos: tolerance must be a number, got {type(tolerance).__name__}")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"lanczos: tolerance must be positive and finite, got {tolerance!r}")
    return size
