"""For Hugging Face's `Trainer`."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.gradients import backward
from robustkern.penalties import Penalty

try:
    from transformers import Trainer
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError(
        "transformers and accelerate cannot be imported; install them with: pip install "
        '"robustkern[transformers]"'
    ) from error

__all__ = ["RobustTrainer"]


class RobustTrainer(Trainer):
    r"""A `transformers.Trainer` that adds a penalty to the training loss of a classifier.

    Training steps are those of `robustkern.backward`; accumulation, mixed precision, clipping and
    DDP are the Trainer's. The training loss that it logs includes the penalty, the evaluation loss
    does not. The loss is cross-entropy with `args.label_smoothing_factor`, or `compute_loss_func`,
    which gets the logits alone. The penalty's own state is not part of the checkpoints.

    Args:
        *args: those of `Trainer`.
        penalty: see `robustkern.penalties`; moved to the Trainer's device.
        output: name of the model's output that holds the logits.
        wrt: name of the model's input whose gradient is penalized, floating, (N, \*D); the model's
            main input if None, such as `pixel_values`. Text is given as `inputs_embeds`.
        **kwargs: those of `Trainer`.

    Raises:
        ValueError: for a model that takes several entries of labels, or none; for DeepSpeed, which
            has a backward of its own.

    Example:
        >>> import robustkern, tempfile
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from robustkern.integrations.transformers import RobustTrainer
        >>> config = ViTConfig(image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=1)
        >>> model, penalty = ViTForImageClassification(config), robustkern.GradientPenalty(0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = RobustTrainer(model, TrainingArguments(folder), penalty=penalty)
        >>> trainer.wrt
        'pixel_values'
    """

    def __init__(
        self,
        *args: Any,
        penalty: Penalty,
        output: str = "logits",
        wrt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if len(self.label_names) != 1:
            raise ValueError(
                f"RobustTrainer: model must have one entry of labels, got {self.label_names}"
            )
        if self.is_deepspeed_enabled:
            raise ValueError("RobustTrainer: args.deepspeed must be None, got a configuration")
        self.penalty = penalty.to(self.args.device)
        self.output = output
        self.wrt = getattr(self.model, "main_input_name", "input_ids") if wrt is None else wrt

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Take the place of the loss and its backward: add to `.grad`.

        Args:
            model: the model, wrapped as it is for training.
            inputs: a batch with its labels.
            num_items_in_batch: of all accumulated batches; each counts by its own mean here.

        Returns:
            The batch's part of the loss and penalty of all accumulated batches, to log.
        """
        model.train()
        if (train := getattr(self.optimizer, "train", None)) is not None:  # a schedule-free one
            train()
        entries = dict(self._prepare_inputs(inputs))
        labels = entries.pop(self.label_names[0], None)
        with self.accelerator.autocast():
            step = backward(
                model,
                entries,
                labels,
                self.penalty,
                loss_fn=self._loss,
                output=self.output,
                wrt=self.wrt,
                scaler=self.accelerator.scaler,
            )
        batches = self.current_gradient_accumulation_steps
        if self.accelerator.sync_gradients:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= batches
        return (step.loss + step.penalty) / batches

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.compute_loss_func is not None:
            outputs = ModelOutput({self.output: logits})  # type: ignore[no-untyped-call]
            loss: Tensor = self.compute_loss_func(outputs, labels, num_items_in_batch=len(labels))
            return loss
        if labels.is_floating_point():  # the model's own loss would be another
            raise ValueError(
                "RobustTrainer: labels must be class indices, for other losses give "
                f"compute_loss_func, got {labels.dtype}"
            )
        return F.cross_entropy(logits, labels, label_smoothing=self.args.label_smoothing_factor)
