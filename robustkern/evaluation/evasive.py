"""Carlini and Wagner's attack on a network with a detector of attacks (Finlay et al. 2019).

The detector flags inputs at which the gradient of the loss at the predicted label is long. An
attacker who knows of it looks for a misclassified input where it is short. That takes the gradient
of a gradient's norm, for which a finite difference along the gradient serves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation.attacks import _attack_standing, _check_counts, _check_positive, _margin
from robustkern.evaluation.minimal import _where
from robustkern.functional import gradient_norm


def evasive_carlini_wagner(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    weight: float = 1.0,
    threshold: float = 0.0,
    steps: int = 200,
    searches: int = 6,
    step_size: float = 0.01,
    initial_const: float = 0.1,
    shift: float = 0.01,
) -> Tensor:
    r"""Minimizes \|\|x' - x\|\|^2 + c margin(x') + weight max(score(x') - threshold, 0).

    The margin is the label's logit less the largest other one, 0 where that is negative. The score
    \|\|grad_x loss\|\|_2 at the predicted label counts where x' is misclassified: it is
    small deep in a class, and deep in the label's own is no place to go. Its gradient is
    (g(x' + h d) - g(x' - h d)) / 2h, g being that of the loss and d its direction.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        weight: of the score; 0 gives Carlini and Wagner's own attack.
        threshold: above which the detector flags, where the attacker knows it.
        steps: of Adam for each c; each costs three passes back and forth and another one back.
        searches: values of c that are tried, by binary search for each sample.
        step_size: Adam's, in the space whose tanh gives the inputs.
        initial_const: the first c.
        shift: h, an L2 length in input units.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached: of the
        misclassified x' that were met the one of the least
        \|\|x' - x\|\|^2 + weight max(score - threshold, 0). A sample that is misclassified
        already is left as it is, and so is one of which none is met.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], targets or outputs that are no labels and classes, a
            negative or non-finite `weight` or `threshold`, `steps` or `searches` below 1, or a
            `step_size`, `initial_const` or `shift` that is not positive and finite.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(model.bias), nn.init.eye_(model.weight)
        >>> inputs, targets = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
        >>> evasive_carlini_wagner(model, inputs, targets, steps=60, searches=3).argmax(1)
        tensor([1])
    """
    if not (0 <= weight < math.inf and 0 <= threshold < math.inf):
        raise ValueError(
            "evasive_carlini_wagner: weight and threshold must be finite and not negative, "
            f"got {weight} and {threshold}"
        )
    _check_counts("evasive_carlini_wagner", steps=steps, searches=searches)
    _check_positive(
        "evasive_carlini_wagner", step_size=step_size, initial_const=initial_const, shift=shift
    )

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        best = x.clone()
        least = torch.full((len(x),), math.inf, device=x.device)
        low, high = torch.zeros_like(least), torch.full_like(least, math.inf)
        const = torch.full_like(least, initial_const)
        # Just within (-1, 1), so that the edges of [0, 1] have a finite place.
        start = (0.999999 * (2 * x.to(torch.promote_types(x.dtype, torch.float32)) - 1)).atanh()
        for _ in range(searches):
            place = start.clone().requires_grad_()
            adam = torch.optim.Adam([place], lr=step_size)
            met = torch.zeros_like(least, dtype=torch.bool)
            for _ in range(steps):
                with torch.enable_grad():
                    point = ((place.tanh() + 1) / 2).to(x.dtype)
                    distance = (point - x).flatten(1).float().square().sum(1)
                    outputs = model(point)
                    margin = _margin(outputs, labels).float()
                    loss = distance + const * margin.clamp(min=0)
                broken = margin.detach() < 0
                pull = torch.zeros_like(x)
                objective = distance.detach()
                if weight > 0:
                    score, slope = _score(model, point, outputs, shift)
                    flagged = broken & (score > threshold)
                    pull = weight * _where(flagged, slope, pull)
                    objective = objective + weight * (score - threshold).clamp(min=0)
                with torch.enable_grad():
                    total = loss.sum() + (point * pull).sum()
                (place.grad,) = torch.autograd.grad(total, place)
                adam.step()
                better = broken & (objective < least)
                best = _where(better, point.detach(), best)
                least = torch.where(better, objective, least)
                met |= broken
            high, low = torch.where(met, const, high), torch.where(met, low, const)
            const = torch.where(high.isinf(), 10 * const, (low + high) / 2)
        return best

    return _attack_standing("evasive_carlini_wagner", model, inputs, targets, attack)


def _score(model: nn.Module, point: Tensor, outputs: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The detector's score (N,) and its gradient, the predicted labels being held."""
    predicted = outputs.detach().argmax(1)
    with torch.enable_grad():
        loss = F.cross_entropy(outputs, predicted, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point, retain_graph=True)
    score = gradient_norm(gradient, 2)
    length = score.clamp(min=torch.finfo(score.dtype).tiny).view(-1, *[1] * (point.dim() - 1))
    step = (shift * gradient / length).to(point.dtype)
    ahead, behind = (_gradient(model, point.detach() + side * step, predicted) for side in (1, -1))
    return score.float(), (ahead - behind) / (2 * shift)


def _gradient(model: nn.Module, point: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        point.requires_grad_()
        loss = F.cross_entropy(model(point), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point)
    return gradient
