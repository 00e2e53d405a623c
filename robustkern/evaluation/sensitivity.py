"""Norms of input gradients over a data set: what the penalties make small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern import functional
from robustkern.analysis.samples import by_batch, check_labels, input_gradient, logits
from robustkern.evaluation.passes import (
    Advance,
    check_data,
    check_samples,
)


@dataclass(frozen=True)
class GradientStatistics:
    r"""Input gradients of a classifier over a data set; see `gradient_statistics`.

    Attributes:
        loss_mean: mean of :math:`\|\nabla \ell\|_2`, l the cross entropy.
        loss_max: its maximum; no bound, for other inputs may have larger gradients.
        outputs_mean: mean of :math:`\|\nabla f\|_{2,\infty}`, f the outputs.
        outputs_max: its maximum.
    """

    loss_mean: float
    loss_max: float
    outputs_mean: float
    outputs_max: float


def gradient_norms(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    p: float = 2,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> Tensor:
    r"""The norm of each sample's input gradient of the cross entropy, :math:`\|\nabla_x \ell\|_p`.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64; when None, the predicted labels, which are all there is at test time.
        p: 1, 2 or infinity.
        batch_size: samples per pass; each costs one forward and one input gradient.
        advance: called with the number of samples after each batch; in all N samples.

    Returns:
        (N,), float32 or better, detached.

    Raises:
        TypeError: `model` is no module, `inputs` are not floating point or `targets` not int64.
        ValueError: another p, no samples, `inputs` outside [0, 1], `targets` of another shape or
            out of range, outputs that are not (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> gradient_norms(model, torch.tensor([[0.0], [0.5]]))
        tensor([2.0000, 0.4768])
    """
    caller = "gradient_norms"
    check_samples(caller, model, inputs, targets)
    return norms(caller, model, inputs, targets, p, batch_size, advance)


def norms(
    caller: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None,
    p: float,
    batch_size: int,
    advance: Advance | None,
) -> Tensor:
    """`gradient_norms` of data that are checked."""
    if p not in (1, 2, torch.inf):
        raise ValueError(f"{caller}: p must be 1, 2 or inf, got {p!r}")

    def norm(batch: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            outputs = logits(caller, model, batch.requires_grad_())
            if labels is None:
                labels = outputs.detach().argmax(1)
            check_labels(caller, labels, outputs)
            loss = F.cross_entropy(outputs, labels, reduction="sum")
        found = functional.gradient_norm(input_gradient(loss, batch), p)
        if not found.isfinite().all():
            raise ValueError(
                f"{caller}: model must have finite input gradients, got infinite ones or NaN"
            )
        return found

    labels = () if targets is None else (targets,)
    return by_batch(caller, model, norm, batch_size, inputs, *labels, advance=advance)


def gradient_statistics(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> GradientStatistics:
    r"""Mean and maximum of the gradient norms of loss and outputs (Finlay et al. 2018).

    The outputs' is the largest L2 norm of a row of their Jacobian,

    .. math:: \|\nabla f(x)\|_{2,\infty} = \max_k \|\nabla f_k(x)\|_2

    f being what the model returns: logits, or probabilities if it ends in a softmax.

    Args:
        model: maps (N, \*D) to (N, classes); taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        batch_size: samples per pass; each costs two forwards and classes + 1 input gradients.
        advance: called with the number of samples after each batch; in all 2 N samples.

    Returns:
        The statistics, per input unit.

    Raises:
        TypeError: as `gradient_norms` raises it.
        ValueError: as `gradient_norms` raises it, and for `targets` all of one class.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> inputs, targets = torch.tensor([[0.0], [0.0]]), torch.tensor([0, 1])
        >>> gradient_statistics(model, inputs, targets)
        GradientStatistics(loss_mean=2.0, loss_max=2.0, outputs_mean=4.0, outputs_max=4.0)
    """
    caller = "gradient_statistics"
    check_data(caller, model, inputs, targets)

    def jacobian(batch: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = logits(caller, model, batch.requires_grad_())
            rows = outputs.sum(0).unbind()
        return torch.stack(
            [
                functional.gradient_norm(input_gradient(row, batch, retain_graph=True), 2)
                for row in rows
            ]
        ).amax(0)

    of_loss = norms(caller, model, inputs, targets, 2, batch_size, advance)
    of_outputs = by_batch(caller, model, jacobian, batch_size, inputs, advance=advance)
    return GradientStatistics(
        of_loss.mean().item(),
        of_loss.max().item(),
        of_outputs.mean().item(),
        of_outputs.max().item(),
    )
