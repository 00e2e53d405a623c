"""AutoAttack and its parts (Croce and Hein 2020), by pyautoattack of `robustkern[eval]`.

These have no step size to tune. What is misclassified already is left as it is, and so is a sample
that withstands: that one is the one classified right at the end. Computed in float32, whatever the
model computes in. Warnings, of outputs that are no logits or of gradients that are zero, come from
the logger "auto-attack".
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustkern.evaluation.attacks import _attack_standing, _check_counts, _check_norm
from robustkern.evaluation.balls import project, rounded
from robustkern.evaluation.minimal import _broken, _frozen, _library, _seeded, _where

Predict = Callable[[Tensor], Tensor]
_LOGGER = logging.getLogger("auto-attack")  # AutoAttack's own


def apgd(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    loss: Literal["ce", "dlr"] = "ce",
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Auto-PGD: PGD with momentum that halves its step where the loss no longer rises.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: radius of the ball, in input units.
        p: norm of the ball: 1, 2 or inf.
        loss: the cross entropy, or the difference of logits ratio, which needs three classes.
        steps: number of gradient steps.
        restarts: how often to start, from noise.
        generator: gives the seed of the noise; 0 when None, so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: pyautoattack is missing.
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], targets or outputs that are no labels and classes, a
            negative or non-finite `eps`, another `p` or `loss`, or `steps` or `restarts` below 1.
    """
    if loss not in ("ce", "dlr"):
        raise ValueError(f"apgd: loss must be 'ce' or 'dlr', got {loss!r}")
    _check_counts("apgd", steps=steps, restarts=restarts)

    def build(predict: Predict, classes: int, **options: Any) -> Any:
        _check_classes("apgd", classes, 3 if loss == "dlr" else 2)
        module = importlib.import_module("pyautoattack.autopgd_base")
        attack = module.APGDAttack(
            predict, loss=loss, n_iter=steps, n_restarts=restarts, logger=_LOGGER, **options
        )
        return attack.perturb

    return _within("apgd", model, inputs, targets, eps, p, build, generator)


def fab(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fast adaptive boundary attack: the nearest adversarial input, where it lies in the ball.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: radius of the ball, in input units.
        p: norm of the ball: 1, 2 or inf.
        steps: each costs a backward pass for every class.
        restarts: how often to start: from `inputs` first, then from noise.
        generator: gives the seed of the noise; 0 when None, so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `apgd` raises it.
        TypeError: as `apgd` raises it.
        ValueError: as `apgd` raises it.
    """
    _check_counts("fab", steps=steps, restarts=restarts)

    def build(predict: Predict, classes: int, **options: Any) -> Any:
        module = importlib.import_module("pyautoattack.fab_pt")
        return module.FABAttack_PT(predict, n_iter=steps, n_restarts=restarts, **options).perturb

    return _within("fab", model, inputs, targets, eps, p, build, generator)


def square(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    queries: int = 5000,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Square attack (Andriushchenko et al. 2020): random squares, kept where the margin shrinks.

    It asks for no gradient.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, C, H, W) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: radius of the ball, in input units.
        p: norm of the ball: 1, 2 or inf.
        queries: forward passes of a restart, at most.
        restarts: how often to start.
        generator: gives the seed of the squares; 0 when None, so that two calls give the same
            result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `apgd` raises it.
        TypeError: as `apgd` raises it.
        ValueError: as `apgd` raises it, or for `inputs` that are no images, of 5 pixels or more
            each way where `p` is 1 or 2, or `queries` below 1.
    """
    _check_counts("square", queries=queries, restarts=restarts)
    _check_images("square", inputs, p)

    def build(predict: Predict, classes: int, **options: Any) -> Any:
        module = importlib.import_module("pyautoattack.square")
        return module.SquareAttack(
            predict, n_queries=queries, n_restarts=restarts, resc_schedule=False, **options
        ).perturb

    return _within("square", model, inputs, targets, eps, p, build, generator)


def autoattack(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    p: float = math.inf,
    version: Literal["standard", "plus", "rand"] = "standard",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""AutoAttack: APGD, targeted APGD, targeted FAB and Square, each on what still stands.

    Args:
        model: maps inputs to (N, classes), the logits, of four classes or more; attacked in eval
            mode.
        inputs: (N, C, H, W) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: radius of the ball, in input units.
        p: norm of the ball: 1, 2 or inf.
        version: its authors' choice of attacks; "plus" restarts them, "rand" is for networks that
            draw random numbers.
        generator: gives the seed; 0 when None, so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `apgd` raises it.
        TypeError: as `apgd` raises it.
        ValueError: as `square` raises it, or for fewer than four classes or another `version`.
    """
    if version not in ("standard", "plus", "rand"):
        raise ValueError(
            f"autoattack: version must be 'standard', 'plus' or 'rand', got {version!r}"
        )
    _check_images("autoattack", inputs, p)

    def build(predict: Predict, classes: int, **options: Any) -> Any:
        _check_classes("autoattack", classes, 4)
        attack = importlib.import_module("pyautoattack").AutoAttack(
            predict, version=version, **options
        )
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)

        def perturb(x: Tensor, labels: Tensor) -> Tensor:
            trace = sys.gettrace()  # it sets its own and leaves none: a debugger's would be lost
            try:
                found: Tensor = attack.run_standard_evaluation(x, labels, batch_size=len(x))[0]
            finally:
                sys.settrace(trace)
            return found

        return perturb

    return _within("autoattack", model, inputs, targets, eps, p, build, generator)


def _within(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    p: float,
    build: Callable[..., Any],
    generator: torch.Generator | None,
) -> Tensor:
    _check_norm(name, p)
    _library(name, "pyautoattack")
    norm = {1: "L1", 2: "L2", math.inf: "Linf"}[p]

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        def predict(given: Tensor) -> Tensor:
            # A copy: Square writes into the outputs, which may be a network's buffer.
            outputs: Tensor = model(given.to(x.dtype)).to(torch.float32, copy=True)
            return outputs

        classes = predict(x[:1]).shape[1]
        # FAB differentiates by `backward`, which would fill the parameters' `.grad`.
        with _frozen(model), _seeded(generator) as seed:
            perturb = build(predict, classes, norm=norm, eps=eps, seed=seed, device=x.device)
            found = perturb(x.float().contiguous(), labels) if eps > 0 else x
        found = rounded(project(found, x, eps, p).clamp(0, 1), x, eps, p)
        return _where(_broken(model, found, labels), found, x)

    return _attack_standing(name, model, inputs, targets, attack, eps=eps)


def _check_classes(name: str, classes: int, least: int) -> None:
    if classes < least:
        raise ValueError(f"{name}: model must return {least} classes or more, got {classes}")


def _check_images(name: str, inputs: Tensor, p: float) -> None:
    if not isinstance(inputs, Tensor):
        return  # named with the other arguments
    if inputs.dim() != 4:
        raise ValueError(f"{name}: inputs must be (N, C, H, W), got {tuple(inputs.shape)}")
    if p != math.inf and min(inputs.shape[2:]) < 5:
        raise ValueError(
            f"{name}: inputs must be 5 pixels or more each way for p = {p}, "
            f"got {tuple(inputs.shape)}"
        )
