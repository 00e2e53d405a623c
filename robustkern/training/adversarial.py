"""Adversarial training and training with noise: what the images become before a step.

An augmentation is called as `augmentation(model, inputs, targets)` with (N, C, H, W) in [0, 1] and
(N,) int64, and returns the images to train on, of the same shape. What it draws comes from torch's
global random state, which `Trainer` seeds for it. Attacks run the model in eval mode, so that batch
norm uses its running statistics and they stay as they are, and restore modes, `.grad` and the
random state; the model is that of the step, so that they cost passes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern.covariance import CovarianceFunction
from robustkern.evaluation import deepfool_source, evaluating, pgd
from robustkern.training.models import Shape

Augmentation = Callable[[nn.Module, Tensor, Tensor], Tensor]

# What each kind of training can be told, and what holds otherwise; an eps must be told.
DEFAULTS: dict[str, Mapping[str, Any]] = {
    "fgsm-rs": {"eps": None, "step_size": None},
    "pgd": {"eps": None, "steps": 7, "step_size": None},
    "deepfool": {"steps": 50},
    "trades": {"eps": None, "steps": 10, "step_size": None, "beta": 6.0},
    "uniform": {"eps": None},
    "lrc": {"eps": None, "decay_length": 4.0},
}


def fgsm_rs_augmentation(eps: float, *, step_size: float | None = None) -> Augmentation:
    """FGSM with a random start (Wong et al. 2020): one signed step from a draw from the ball.

    Args:
        eps: L-infinity radius, in input units.
        step_size: length of the step; 1.25 eps when None. At much more, or a large eps, training
            can collapse to a network that only this attack does not fool.

    Returns:
        An augmentation, at one forward and one input gradient.

    Raises:
        ValueError: `eps` or `step_size` out of range.
    """
    _check("fgsm_rs_augmentation", eps, 1, step_size)
    length = 1.25 * eps if step_size is None else step_size
    return pgd_augmentation(eps, steps=1, step_size=length)


def pgd_augmentation(
    eps: float, *, steps: int = 7, step_size: float | None = None, random_start: bool = True
) -> Augmentation:
    """Adversarial training of Madry et al. 2018.

    With one step of length `eps` and no random start this is FGSM.

    Args:
        eps: L-infinity radius, in input units.
        steps: number of gradient steps.
        step_size: length of a step in input units; 2.5 eps / steps when None.
        random_start: begin at a uniform draw from the ball, not at the images.

    Returns:
        An augmentation, at `steps` forwards and input gradients.

    Raises:
        ValueError: `eps`, `steps` or `step_size` out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> inputs, targets = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
        >>> attacked = pgd_augmentation(0.1)(model, inputs, targets)
        >>> bool((attacked - inputs).abs().max() <= 0.1 + 1e-6)
        True
    """
    _check("pgd_augmentation", eps, steps, step_size)

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return pgd(
            model,
            inputs,
            targets,
            eps,
            steps=steps,
            step_size=step_size,
            random_start=random_start,
            generator=_generator(inputs.device),
        )

    return augmentation


def deepfool_augmentation(*, steps: int = 50) -> Augmentation:
    """Images moved just across the nearest boundary of the network (Moosavi-Dezfooli et al. 2016).

    Meant for fine-tuning: the boundary must mean something. DeepFool of foolbox in the L2 norm
    leaves the class that the network predicts; the true label is kept for training.

    Args:
        steps: at most; each costs up to 9 input gradients.

    Returns:
        An augmentation. Its call raises ImportError where foolbox is missing.

    Raises:
        ValueError: `steps` below 1.
    """
    _check("deepfool_augmentation", None, steps)

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (inputs + deepfool_source(model, steps=steps)(inputs, inputs)).clamp(0, 1)

    return augmentation


def trades_augmentation(
    eps: float, *, steps: int = 10, step_size: float | None = None
) -> Augmentation:
    """The inner maximum of TRADES (Zhang et al. 2019): PGD on KL(f(x) || f(x')), without labels.

    It starts at a uniform draw from the ball, where the authors add normal noise of deviation
    0.001. To train by TRADES give `Trainer` a `trades_beta` too.

    Args:
        eps: L-infinity radius, in input units.
        steps: number of gradient steps.
        step_size: length of a step in input units; 2.5 eps / steps when None.

    Returns:
        An augmentation, at `steps` forwards and input gradients and one more forward.

    Raises:
        ValueError: `eps`, `steps` or `step_size` out of range.
    """
    _check("trades_augmentation", eps, steps, step_size)

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with evaluating(model), torch.no_grad():
            outputs = model(inputs)
        return pgd(
            model,
            inputs,
            outputs,
            eps,
            steps=steps,
            step_size=step_size,
            generator=_generator(inputs.device),
            loss_fn=lambda moved, clean: divergence(clean, moved),
        )

    return augmentation


def uniform_augmentation(eps: float) -> Augmentation:
    """Independent noise, uniform in [-eps, eps], then clipped to [0, 1].

    Args:
        eps: in input units.

    Returns:
        An augmentation, at no pass.

    Raises:
        ValueError: `eps` out of range.
    """
    _check("uniform_augmentation", eps)

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return (inputs + eps * (2 * torch.rand_like(inputs) - 1)).clamp(0, 1)

    return augmentation


def lrc_augmentation(shape: Shape, eps: float, *, decay_length: float = 4.0) -> Augmentation:
    """Long-range-correlated noise, clipped to [0, 1]: the LRC-trained baseline of Roth et al. 2018.

    Args:
        shape: (C, H, W) of an image.
        eps: standard deviation of the noise, in input units.
        decay_length: of the noise, in pixels; see `CovarianceFunction.exponential`.

    Returns:
        An augmentation, at no pass.

    Raises:
        ValueError: `eps` or `decay_length` out of range.
    """
    _check("lrc_augmentation", eps)
    noise = CovarianceFunction.exponential(*shape, decay_length)

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        draw = noise.to(inputs.device).sample(len(inputs))
        return (inputs + eps * draw.to(inputs)).clamp(0, 1)

    return augmentation


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(moved)), the mean over the batch (Zhang et al. 2019, eq. 5).

    Args:
        clean: (N, classes) outputs at the images.
        moved: (N, classes) outputs at the moved images.

    Returns:
        0-dimensional, in float32 at least; differentiable in both.

    Example:
        >>> divergence(torch.zeros(4, 3), torch.zeros(4, 3))
        tensor(0.)
    """
    kept, other = (
        F.log_softmax(outputs, 1, dtype=torch.promote_types(outputs.dtype, torch.float32))
        for outputs in (clean, moved)
    )
    return F.kl_div(other, kept, reduction="batchmean", log_target=True)


def adversarial_training(
    spec: Mapping[str, Any] | None, shape: Shape
) -> tuple[Augmentation | None, float | None]:
    """What plain data, as the command line gives it and a checkpoint keeps it, ask for.

    Args:
        spec: its `name`, and any of its options in `DEFAULTS`; None for training on the images.
        shape: (C, H, W) of an image.

    Returns:
        `augmentation` and `trades_beta` of `Trainer`.

    Raises:
        ValueError: an unknown name, an option that it does not have, no eps where there must be
            one, or a value out of range.

    Example:
        >>> augmentation, beta = adversarial_training({"name": "trades", "eps": 0.1}, (1, 8, 8))
        >>> beta
        6.0
    """
    if spec is None:
        return None, None
    name = spec["name"]
    if name not in DEFAULTS:
        raise ValueError(
            f"adversarial_training: name must be one of {', '.join(DEFAULTS)}, got {name}"
        )
    strange = [key for key in spec if key != "name" and key not in DEFAULTS[name]]
    if strange:
        raise ValueError(
            f"adversarial_training: {name} takes the options {', '.join(DEFAULTS[name])}, "
            f"got {', '.join(strange)}"
        )
    options = {**DEFAULTS[name], **{key: spec[key] for key in spec if key != "name"}}
    if options.get("eps", 0.0) is None:
        raise ValueError(f"adversarial_training: eps must be given for {name}, got None")
    beta = options.pop("beta", None)
    if name == "lrc":
        return lrc_augmentation(shape, **options), beta
    return _MAKE[name](**options), beta


_MAKE: dict[str, Callable[..., Augmentation]] = {
    "fgsm-rs": fgsm_rs_augmentation,
    "pgd": pgd_augmentation,
    "deepfool": deepfool_augmentation,
    "trades": trades_augmentation,
    "uniform": uniform_augmentation,
}


def _generator(device: torch.device) -> torch.Generator:
    """On the device, seeded from the global random state."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), device="cpu")))


def _check(name: str, eps: float | None, steps: int = 1, step_size: float | None = None) -> None:
    for argument, value in (("eps", eps), ("step_size", step_size)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: {argument} must be positive and finite, got {value}")
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
