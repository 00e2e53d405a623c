r"""How far a loss has to be pushed to pass a threshold, from its gradient and curvature alone.

To second order the loss around x is :math:`\ell + g^T r + \tfrac12 r^T H r`. Theorem 1 of
Moosavi-Dezfooli et al. 2019 (CURE) bounds the length of the shortest r that lifts this quadratic to
a threshold t. It is a local quadratic estimate, not a certificate: the loss itself is no quadratic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.samples import (
    by_batch,
    check_floating,
    check_inputs,
    check_labels,
    check_targets,
    input_gradient,
    logits,
)

__all__ = ["RobustnessBounds", "loss_gap", "margin_loss", "robustness_bounds"]

_THRESHOLDS = {"cross_entropy": math.log(2), "margin": 0.0}


@dataclass(frozen=True)
class RobustnessBounds:
    r"""Bounds of :math:`\|r^*\|_2`: a local quadratic estimate, not a certificate.

    In input units; M samples are `included`, and the bounds are theirs, in order. None is NaN;
    infinite says that no r reaches the threshold, or along u none.

    Attributes:
        included: (N,) bool, the samples that lie below the threshold, c >= 0.
        lower: (M,), Theorem 1 with a = \|\|g\|\|.
        upper: (M,), Theorem 1 with a = \|g^T u\|.
        simple_lower: (M,), the paper's c/a - 2 nu c^2/a^3, a = \|\|g\|\|; 0 where that is less.
        tighter_lower: (M,), c/a - nu c^2/(2 a^3), which holds as well; 0 where that is less.
        simple_upper: (M,), c/\|g^T u\|; infinite for nu < 0.
    """

    included: Tensor
    lower: Tensor
    upper: Tensor
    simple_lower: Tensor
    tighter_lower: Tensor
    simple_upper: Tensor

    @property
    def excluded(self) -> int:
        """Samples beyond the threshold, c < 0: misclassified ones."""
        return int((~self.included).sum())


def robustness_bounds(
    gap: Tensor, gradient_norm: Tensor, curvature: Tensor, projection: Tensor
) -> RobustnessBounds:
    r"""Theorem 1 of Moosavi-Dezfooli et al. 2019: a local quadratic estimate, not a certificate.

    With c = t - l(x), nu the largest eigenvalue of the input Hessian H, u its eigenvector, and

    .. math:: r^* = \arg\min_r \|r\|_2 \;\text{s.t.}\; \ell + g^T r + \tfrac12 r^T H r \ge t,
        \qquad b(a) = \frac{2 c}{a + \sqrt{a^2 + 2 \nu c}},

    b(\|\|g\|\|) <= \|\|r*\|\| <= b(\|g^T u\|). The paper's (a/nu)(sqrt(1 + 2 nu c/a^2) - 1) is the
    same but cancels for a small nu. This form holds for nu = 0 too, where it is c/a, and for
    nu < 0, where a root that is not real means that the threshold is out of reach.

    Args:
        gap: (N,), c, in units of the loss; samples with c < 0 are left out.
        gradient_norm: (N,), \|\|g\|\|_2, not negative.
        curvature: (N,), nu.
        projection: (N,), \|g^T u\|, from 0 to `gradient_norm` but for rounding. Where `curvature`
            is a bound of the eigenvalue and no u is known, 0 gives the upper bound sqrt(2 c/nu).

    Returns:
        The bounds, of the arguments' dtype, detached.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: an argument is not finite, shapes or dtypes differ, or a negative norm or
            projection.

    Example:
        >>> ones = torch.ones(2)
        >>> bounds = robustness_bounds(0.5 * ones, ones, torch.tensor([0.0, 3.0]), 0.5 * ones)
        >>> bounds.lower, bounds.upper
        (tensor([0.5000, 0.3333]), tensor([1.0000, 0.4343]))
    """
    caller = "robustness_bounds"
    given = {
        "gap": gap,
        "gradient_norm": gradient_norm,
        "curvature": curvature,
        "projection": projection,
    }
    for name, tensor in given.items():
        check_floating(caller, name, tensor)
        if tensor.dim() != 1 or tensor.shape != gap.shape or tensor.dtype != gap.dtype:
            raise ValueError(
                f"{caller}: {name} must be (N,) of gap's length and dtype, "
                f"got {tuple(tensor.shape)} of {tensor.dtype} and {tuple(gap.shape)} of {gap.dtype}"
            )
        if name in ("gradient_norm", "projection") and (tensor < 0).any():
            raise ValueError(f"{caller}: {name} must not be negative, got {tensor.min():g}")
    included = (gap >= 0).detach()
    # In float64, for sums of a narrower type's largest numbers overflow.
    c, norm, nu, along = (tensor.detach()[included].double() for tensor in given.values())
    reach = c / along  # NaN only where c = 0
    simple_upper = torch.where(c == 0, 0, torch.where(nu < 0, torch.inf, reach))
    return RobustnessBounds(
        included=included,
        lower=_bound(c, norm, nu).to(gap.dtype),
        upper=_bound(c, along, nu).to(gap.dtype),
        simple_lower=_linearized(c, norm, nu, 2.0).to(gap.dtype),
        tighter_lower=_linearized(c, norm, nu, 0.5).to(gap.dtype),
        simple_upper=simple_upper.to(gap.dtype),
    )


def _bound(c: Tensor, a: Tensor, nu: Tensor) -> Tensor:
    """2 c/(a + sqrt(a^2 + 2 nu c)), without the squares, which under- and overflow."""
    s = (2 * nu.abs()).sqrt() * c.sqrt()
    root = torch.where(nu < 0, (a - s).clamp(min=0).sqrt() * (a + s).sqrt(), torch.hypot(a, s))
    bound = c / ((a + root) / 2)
    return torch.where(c == 0, 0, torch.where((nu < 0) & (s > a), torch.inf, bound))


def _linearized(c: Tensor, a: Tensor, nu: Tensor, factor: float) -> Tensor:
    """c/a - factor nu c^2/a^3 where that is positive; a negative nu would make it no bound."""
    s = (factor * nu.clamp(min=0)).sqrt() * c.sqrt()
    return torch.where(s < a, c / a * (1 - (s / a).square()), 0)


def margin_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    r"""A loss that is negative where the prediction is right, with any number of classes.

    .. math:: \max_{k \ne y} p_k - p_y, \qquad p = \mathrm{softmax}(f)

    A loss of 0 is the decision boundary itself, while a cross-entropy of log 2 is on it with two
    classes only, and on its near side with more.

    Args:
        outputs: (N, K) logits.
        targets: (N,) int64.
        reduction: "mean" or "none".

    Returns:
        The mean over samples or, for "none", (N,); differentiable in `outputs`.

    Raises:
        TypeError: `outputs` are no tensor, or `targets` not int64.
        ValueError: another `reduction`, no samples, less than two classes, or `targets` of another
            shape or out of range.

    Example:
        >>> outputs = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3]]).log()
        >>> margin_loss(outputs, torch.tensor([0, 2]), reduction="none")
        tensor([-0.7000,  0.2000])
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f'margin_loss: reduction must be "mean" or "none", got {reduction!r}')
    caller = "margin_loss"
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{caller}: outputs must be a tensor, got {type(outputs).__name__}")
    if outputs.dim() != 2 or outputs.shape[1] < 2 or not len(outputs):
        raise ValueError(
            f"{caller}: outputs must be (N, K) of at least one sample and two classes, "
            f"got {tuple(outputs.shape)}"
        )
    check_targets(caller, targets, outputs)
    check_labels(caller, targets, outputs)
    probabilities = outputs.softmax(1)
    own = F.one_hot(targets, outputs.shape[1]).bool()
    # Of several others alike max has the gradient of one, amax the mean of all, which is none's.
    others = probabilities.masked_fill(own, -torch.inf).max(1).values
    losses = others - probabilities[own]
    return losses.mean() if reduction == "mean" else losses


