"""Force matching: a network for energies, trained on energies and on the forces they imply.

The force on an atom is minus the gradient of the energy with respect to its position, so an error
in forces is a function of the input gradient. Here: four atoms that attract each other by Morse's
potential. A configuration gives one energy but twelve force components.

    python examples/force_matching.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import robustkern
from robustkern.training.report import table

ATOMS = 4
PAIRS = torch.triu_indices(ATOMS, ATOMS, 1)


class ForceError(robustkern.Penalty):
    """weight mean_i ||-grad energy(x_i) - forces_i||^2, made anew for each batch of forces."""

    def __init__(self, weight: float, forces: Tensor) -> None:
        super().__init__()
        self.weight, self.forces = weight, forces

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The energy."""
        return outputs

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        return self.weight * (gradient + self.forces).square().flatten(1).sum(1).mean()


class EnergyNetwork(nn.Module):
    """Positions (N, 4, 3) to energies (N,), by way of the six distances."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PAIRS.shape[1], width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, positions: Tensor) -> Tensor:
        """The energies."""
        return self.layers(distances(positions) - 1)[:, 0]


def distances(positions: Tensor) -> Tensor:
    """Of all pairs of atoms, (N, 6)."""
    first, second = PAIRS
    return (positions[:, first] - positions[:, second]).norm(dim=2)


def configurations(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, energies and forces of disturbed tetrahedra with edges of about 1."""
    corners = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 8**0.5
    positions = (corners + 0.1 * torch.randn(number, ATOMS, 3)).requires_grad_()
    energies = ((1 - (-2 * (distances(positions) - 1)).exp()).square() - 1).sum(1)
    (gradient,) = torch.autograd.grad(energies.sum(), positions)
    return positions.detach(), energies.detach(), -gradient


def step(
    model: nn.Module, positions: Tensor, energies: Tensor, forces: Tensor, weight: float
) -> None:
    """The gradient of the energies' mean squared error plus the forces'."""
    penalty = ForceError(weight, forces)
    robustkern.backward(model, positions, energies, penalty, loss_fn=F.mse_loss)


def train(
    weight: float,
    positions: Tensor,
    energies: Tensor,
    forces: Tensor,
    steps: int,
    seed: int,
) -> nn.Module:
    """An energy network; weight 0 leaves the forces out."""
    torch.manual_seed(seed)
    model = EnergyNetwork()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in trange(steps, desc=f"weight {weight:g}", leave=False):
        rows = torch.randint(len(positions), (64,))
        optimizer.zero_grad()
        step(model, positions[rows], energies[rows], forces[rows], weight)
        optimizer.step()
        schedule.step()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with forces, and compare with unseen energies and forces."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weight", type=float, default=0.1, help="of the forces' error")
    parser.add_argument("--configurations", type=int, default=200, help="to train on")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    known, unseen = configurations(options.configurations), configurations(1000)
    rows = []
    for name, weight in (("energies", 0.0), ("energies and forces", options.weight)):
        model = train(weight, *known, options.steps, options.seed)
        positions = unseen[0].clone().requires_grad_()
        found = model(positions)
        (gradient,) = torch.autograd.grad(found.sum(), positions)
        errors = (found.detach() - unseen[1], -gradient - unseen[2])
        rows.append([name, *(f"{error.square().mean().sqrt():.4f}" for error in errors)])
    spread = (f"{values.std():.4f}" for values in unseen[1:])
    print(table(["trained on", "energy error", "force error"], [*rows, ["(spread)", *spread]]))


if __name__ == "__main__":
    main()
