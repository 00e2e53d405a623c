"""What a network says on the way from a clean input to an adversarial one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkern.evaluation.passes import Advance, check_adversarial, check_samples, outputs_of


def softmax_along_segment(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    *,
    points: int = 21,
    batch_size: int = 256,
    advance: Advance | None = None,
) -> Tensor:
    r"""Class probabilities on the way from clean to adversarial inputs (Roth et al. 2018, fig. 6).

    .. math:: \mathrm{softmax}\, f((1 - t)\, x + t\, x_{\mathrm{adv}}), \qquad t \in [0, 1]

    Args:
        model: maps (N, \*D) to (N, classes), logits; taken in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        adversarial: (N, \*D), values in [0, 1].
        points: values of t, evenly spaced, both ends among them.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N points samples.

    Returns:
        (N, points, classes), float32 or better, detached.

    Raises:
        TypeError: `model` is no module or a tensor is not floating point.
        ValueError: `points` below 2, no samples, values outside [0, 1], shapes that do not fit,
            outputs that are not (N, classes) or not finite, or `batch_size` below 1.

    Example:
        >>> inputs, adversarial = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> softmax_along_segment(nn.Identity(), inputs, adversarial, points=3)
        tensor([[[0.7311, 0.2689],
                 [0.5000, 0.5000],
                 [0.2689, 0.7311]]])
    """
    caller = "softmax_along_segment"
    check_samples(caller, model, inputs)
    check_adversarial(caller, "adversarial", adversarial, inputs)
    if points < 2:
        raise ValueError(f"{caller}: points must be at least 2, got {points}")

    return torch.stack(
        [
            outputs_of(caller, model, between, batch_size, advance).softmax(1)
            for between in (
                inputs.lerp(adversarial.to(inputs.dtype), step / (points - 1))
                for step in range(points)
            )
        ],
        dim=1,
    )
