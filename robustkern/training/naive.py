"""The naive CURE as a trainer: what the engine is compared with."""

from typing import Any

import torch
from torch import Tensor, nn

from robustkern import reference
from robustkern.training.data import Dataset
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.trainer import Trainer


class NaiveCURETrainer(Trainer):
    """Trains with CURE in the structure of its authors' code, in plain PyTorch.

    Args:
        model: as for `Trainer`.
        data: the images.
        weight: of the penalty, which is the norm, not its square.
        h: L2 length of the finite difference, in input units.
        **options: of `Trainer`.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, *, weight: float, h: float, **options: Any
    ) -> None:
        super().__init__(model, data, ScheduledPenalty([], data.shape), **options)
        self.weight, self.h = weight, h

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take the place of the engine.

        Args:
            inputs: (N, C, H, W).
            targets: (N,) int64.

        Returns:
            The loss, and 0 for the penalty, whose value stays unknown; detached.
        """
        loss = reference.authors_cure_backward(
            self.model, inputs, targets, weight=self.weight, h=self.h
        )
        return loss, torch.zeros_like(loss)
