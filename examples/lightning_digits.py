"""A penalty in Lightning: `training_step` returns the regularized loss, all else is as ever.

Trains a small network on scikit-learn's digits; `--weight 0` shows it without the penalty.

    python examples/lightning_digits.py
"""

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import robustkern
from robustkern.evaluation import robust_accuracy
from robustkern.integrations.lightning import regularized_loss
from robustkern.training.data import load
from robustkern.training.models import cnn


class Classifier(L.LightningModule):
    """Trains a network with a penalty."""

    def __init__(self, network: torch.nn.Module, penalty: robustkern.Penalty) -> None:
        super().__init__()
        self.network, self.penalty = network, penalty

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        return self.network(inputs)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, penalty included."""
        inputs, targets = batch
        loss, step = regularized_loss(self, inputs, targets, self.penalty)
        self.log_dict({"loss": step.loss, "penalty": step.penalty}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--weight", type=float, default=0.3, help="of the penalty")
    options = parser.parse_args(arguments)
    data = load("digits")
    torch.manual_seed(0)
    penalty = robustkern.GradientPenalty(options.weight, power=2)
    classifier = Classifier(cnn(data.shape, data.classes), penalty)
    batches = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(classifier, batches)
    found = robust_accuracy(classifier, data.x_test, data.y_test, eps=[0.1])
    print(f"accuracy {found.clean:.1%}, under PGD-20 at 0.1 {found.pgd[0]:.1%}")


if __name__ == "__main__":
    main()
