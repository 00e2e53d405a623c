"""Gradient attacks on classifiers whose inputs are pixels scaled to [0, 1].

An attack returns adversarial inputs and leaves everything else as it found it: training mode of
every module, `.grad`, `requires_grad` and the global random state, also when the model raises.

These attack every sample of the batch, the misclassified too, as adversarial training wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern.analysis.samples import check_labels, logits
from robustkern.evaluation.balls import draw, precise, project, rounded, steepest
from robustkern.gradients.modes import evaluating

LossFunction = Callable[[Tensor, Tensor], Tensor]


def fgsm(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    loss_fn: LossFunction = F.cross_entropy,
) -> Tensor:
    r"""Fast gradient sign method: x + eps sign(dl/dx), clipped to [0, 1] (Goodfellow et al. 2015).

    Args:
        model: maps inputs to outputs that `loss_fn` takes; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: the labels that the attack moves away from, as `loss_fn` takes them; (N,) int64 by
            default.
        eps: largest change of an input element, in input units.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the batch.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], `targets` of another length, a negative or
            non-finite `eps`, or a model without a gradient.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> fgsm(model, torch.tensor([[0.5], [0.95]]), torch.tensor([0, 0]), eps=0.1)
        tensor([[0.6000],
                [1.0000]])
    """
    _check("fgsm", model, inputs, targets, eps)
    inputs = inputs.detach()
    with evaluating(model):
        moved = _ascend(
            "fgsm", model, inputs, precise(inputs), targets, eps, eps, math.inf, loss_fn
        )
    return rounded(moved, inputs, eps, math.inf)


def ifgsm(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    loss_fn: LossFunction = F.cross_entropy,
) -> Tensor:
    r"""Iterated FGSM (Kurakin et al. 2017): L-infinity `pgd` that starts at `inputs`.

    Args:
        model: maps inputs to outputs that `loss_fn` takes; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: the labels that the attack moves away from, as `loss_fn` takes them; (N,) int64 by
            default.
        eps: largest change of an input element, in input units.
        steps: number of gradient steps.
        step_size: largest change by a step; eps / steps when None, so that the last step can
            reach eps.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the batch.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], `targets` of another length, a negative or non-finite
            `eps`, a `step_size` that is not positive and finite, `steps` below 1, or a model
            without a gradient.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> ifgsm(model, torch.tensor([[0.5], [0.95]]), torch.tensor([0, 0]), eps=0.1)
        tensor([[0.6000],
                [1.0000]])
    """
    _check("ifgsm", model, inputs, targets, eps)
    length = _step_size("ifgsm", steps, step_size, eps)
    inputs = inputs.detach()
    adversarial = precise(inputs)
    with evaluating(model):
        for _ in range(steps):
            adversarial = _ascend(
                "ifgsm", model, inputs, adversarial, targets, eps, length, math.inf, loss_fn
            )
    return rounded(adversarial, inputs, eps, math.inf)


def pgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    steps: int = 20,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    loss_fn: LossFunction = F.cross_entropy,
) -> Tensor:
    r"""Projected gradient descent in the ball of radius `eps` around `inputs` (Madry et al. 2018).

    Each step moves a sample by `step_size` along the sign of its loss gradient (p = inf), along the
    gradient (2), or along the signs of the largest 1% of its elements (1; Tramer and Boneh 2019),
    and projects onto the ball and onto [0, 1]. The last iterate is returned.

    Args:
        model: maps inputs to outputs that `loss_fn` takes; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: the labels that the attack moves away from, as `loss_fn` takes them; (N,) int64 by
            default.
        eps: radius of the ball, in input units.
        p: norm in which the ball and the steps are measured: 1, 2 or inf.
        steps: number of gradient steps; PGD-20 by default.
        step_size: length of a step in input units; 2.5 eps / steps when None, so that the ball can
            be crossed.
        random_start: begin at a uniform draw from the ball, not at `inputs`.
        restarts: how often to start. Samples that are misclassified by then are not attacked
            again, so that more than one takes `targets` to be labels.
        generator: source of the random start, on the device of `inputs`; when None, a new one with
            seed 0, so that two calls give the same result.
        loss_fn: `loss_fn(outputs, targets)`, the mean over the batch.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], `targets` of another length, a negative or non-finite
            `eps`, another `p`, a `step_size` that is not positive and finite, `steps` or `restarts`
            below 1, `restarts` above 1 without a random start, or a model
            without a gradient.

    Example:
        >>> model = nn.Linear(1, 2)
        >>> _ = nn.init.zeros_(model.bias), model.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
        >>> pgd(model, torch.tensor([[0.5], [0.95]]), torch.tensor([0, 0]), eps=0.1)
        tensor([[0.6000],
                [1.0000]])
    """
    _check("pgd", model, inputs, targets, eps)
    _check_norm("pgd", p)
    length = _step_size("pgd", steps, step_size, 2.5 * eps)
    if restarts < 1 or (restarts > 1 and not random_start):
        raise ValueError(
            "pgd: restarts must be at least 1, and 1 without a random start, "
            f"got {restarts} and random_start={random_start}"
        )
    if generator is None:
        generator = torch.Generator(inputs.device).manual_seed(0)

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        adversarial = precise(inputs)
        if random_start:
            adversarial = (adversarial + draw(adversarial, eps, p, generator)).clamp(0, 1)
        for _ in range(steps):
            adversarial = _ascend(
                "pgd", model, inputs, adversarial, targets, eps, length, p, loss_fn
            )
        return rounded(adversarial, inputs, eps, p)

    inputs = inputs.detach()
    with evaluating(model), torch.inference_mode(False):
        adversarial = run(inputs.clone(), targets)
        for _ in range(restarts - 1):
            standing = _standing("pgd", model, adversarial, targets)
            adversarial[standing] = run(inputs[standing], targets[standing])
    return adversarial


def _ascend(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    targets: Tensor,
    eps: float,
    length: float,
    p: float,
    loss_fn: LossFunction,
) -> Tensor:
    """One step of `length`, projected onto the eps-ball around `inputs` and [0, 1]."""
    if inputs.numel() == 0:
        return adversarial.clone()
    with torch.inference_mode(False), torch.enable_grad():
        point = rounded(adversarial, inputs, eps, p).clone().requires_grad_()
        outputs = model(point)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{name}: model must return a tensor, got {type(outputs).__name__}")
        # The batch mean would shrink each gradient by N: undone, so that it does not underflow.
        loss = loss_fn(outputs, targets.clone()) * len(inputs)
        found = (
            torch.autograd.grad(loss, point, allow_unused=True) if loss.requires_grad else [None]
        )
    if found[0] is None:
        raise ValueError(f"{name}: model must be differentiable, got outputs without a gradient")
    gradient = precise(found[0])
    if p == 1:  # the few elements that move are not to be those that cannot
        stuck = ((adversarial <= 0) & (gradient < 0)) | ((adversarial >= 1) & (gradient > 0))
        gradient = gradient.masked_fill(stuck, 0)
    moved = adversarial + length * steepest(gradient, p)
    return project(moved, inputs, eps, p).clamp(0, 1)


def _step_size(name: str, steps: int, given: float | None, way: float) -> float:
    _check_counts(name, steps=steps)
    if given is not None:
        _check_positive(name, step_size=given)
    return way / steps if given is None else given


def _standing(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Indices of the samples that are classified right; names bad outputs and labels."""
    with torch.no_grad():
        outputs = logits(name, model, inputs)
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise ValueError(
            f"{name}: targets must be (N,) int64, got {tuple(targets.shape)} {targets.dtype}"
        )
    check_labels(name, targets, outputs)
    return (outputs.argmax(1) == targets).nonzero().squeeze(1)


