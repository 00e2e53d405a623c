"""For Lightning, whose `Trainer` calls backward itself."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustkern.gradients.passes import take
from robustkern.gradients.steps import Step, backward, known

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from robustkern.penalties import Penalty

__all__ = ["regularized_loss"]


def regularized_loss(
    module: "LightningModule", inputs: Any, targets: Tensor, penalty: "Penalty", **options: Any
) -> tuple[Tensor, Step]:
    r"""The loss that `training_step` returns: loss + penalty, its gradient computed already.

    The passes of `robustkern.backward` are run here, and backward only hands their gradient out. So
    they are as many, and automatic optimization, precision plugins, accumulation, clipping and DDP
    work as with any loss. Call it once a `training_step`, for the whole of the loss. The gradient
    is kept beside `.grad` until backward.

    Make the penalty an attribute of the module: its state is then in the checkpoints and on the
    module's device.

    Args:
        module: called as `module(inputs)`, attached to its `Trainer`.
        inputs: as `robustkern.backward` takes them.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        **options: those of `robustkern.backward`, but for `scaler`, which is the Trainer's. A
            `loss_fn` with parameters must be a part of the module.

    Returns:
        The sum of loss and penalty, 0-dimensional, differentiable once with respect to the
        parameters; and the step, to log.

    Raises:
        TypeError: as `robustkern.backward`.
        ValueError: as `robustkern.backward`.

    Example:
        >>> import lightning as L, robustkern, torch
        >>> from robustkern.integrations.lightning import regularized_loss
        >>> class Classifier(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(4, 3)
        ...         self.penalty = robustkern.GradientPenalty(weight=0.1)
        ...
        ...     def forward(self, inputs):
        ...         return self.network(inputs)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         inputs, targets = batch
        ...         loss, step = regularized_loss(self, inputs, targets, self.penalty)
        ...         self.log("penalty", step.penalty)
        ...         return loss
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    held = take(parameters)
    try:
        step = backward(module, inputs, targets, penalty, scaler=scaler, **options)
        gradients = take(parameters)
    finally:
        for p, grad in zip(parameters, held, strict=True):
            p.grad = grad
    if scaler is not None:  # the precision plugin scales the loss that it is given
        scale = scaler.scale(torch.ones_like(step.loss))
        torch._foreach_div_([g for g in gradients if g is not None], scale)
    return known(step.loss + step.penalty, gradients, parameters), step
