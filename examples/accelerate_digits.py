"""A penalty in Accelerate: `robustkern.backward` takes the place of `accelerator.backward`.

Trains a small network on scikit-learn's digits; `--weight 0` shows it without the penalty.

    accelerate launch examples/accelerate_digits.py
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from tqdm import trange

import robustkern
from robustkern.evaluation import robust_accuracy
from robustkern.training.data import load
from robustkern.training.models import cnn


def train_epoch(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader,
    penalty: robustkern.Penalty,
    max_norm: float = 1.0,
) -> None:
    """Train on all batches once, with the accelerator's accumulation and precision."""
    for inputs, targets in batches:
        with accelerator.accumulate(model), accelerator.autocast():
            robustkern.backward(model, inputs, targets, penalty, scaler=accelerator.scaler)
            if accelerator.sync_gradients:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= accelerator.gradient_accumulation_steps
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--weight", type=float, default=0.3, help="of the penalty")
    options = parser.parse_args(arguments)
    data = load("digits")
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    penalty = robustkern.GradientPenalty(options.weight, power=2)
    model = cnn(data.shape, data.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size=64, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for _ in trange(options.epochs, desc="epochs", disable=not accelerator.is_main_process):
        train_epoch(accelerator, model, optimizer, batches, penalty)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        found = robust_accuracy(model, data.x_test, data.y_test, eps=[0.1])
        print(f"accuracy {found.clean:.1%}, under PGD-20 at 0.1 {found.pgd[0]:.1%}")


if __name__ == "__main__":
    main()
