"""The naive CURE as a trainer: what the engine is compared with."""

from typing import Any

import torch
from torch import Tensor, nn

from robustkern import reference
from robustkern.gradients.network import is_compiled
from robustkern.penalties import CURE
from robustkern.training.data import Dataset
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.trainer import Trainer


class NaiveCURETrainer(Trainer):
    """Trains with CURE in the structure of its authors' code, in plain PyTorch.

    Args:
        model: as for `Trainer`.
        data: the images.
        penalty: CURE by the authors' formula, which is the norm, along the sign.
        **options: of `Trainer`. The penalty's passes are in eval mode whatever `batch_norm` says,
            and there is no `shift`.

    Raises:
        ValueError: another penalty, float16, a compiled model, or an option out of range.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, penalty: ScheduledPenalty, **options: Any
    ) -> None:
        cure = penalty.penalty
        if not isinstance(cure, CURE) or cure.squared or cure.anchored or cure.direction != "sign":
            raise ValueError(
                "NaiveCURETrainer: penalty must be the norm of CURE along the sign, not anchored, "
                f"got {cure}"
            )
        if options.get("precision") == "float16":
            raise ValueError(
                "NaiveCURETrainer: precision must not be float16, whose losses are scaled, "
                "got float16"
            )
        if is_compiled(model):
            raise ValueError(
                "NaiveCURETrainer: model must not be compiled, which has no double backward, "
                f"got {type(model).__name__}"
            )
        super().__init__(model, data, penalty, **options)
        self._cure = cure

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take the place of the engine.

        Args:
            inputs: (N, C, H, W).
            targets: (N,) int64.

        Returns:
            The loss, and 0 for the penalty, whose value stays unknown; detached.
        """
        loss = reference.authors_cure_backward(
            self.model, inputs, targets, weight=self._cure.weight, h=self._cure.h
        )
        return loss, torch.zeros_like(loss)
