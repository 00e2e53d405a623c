"""A trained network among others, and what the figures of an analysis measure of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.analysis import (
    InputHessian,
    curved_operations,
    gauss_newton,
    lanczos,
    margin_loss,
)
from robustkern.evaluation import adversarial_inputs, deepfool

ATTACKED = 200  # images that DeepFool moves
_DIRECTIONS = 10  # along which boundaries curve alike
_BENT = 100  # of the attacked images, those whose boundaries are looked at
_STEPS = 40  # of Lanczos, where the matrix is not symmetric or float32 leaves noise


@dataclass(frozen=True)
class Portrait:
    r"""A network in eval mode, images on its device, and what several figures need, found once.

    Attributes:
        model: maps (N, \*D) to (N, classes).
        inputs: (N, \*D) test images in [0, 1].
        targets: (N,) their labels.
        log: of its training, a record per epoch.
        seed: of random directions.
        h: L2 length of finite differences, in input units.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    log: Sequence[Mapping[str, Any]]
    seed: int
    h: float

    def generator(self) -> torch.Generator:
        """A new one, from the seed."""
        return torch.Generator(self.inputs.device).manual_seed(self.seed)

    @cached_property
    def piecewise_linear(self) -> bool:
        """Whether the Gauss-Newton matrix is the Hessian."""
        return not curved_operations(self.model, self.inputs[:1])

    @cached_property
    def normals(self) -> Tensor:
        """What DeepFool (L2) adds to the first images; zero where it finds nothing to add."""
        x, y = self.inputs[:ATTACKED], self.targets[:ATTACKED]
        return adversarial_inputs(self.model, x, y, deepfool) - x

    @cached_property
    def distances(self) -> Tensor:
        """Lengths of the normals: 0 where misclassified, infinite where none was found."""
        lengths = self.normals.flatten(1).norm(dim=1)
        distances: Tensor = lengths.masked_fill(
            (lengths == 0) & self.right[: len(lengths)], torch.inf
        )
        return distances

    @cached_property
    def moved(self) -> Tensor:
        """Indices of the images that are classified rightly and that DeepFool moves."""
        return ((self.distances > 0) & self.distances.isfinite()).nonzero().flatten()

    @cached_property
    def right(self) -> Tensor:
        """Which images are classified as labelled."""
        with torch.no_grad():
            parts = [self.model(x).argmax(1) for x in torch.split(self.inputs, 256)]
        right: Tensor = torch.cat(parts) == self.targets
        return right

    @cached_property
    def curvature(self) -> tuple[Tensor, Tensor]:
        """Of the cross-entropy at every image: largest eigenvalue and its eigenvector."""
        if self.piecewise_linear:
            found = gauss_newton(self.model, self.inputs)
            return found.values[:, 0], found.vectors[:, 0]
        hessian = InputHessian(self.model, self.inputs, self.targets, method="exact")
        pairs = lanczos(hessian, self.inputs, steps=_STEPS, generator=self.generator())
        return pairs.values[:, 0], pairs.vectors[:, 0]

    def margin_curvature(self, count: int) -> tuple[Tensor, Tensor]:
        """The same of the margin loss, at the first images."""
        x, y = self.inputs[:count], self.targets[:count]
        hessian = InputHessian(self.model, x, y, loss_fn=_margins, method="exact")
        pairs = lanczos(hessian, x, tolerance=1e-4, steps=_STEPS, generator=self.generator())
        return pairs.values[:, 0], pairs.vectors[:, 0]

    @cached_property
    def boundary(self) -> tuple[InputHessian, InputHessian]:
        """Of the boundary at DeepFool's points: of half of them, and of the others."""
        place = self.moved[:_BENT]
        points = (self.inputs[place] + self.normals[place]).clamp(0, 1)
        with torch.no_grad():
            classes = torch.stack([self.targets[place], self.model(points).argmax(1)], dim=1)
        half = len(place) // 2
        return (
            self._bent(points[:half], classes[:half]),
            self._bent(points[half:], classes[half:]),
        )

    @cached_property
    def shared_directions(self) -> Tensor:
        """Along which the boundaries of the first half curve most, on the mean."""
        hessian, _ = self.boundary

        def mean_product(vectors: Tensor) -> Tensor:
            return curving(hessian)(vectors.expand_as(hessian.inputs)).mean(0, keepdim=True)

        like = hessian.inputs[:1]
        top = min(_DIRECTIONS, like.numel())
        steps = min(_STEPS, like.numel())
        return lanczos(mean_product, like, top, steps=steps, generator=self.generator()).vectors[0]

    def _bent(self, points: Tensor, classes: Tensor) -> InputHessian:
        return InputHessian(
            self.model, points, classes, loss_fn=_differences, h=self.h, central=True
        )


def curving(hessian: InputHessian) -> Callable[[Tensor], Tensor]:
    """Products with the Hessian of the logits' difference over its gradient's length."""
    lengths = hessian.gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    scale = lengths.view(-1, *[1] * (hessian.gradient.dim() - 1))
    return lambda vectors: hessian(vectors) / scale


def _margins(outputs: Tensor, targets: Tensor) -> Tensor:
    return margin_loss(outputs.double(), targets, reduction="none")


def _differences(outputs: Tensor, classes: Tensor) -> Tensor:
    own, other = outputs.gather(1, classes).unbind(1)
    return other - own
