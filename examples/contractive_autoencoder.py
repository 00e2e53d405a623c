"""A contractive autoencoder: its code changes little where its input does.

Rifai, Vincent, Muller, Glorot and Bengio (2011) add ||dh/dx||_F^2, the squared Frobenius norm of
the code's Jacobian. Along a random direction v of the code it is one gradient away:
E ||d(v h)/dx||^2 = ||dh/dx||_F^2 for independent signs v. Here: scikit-learn's digits.

    python examples/contractive_autoencoder.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import robustkern
from robustkern.training.data import load
from robustkern.training.report import table


class Contraction(robustkern.GradientPenalty):
    """weight mean_i ||dh/dx_i||_F^2, estimated without bias from one random direction each."""

    def __init__(self, weight: float) -> None:
        super().__init__(weight, p=2, power=2)

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The code along a direction of random signs, the same in every pass of a step."""
        return (outputs * torch.randn_like(outputs).sign()).sum(1)


class Autoencoder(nn.Module):
    """An encoder with sigmoids, and a decoder that shares its weights, as in the paper."""

    def __init__(self, size: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, code), nn.Sigmoid())
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        """The reconstruction."""
        return F.linear(self.encoder(inputs), self.encoder[0].weight.T, self.bias)


def step(model: Autoencoder, inputs: Tensor, penalty: Contraction) -> None:
    """The gradient of the reconstruction's error plus the penalty on the encoder."""
    # The encoder has no targets: anything as long as the batch will do.
    term = penalty(model.encoder, inputs, inputs, method="first_order")
    (F.mse_loss(model(inputs), inputs) + term).backward()


def train(inputs: Tensor, weight: float, epochs: int, seed: int) -> Autoencoder:
    """An autoencoder with a code of 32 numbers."""
    torch.manual_seed(seed)
    model, penalty = Autoencoder(inputs.shape[1], 32), Contraction(weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in trange(epochs, desc=f"weight {weight:g}", leave=False):
        for batch in inputs[torch.randperm(len(inputs))].split(64):
            optimizer.zero_grad()
            step(model, batch, penalty)
            optimizer.step()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with the penalty, and measure error and Jacobian on unseen digits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weight", type=float, default=3e-3, help="of the penalty")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load("digits")
    unseen = data.x_test.flatten(1)
    rows = []
    for name, weight in (("no penalty", 0.0), ("contractive", options.weight)):
        model = train(data.x_train.flatten(1), weight, options.epochs, options.seed)
        with torch.no_grad():
            error = F.mse_loss(model(unseen), unseen).sqrt()
            jacobian = torch.func.vmap(torch.func.jacrev(model.encoder))(unseen)
            # How far noise moves a code, in units of how far codes lie apart.
            code, moved = model.encoder(unseen), model.encoder(unseen + 0.1 * torch.randn(64))
            moves = (moved - code).norm(dim=1).mean() / torch.pdist(code).mean()
        norm = jacobian.square().sum(dim=(1, 2)).mean()
        rows.append([name, f"{error:.3f}", f"{norm:.2f}", f"{moves:.3f}"])
    print(table(["autoencoder", "error of a pixel", "Jacobian", "moved by noise"], rows))


if __name__ == "__main__":
    main()
