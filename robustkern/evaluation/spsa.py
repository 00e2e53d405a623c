"""SPSA (Uesato et al. 2018): gradient descent on the margin, the gradient estimated from outputs.

No gradient is asked for, so that a network that hides its gradients is attacked all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation.attacks import _attack_standing, _check_positive, _margin
from robustkern.evaluation.balls import precise, project, rounded
from robustkern.evaluation.minimal import _Cast


def spsa(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    steps: int = 100,
    directions: int = 128,
    delta: float = 0.01,
    step_size: float = 0.01,
    chunk: int = 1024,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Simultaneous perturbation in the L-infinity ball, by Adam.

    The gradient of the margin, the label's logit less the largest other one, is the mean over
    random signs v of v (margin(x + delta v) - margin(x - delta v)) / (2 delta). Each sample has its
    own signs, and is left as soon as it is misclassified.

    Args:
        model: maps inputs to (N, classes), the logits; attacked in eval mode.
        inputs: (N, \*D) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: radius of the ball, in input units.
        steps: of Adam, at most; each costs 2 `directions` + 1 forward passes.
        directions: vectors of signs in an estimate.
        delta: change of an input element along them, in input units; the model sees inputs as far
            outside of [0, 1].
        step_size: Adam's, in input units.
        chunk: samples per forward pass of an estimate; the memory used depends on it.
        generator: source of the signs, on the device of `inputs`; when None, a new one with seed 0,
            so that two calls give the same result.

    Returns:
        Adversarial inputs of the shape, dtype and device of `inputs`, detached: the last iterate of
        a sample that withstands.

    Raises:
        TypeError: `model` is no module, or `inputs` no floating-point tensor.
        ValueError: `inputs` outside [0, 1], targets or outputs that are no labels and classes, a
            negative or non-finite `eps`, `steps` or `directions` below 1, `chunk` below 2, or a
            `delta` or `step_size` that is not positive and finite.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(model.bias), nn.init.eye_(model.weight)
        >>> spsa(model, torch.tensor([[0.55, 0.45]]), torch.tensor([0]), eps=0.1).argmax(1)
        tensor([1])
    """
    if steps < 1 or directions < 1 or chunk < 2:
        raise ValueError(
            "spsa: steps and directions must be at least 1 and chunk at least 2, "
            f"got {steps}, {directions} and {chunk}"
        )
    _check_positive("spsa", delta=delta, step_size=step_size)

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        source = generator or torch.Generator(x.device).manual_seed(0)
        network = _Cast(model, x.dtype)
        adversarial = x.clone()
        standing = torch.arange(len(x), device=x.device)
        point = precise(x).clone().requires_grad_()
        adam = torch.optim.Adam([point], lr=step_size)
        for _ in range(steps):
            held = point.detach()[standing]
            slope = torch.zeros_like(point)
            slope[standing] = _slope(
                network, held, labels[standing], directions, delta, chunk, source
            )
            point.grad = slope
            adam.step()
            point.detach().copy_(project(point.detach(), x, eps, torch.inf).clamp(0, 1))
            adversarial[standing] = rounded(point.detach(), x, eps, torch.inf)[standing]
            # Of two logits that tie, as coarse ones do, the first is the prediction.
            right = model(adversarial[standing]).argmax(1) == labels[standing]
            standing = standing[right]
            if not len(standing):
                break
        return adversarial

    return _attack_standing("spsa", model, inputs, targets, attack, eps=eps)


def _slope(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    directions: int,
    delta: float,
    chunk: int,
    generator: torch.Generator,
) -> Tensor:
    """The estimate; its forward passes are full, whichever samples' directions are in them."""
    slope = torch.zeros_like(x)
    pairs = torch.arange(len(x) * directions, device=x.device)
    for pair in torch.split(pairs, chunk // 2):
        sample = pair // directions
        shape = (len(pair), *x.shape[1:])
        signs = torch.randint(2, shape, generator=generator, device=x.device, dtype=torch.int8)
        shift = (2 * delta) * signs.to(x.dtype) - delta
        here, label = x[sample], labels[sample]
        margin = _margin(model(torch.cat([here + shift, here - shift])), label.repeat(2))
        rise = margin[: len(pair)] - margin[len(pair) :]
        # The samples of a chunk lie in a row: their sums are a product with few rows, which unlike
        # `index_add_` gives the same on every run.
        first, last = int(pair[0]) // directions, int(pair[-1]) // directions
        weights = F.one_hot(sample - first, last - first + 1).to(x.dtype) * rise[:, None]
        slope[first : last + 1] += (weights.T @ shift.flatten(1)).view(-1, *x.shape[1:])
    return slope / (2 * directions * delta**2)
