"""Attacks that look for the nearest adversarial input, by foolbox of `robustkern[eval]`.

What is misclassified already is left as it is, and so is a sample of which no adversarial input is
found: that one is the one classified right at the end. The others lie close behind the decision
boundary, where the rounding of a batch of another size may tip a few of them back.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.evaluation.attacks import _attack_standing, _check_counts
from robustkern.evaluation.balls import precise

Find = Callable[[Any, Any, Tensor, Tensor], Tensor]


def deepfool(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    p: float = 2,
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
) -> Tensor:
    r"""DeepFool (Moosavi-Dezfooli et al. 2016): across the linearized model's nearest boundary.

    Args:
        model: maps inputs to (N, classes); attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        p: norm of the perturbation that is to be small, 2 or inf.
        steps: at most; each costs `candidates` - 1 passes back and forth.
        candidates: classes, the likeliest first, to which a sample may move.
        overshoot: how far beyond the boundary, as a share of the way to it.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: foolbox is missing.
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], targets or outputs that are no labels and classes,
            another `p`, `steps` below 1, or `candidates` below 2.
    """
    _check_two_or_inf("deepfool", p)
    _check_search("deepfool", steps, candidates)

    def find(foolbox: Any, attacked: Any, x: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = _search(foolbox, p, steps, candidates, overshoot).run(attacked, x, labels)
        return found

    return _nearest("deepfool", model, inputs, targets, find)


def carlini_wagner(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int = 1000,
    searches: int = 9,
    step_size: float = 0.01,
    confidence: float = 0.0,
    initial_const: float = 1e-3,
) -> Tensor:
    r"""The L2 attack of Carlini and Wagner (2017): Adam on squared distance plus c times margin.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        steps: of Adam for each c, at most; each costs a pass back and forth.
        searches: values of c that are tried, by binary search for each sample.
        step_size: Adam's, in the space whose tanh gives the inputs.
        confidence: by how much another logit is to exceed the label's.
        initial_const: the first c.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `deepfool` raises it.
        TypeError: as `deepfool` raises it.
        ValueError: as `deepfool` raises it, or for `steps` or `searches` below 1.
    """
    _check_counts("carlini_wagner", steps=steps, searches=searches)

    def find(foolbox: Any, attacked: Any, x: Tensor, labels: Tensor) -> Tensor:
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=searches,
            steps=steps,
            stepsize=step_size,
            confidence=confidence,
            initial_const=initial_const,
        )
        found: Tensor = attack.run(attacked, x, labels)
        # Its sign of failure is a black image, which may be misclassified itself.
        return _where(found.flatten(1).any(1), found, x)

    return _nearest("carlini_wagner", model, inputs, targets, find)


def boundary(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int = 25000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The Boundary attack (Brendel et al. 2018): a walk along the boundary, in L2, by labels.

    It starts where the way to uniform noise leaves the class.

    Args:
        model: maps inputs to (N, classes), of which it sees the largest only; in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        steps: at most; each costs a forward pass, every tenth two.
        generator: gives the seed of the noise; 0 when None, so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `deepfool` raises it.
        TypeError: as `deepfool` raises it.
        ValueError: as `deepfool` raises it, or for `steps` below 1.
    """
    _check_counts("boundary", steps=steps)

    def find(foolbox: Any, attacked: Any, x: Tensor, labels: Tensor) -> Tensor:
        attack = foolbox.attacks.BoundaryAttack(steps=steps)
        return _from_noise(foolbox, attack, attacked, x, labels)

    return _nearest("boundary", model, inputs, targets, find, generator)


