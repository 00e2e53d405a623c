"""Attack by long-range-correlated noise (Roth et al. 2018, sec. 4.3): no gradient is asked for.

Noise whose neighbouring pixels agree looks like stains and shadows, and is what networks stand
worst among the kinds of noise. Like the other attacks, this one leaves the network as it found it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern.analysis.samples import logits
from robustkern.covariance import CovarianceFunction
from robustkern.evaluation.accuracy import accuracy
from robustkern.evaluation.attacks import _attack_standing, _check, _check_counts


def lrc(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    decay_length: float = 4.0,
    covariance: CovarianceFunction | None = None,
    draws: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The worst of some draws of noise: x + eps xi, xi ~ N(0, Sigma), clipped to [0, 1].

    A sample that a draw breaks is not evaluated again: the next draws of the others take its place,
    so that every forward pass but the last is a full one.

    Args:
        model: maps inputs to (N, classes); attacked in eval mode.
        inputs: (N, C, H, W) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: standard deviation of the noise of a pixel, in input units, where Sigma has unit
            variances, as by default.
        decay_length: of the noise, in pixels; see `CovarianceFunction.exponential`.
        covariance: Sigma in place of that one, such as the data's.
        draws: per sample.
        generator: source of the noise; when None, a new one with seed 0, so that two calls give
            the same result.

    Returns:
        For each sample the first draw that is misclassified, or the one of the highest cross
        entropy: shape, dtype and device of `inputs`, detached. A sample that is misclassified
        already is left as it is.

    Raises:
        TypeError: `model` is no module, `inputs` no floating-point tensor, or `covariance` no
            `CovarianceFunction`.
        ValueError: `inputs` outside [0, 1] or no images of the covariance's size, targets or
            outputs that are no labels and classes, a negative or non-finite `eps`, a `decay_length`
            that is not positive, `draws` below 1, or a covariance that is not positive
            semidefinite.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> inputs, targets = torch.rand(5, 3, 2, 2), torch.arange(5) % 2
        >>> lrc(model, inputs, targets, 0.1, decay_length=2.0, draws=3).shape
        torch.Size([5, 3, 2, 2])
    """
    _check("lrc", model, inputs, targets, eps)
    if inputs.dim() != 4:
        raise ValueError(f"lrc: inputs must be (N, C, H, W), got {tuple(inputs.shape)}")
    _check_counts("lrc", draws=draws)
    noise = _noise(inputs, decay_length if covariance is None else covariance)

    def attack(x: Tensor, labels: Tensor) -> Tensor:
        source = generator or torch.Generator(x.device).manual_seed(0)
        adversarial = x.clone()
        highest = torch.full((len(x),), -torch.inf, device=x.device)
        queue = torch.arange(len(x), device=x.device).repeat(draws)
        while len(queue):
            picked, queue = queue[: len(x)], queue[len(x) :]
            xi = noise.sample(len(picked), source).to(x.device)
            noisy = (x[picked] + eps * xi).clamp(0, 1).to(x.dtype)
            outputs = logits("lrc", model, noisy)
            loss = F.cross_entropy(outputs, labels[picked], reduction="none").float()
            loss[outputs.argmax(1) != labels[picked]] = torch.inf
            before = highest
            highest = before.scatter_reduce(0, picked, loss, "amax")
            # Of a sample's draws that are equally bad, the first.
            other = (loss <= before[picked]) | (loss < highest[picked])
            place = torch.arange(len(picked), device=x.device).masked_fill(other, len(picked))
            first = place.new_full((len(x),), len(picked)).scatter_reduce(0, picked, place, "amin")
            moved = first < len(picked)
            adversarial[moved] = noisy[first[moved]]
            queue = queue[highest[queue].isfinite()]
        return adversarial

    return _attack_standing("lrc", model, inputs, targets, attack, eps=eps)


def lrc_accuracy(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    eps: Sequence[float],
    decay_lengths: Sequence[float | CovarianceFunction],
    *,
    draws: int = 100,
    seed: int = 0,
    batch_size: int = 256,
    advance: Callable[[int], object] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Accuracy under `lrc` for every decay length and every eps.

    Args:
        model: maps (N, C, H, W) to (N, classes); batches are moved to its device and its dtype.
        inputs: (N, C, H, W) floating point, values in [0, 1].
        targets: (N,) int64 class indices.
        eps: standard deviations of the noise, in input units.
        decay_lengths: in pixels; a covariance among them is taken as it is.
        draws: per sample.
        seed: of the noise.
        batch_size: samples per pass.
        advance: called with the number of samples after each batch; in all N samples for each
            decay length and eps.

    Returns:
        For each decay length the accuracies in the order of `eps`.

    Raises:
        ValueError: as `accuracy` and `lrc` raise it.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> _ = nn.init.zeros_(model[1].weight), model[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
        >>> inputs, targets = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 0])
        >>> lrc_accuracy(model, inputs, targets, [0.1, 0.3], [1.0, 2.0, 4.0], draws=2)
        ((0.75, 0.75), (0.75, 0.75), (0.75, 0.75))
    """
    place = next(model.parameters(), inputs)

    def measure(noise: CovarianceFunction, strength: float) -> float:
        source = torch.Generator(place.device).manual_seed(seed)
        return accuracy(
            model,
            inputs,
            targets,
            attack=lambda model, batch, labels: lrc(
                model, batch, labels, strength, covariance=noise, draws=draws, generator=source
            ),
            batch_size=batch_size,
            advance=advance,
        )

    return tuple(
        tuple(measure(noise, strength) for strength in eps)
        for noise in (_noise(inputs[:0].to(place.device), length) for length in decay_lengths)
    )


def _noise(inputs: Tensor, given: float | CovarianceFunction) -> CovarianceFunction:
    channels, height, width = inputs.shape[1:]
    if isinstance(given, int | float):
        noise = CovarianceFunction.exponential(channels, height, width, given)
        return noise.to(inputs.device)
    if not isinstance(given, CovarianceFunction):
        raise TypeError(f"lrc: covariance must be a CovarianceFunction, got {type(given).__name__}")
    expected = (given.channels, given.height, given.width)
    if (channels, height, width) != expected:
        raise ValueError(
            f"lrc: inputs must be (N, C, H, W) with (C, H, W) = {expected}, the covariance's, "
            f"got {tuple(inputs.shape)}"
        )
    return given
