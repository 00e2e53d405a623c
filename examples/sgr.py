"""SGR on a loop of one's own, against long-range-correlated noise.

Roth, Lucchi, Nowozin and Hofmann (2018) penalize the variance that noise with the covariance of
adversarial perturbations gives the loss. `train` is the loop. Here: scikit-learn's digits.

    python examples/sgr.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import trange

import robustkern
from robustkern.evaluation import accuracy, lrc_accuracy, pgd
from robustkern.training.data import load
from robustkern.training.models import cnn
from robustkern.training.report import table

EPS, LENGTH = 0.3, 2.0  # of the noise: deviation, and decay length in pixels


def train(model: nn.Module, x: Tensor, y: Tensor, weight: float, epochs: int) -> None:
    """Train; the covariance has the data's variance, so the weight is noise over signal."""
    covariance = robustkern.CovarianceFunction(*x.shape[1:]).standardize(x.var(0).mean())
    penalty = robustkern.SGR(weight, covariance)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in trange(epochs, desc=f"weight {weight:g}", leave=False):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            robustkern.backward(model, x[batch], y[batch], penalty)
            optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with the penalty, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--weight", type=float, default=3.0, help="of SGR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load("digits")
    rows = []
    for weight in (0.0, options.weight):
        torch.manual_seed(options.seed)
        model = cnn(data.shape, data.classes)
        train(model, data.x_train, data.y_train, weight, options.epochs)
        test = (model, data.x_test, data.y_test)
        attacked = accuracy(*test, attack=lambda m, x, y: pgd(m, x, y, 0.1))
        ((noisy,),) = lrc_accuracy(*test, [EPS], [LENGTH], draws=20)
        rows.append([f"{weight:g}", *(f"{a:.1%}" for a in (accuracy(*test), attacked, noisy))])
    print(table(["weight", "clean", "PGD at 0.1", f"worst of 20 draws of noise, {EPS:g}"], rows))


if __name__ == "__main__":
    main()
