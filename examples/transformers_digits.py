"""A penalty in Hugging Face's Trainer: `RobustTrainer` takes its place.

Trains a small vision transformer, from nothing, on scikit-learn's digits; `--weight 0` shows it
without the penalty.

    python examples/transformers_digits.py
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import robustkern
from robustkern.evaluation import robust_accuracy
from robustkern.integrations.transformers import RobustTrainer
from robustkern.training.data import load


class Logits(torch.nn.Module):
    """The classifier as a function of pixels alone, as attacks want it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.model(pixel_values).logits


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--weight", type=float, default=0.1, help="of the penalty")
    options = parser.parse_args(arguments)
    data = load("digits")
    channels, size, _ = data.shape
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size,
        patch_size=2,
        num_channels=channels,
        num_labels=data.classes,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
    )
    model = ViTForImageClassification(config)
    samples = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(data.x_train, data.y_train, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = RobustTrainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=64,
                learning_rate=3e-3,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.accelerator.is_available(),
            ),
            penalty=robustkern.GradientPenalty(options.weight, power=2),
            train_dataset=samples,
        )
        trainer.train()
    found = robust_accuracy(Logits(model), data.x_test, data.y_test, eps=[0.1])
    print(f"accuracy {found.clean:.1%}, under PGD-20 at 0.1 {found.pgd[0]:.1%}")


if __name__ == "__main__":
    main()
