"""Where SGR's covariance may come from: perturbations by FGSM, PGD and DeepFool.

A source is called as `source(inputs, gradient)` within `robustkern.backward` and returns
perturbations of the inputs' shape; those of attacks are x_adv - x with x_adv in [0, 1]. The labels
it attacks are the model's own predictions, so that no true label leaks into the covariance. It runs
the model in eval mode and leaves modes, `.grad`, buffers and the random state as they were; the
attacks' checks of the inputs make the host wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation.attacks import _check, fgsm, pgd
from robustkern.evaluation.minimal import (
    _check_search,
    _check_two_or_inf,
    _frozen,
    _library,
    _search,
)
from robustkern.gradients.modes import evaluating

Source = Callable[[Tensor, Tensor], Tensor]
Attack = Callable[[Tensor, Tensor], Tensor]


def fgsm_source(model: nn.Module, eps: float) -> Source:
    """Perturbations by `fgsm`, at one forward and one pass back and forth.

    Args:
        model: the network in training.
        eps: largest change of an input element, in input units.

    Returns:
        A source for `SGR`.

    Raises:
        ValueError: for an eps that is negative or not finite.

    Example:
        >>> import robustkern
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> covariance = robustkern.CovarianceFunction(3, 2, 2)
        >>> penalty = robustkern.SGR(1.0, covariance, source=fgsm_source(model, eps=0.1))
        >>> inputs, targets = torch.rand(6, 3, 2, 2), torch.arange(6) % 3
        >>> _ = robustkern.backward(model, inputs, targets, penalty)
        >>> covariance.updates
        tensor(1)
    """
    _check_eps("fgsm_source", eps)
    return _source(model, lambda inputs, labels: fgsm(model, inputs, labels, eps))


def gradient_source(model: nn.Module, *, sign: bool = True) -> Source:
    """The gradient of the cross entropy at the predicted label, or its sign; one pass each way.

    Args:
        model: the network in training.
        sign: of the gradient, in place of itself.

    Returns:
        A source for `SGR`. Its perturbations have no length of their own: standardize the
        covariance.
    """

    def source(inputs: Tensor, gradient: Tensor) -> Tensor:
        with evaluating(model), torch.enable_grad():
            leaf = _as_model(model, inputs).requires_grad_()
            outputs = model(leaf)
            loss = F.cross_entropy(outputs, outputs.detach().argmax(1), reduction="sum")
            (found,) = torch.autograd.grad(loss, leaf)
        # The sign of NaN is 0: an overflow must not pass for a gradient.
        signs = torch.where(found.isfinite(), found.sign(), torch.nan)
        return (signs if sign else found).to(inputs.dtype)

    return source


def pgd_source(
    model: nn.Module, eps: float, *, steps: int = 10, step_size: float | None = None
) -> Source:
    """Perturbations by `pgd`, which starts at the inputs: there is no random state to keep.

    Args:
        model: the network in training.
        eps: radius of the ball, in input units.
        steps: number of gradient steps; each costs a pass back and forth.
        step_size: length of a step in input units; 2.5 eps / steps when None.

    Returns:
        A source for `SGR`.

    Raises:
        ValueError: for an eps that is negative or not finite.
    """
    _check_eps("pgd_source", eps)
    return _source(
        model,
        lambda inputs, labels: pgd(
            model, inputs, labels, eps, steps=steps, step_size=step_size, random_start=False
        ),
    )


def deepfool_source(
    model: nn.Module,
    *,
    p: float = 2,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
) -> Source:
    """Perturbations by DeepFool (Moosavi-Dezfooli et al. 2016), that of foolbox.

    Args:
        model: the network in training.
        p: norm of the smallest perturbation that it looks for, 2 or inf.
        steps: at most; each costs `candidates` - 1 passes back and forth.
        candidates: classes, the likeliest first, to which a sample may move.
        overshoot: how far beyond the boundary, as a share of the way to it.

    Returns:
        A source for `SGR`.

    Raises:
        ImportError: foolbox is missing.
        ValueError: another `p`, or `steps` below 1, or `candidates` below 2.
    """
    _check_two_or_inf("deepfool_source", p)
    _check_search("deepfool_source", steps, candidates)
    foolbox = _library("deepfool_source", "foolbox")
    search = _search(foolbox, p, steps, candidates, overshoot)

    def adversarial(inputs: Tensor, labels: Tensor) -> Tensor:
        _check("deepfool_source", model, inputs, labels, 0.0)
        # foolbox differentiates by `backward`, which would fill the parameters' `.grad`.
        with evaluating(model), _frozen(model), torch.inference_mode(False), torch.enable_grad():
            attacked = foolbox.PyTorchModel(model, bounds=(0, 1), device=inputs.device)
            found: Tensor = search.run(attacked, inputs.clone(), labels.clone())
        return found.detach()

    return _source(model, adversarial)


def _source(model: nn.Module, attack: Attack) -> Source:
    def source(inputs: Tensor, gradient: Tensor) -> Tensor:
        x = _as_model(model, inputs)
        with evaluating(model), torch.no_grad():
            predicted = model(x).argmax(1)
        return (attack(x, predicted) - x).to(inputs.dtype)

    return source


def _as_model(model: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs in the dtype of the model's parameters, detached."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return inputs.detach().to(next(dtypes, inputs.dtype))


def _check_eps(caller: str, eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"{caller}: eps must be finite and not negative, got {eps}")