def _attack_standing(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    attack: Callable[[Tensor, Tensor], Tensor],
    *,
    eps: float = 0.0,
) -> Tensor:
    """`attack` of the samples that are classified right, in eval mode; the others as they are."""
    _check(name, model, inputs, targets, eps)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        adversarial = inputs.detach().clone()
        targets = targets.detach().clone()
        if adversarial.numel():
            standing = _standing(name, model, adversarial, targets)
            if len(standing):
                adversarial[standing] = attack(adversarial[standing], targets[standing])
    return adversarial


def _margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, (N,)."""
    label = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -math.inf)
    return label[:, 0] - others.amax(1)


def _check_positive(name: str, **given: float) -> None:
    if not all(0 < value < math.inf for value in given.values()):
        raise ValueError(
            f"{name}: {_listed(given)} must be positive and finite, got {_listed(given.values())}"
        )


def _check_counts(name: str, **given: int) -> None:
    if min(given.values()) < 1:
        raise ValueError(
            f"{name}: {_listed(given)} must be at least 1, got {_listed(given.values())}"
        )


def _listed(items: Iterable[object]) -> str:
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def _check_norm(name: str, p: float) -> None:
    if p not in (1, 2, math.inf):
        raise ValueError(f"{name}: p must be 1, 2 or inf, got {p}")


def _check(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, eps: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        came = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"{name}: inputs must be a floating-point tensor, got {came}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: targets must be a tensor, got {type(targets).__name__}")
    if inputs.dim() < 1 or targets.dim() < 1 or len(inputs) != len(targets):
        raise ValueError(
            f"{name}: targets must have inputs' length, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{name}: eps must be finite and not negative, got {eps}")
    if inputs.numel():
        low, high = (bound.item() for bound in inputs.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: inputs must lie in [0, 1], got values from {low:g} to {high:g}"
            )