def hop_skip_jump(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    p: float = 2,
    steps: int = 64,
    evaluations: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""HopSkipJump (Chen et al. 2020): descent by the boundary's normal, estimated from labels.

    It starts where the way to uniform noise leaves the class.

    Args:
        model: maps inputs to (N, classes), of which it sees the largest only; in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        p: norm of the perturbation that is to be small, 2 or inf.
        steps: of the descent.
        evaluations: forward passes for the first normal; step k takes sqrt(k) times as many, up to
            10,000.
        generator: gives the seed of the noise; 0 when None, so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached.

    Raises:
        ImportError: as `deepfool` raises it.
        TypeError: as `deepfool` raises it.
        ValueError: as `deepfool` raises it, or for `steps` or `evaluations` below 1.
    """
    _check_two_or_inf("hop_skip_jump", p)
    _check_counts("hop_skip_jump", steps=steps, evaluations=evaluations)

    def find(foolbox: Any, attacked: Any, x: Tensor, labels: Tensor) -> Tensor:
        class PerSample(foolbox.attacks.HopSkipJumpAttack):  # type: ignore[misc]
            def approximate_gradients(self, *given: Any) -> Any:
                """Of length 1 for each sample: foolbox's have length 1 all together."""
                gradient = super().approximate_gradients(*given)
                flat = gradient.flatten(1)
                return (flat / (flat.norms.l2(-1, keepdims=True) + 1e-12)).reshape(gradient.shape)

        attack = PerSample(
            steps=steps,
            initial_gradient_eval_steps=evaluations,
            constraint="l2" if p == 2 else "linf",
        )
        return _from_noise(foolbox, attack, attacked, x, labels)

    return _nearest("hop_skip_jump", model, inputs, targets, find, generator)


def _nearest(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    find: Find,
    generator: torch.Generator | None = None,
) -> Tensor:
    foolbox = _library(name, "foolbox")

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        # foolbox differentiates by `backward`, which would fill the parameters' `.grad`.
        with _frozen(model), _seeded(generator), torch.enable_grad():
            attacked = foolbox.PyTorchModel(_Cast(model, x.dtype), bounds=(0, 1), device=x.device)
            found = find(foolbox, attacked, precise(x), labels).detach().clamp(0, 1).to(x.dtype)
        return _where(_broken(model, found, labels), found, x)

    return _attack_standing(name, model, inputs, targets, attack)


class _Cast(nn.Module):
    """A network of any precision for attacks that compute in float32 or float64."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return precise(self.model(inputs.to(self.dtype)))


def _from_noise(foolbox: Any, attack: Any, attacked: Any, x: Tensor, labels: Tensor) -> Tensor:
    """`attack` from a blend with noise; a sample of which no blend is misclassified stays."""
    blend = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that some of them are not
        start = blend.run(attacked, x, labels)
    broken = _broken(attacked, start, labels).nonzero().squeeze(1)
    found = x.clone()
    if len(broken):
        found[broken] = attack.run(
            attacked, x[broken], labels[broken], starting_points=start[broken]
        )
    return found


def _broken(model: Callable[[Tensor], Tensor], found: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return found.isfinite().flatten(1).all(1) & (model(found).argmax(1) != labels)


def _where(condition: Tensor, found: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (found.dim() - 1)), found, otherwise)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[int]:
    """Seed torch from `generator`, yield the seed, and give each device its random state back."""
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield seed


def _search(foolbox: Any, p: float, steps: int, candidates: int, overshoot: float) -> Any:
    kind = foolbox.attacks.L2DeepFoolAttack if p == 2 else foolbox.attacks.LinfDeepFoolAttack
    return kind(steps=steps, candidates=candidates, overshoot=overshoot)


def _check_two_or_inf(name: str, p: float) -> None:
    if p not in (2, math.inf):
        raise ValueError(f"{name}: p must be 2 or inf, got {p}")


def _check_search(name: str, steps: int, candidates: int) -> None:
    if steps < 1 or candidates < 2:
        raise ValueError(
            f"{name}: steps must be at least 1 and candidates at least 2, "
            f"got {steps} and {candidates}"
        )


def _library(name: str, module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own imports
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{name}: {module} cannot be imported; install it with: pip install "robustkern[eval]"'
        ) from error