def loss_gap(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    loss: str = "cross_entropy",
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    r"""What `robustness_bounds` needs besides curvature: c = t - l(x) and the gradient g.

    Cross-entropy has the threshold t = log 2, that is p_y = 1/2. With two classes that is the
    decision boundary. With more, a right prediction may have c < 0, and p_y < 1/2 is only needed
    for a wrong one: the lower bound is still one of the distance to it, the upper is not.
    The margin loss has t = 0, which is the boundary with any number of classes.

    Args:
        model: maps (N, \*D) to (N, classes), logits; taken in eval mode.
        inputs: (N, \*D) floating point.
        targets: (N,) int64, the labels.
        loss: "cross_entropy" or "margin" (`margin_loss`). The Hessian must be of the same loss.
        batch_size: samples per pass; each costs one forward and one input gradient.

    Returns:
        c, (N,), and g, (N, \*D), float32 or better, detached, on the device of `inputs`.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point or `targets` not int64.
        ValueError: another `loss`, no samples, values that are not finite, `targets` of another
            shape or out of range, outputs that are not (N, classes), or `batch_size` below 1.

    Example:
        >>> inputs = torch.tensor([[0.9, 0.1]]).log()
        >>> c, g = loss_gap(nn.Identity(), inputs, torch.tensor([0]), loss="margin")
        >>> c, g
        (tensor([0.8000]), tensor([[-0.1800,  0.1800]]))
    """
    caller = "loss_gap"
    if loss not in _THRESHOLDS:
        raise ValueError(f'{caller}: loss must be "cross_entropy" or "margin", got {loss!r}')
    check_inputs(caller, model, inputs)
    check_targets(caller, targets, inputs)
    loss_fn = F.cross_entropy if loss == "cross_entropy" else margin_loss

    def measure(batch: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = logits(caller, model, batch.requires_grad_())
            check_labels(caller, labels, outputs)
            # In float64, because of a confident network's 1 - p float32 leaves only rounding.
            losses = loss_fn(outputs.double(), labels, reduction="none")
            gradient = input_gradient(losses.sum(), batch)
        return torch.cat([losses.unsqueeze(1), gradient.flatten(1)], dim=1).to(outputs.dtype)

    found = by_batch(caller, model, measure, batch_size, inputs, targets)
    return _THRESHOLDS[loss] - found[:, 0], found[:, 1:].view_as(inputs)
