"""R1 and WGAN-GP, the gradient penalties that keep a GAN's critic in check.

R1 (Mescheder, Geiger and Nowozin 2018) is the squared length of the critic's gradient at real
samples. WGAN-GP (Gulrajani et al. 2017) draws that length to 1 between real and generated samples.
Here: eight Gaussians on a circle. On data this easy a GAN without a penalty does as well; what
there is to see is how the critic's step is written.

    python examples/gan.py
"""

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import robustkern
from robustkern.training.report import percent, table

MODES = 8
WIDTH = 0.1  # of each mode, on a circle of radius 1


class R1(robustkern.GradientPenalty):
    """gamma/2 mean_i ||grad critic(x_i)||^2."""

    def __init__(self, gamma: float) -> None:
        super().__init__(gamma / 2, p=2, power=2)

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The critic's output."""
        return outputs


class WGANGP(robustkern.Penalty):
    """weight mean_i (||grad critic(x_i)|| - 1)^2."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The critic's output."""
        return outputs

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        lengths = robustkern.functional.gradient_norm(gradient, 2)
        return self.weight * (lengths - 1).square().mean()


def r1_step(critic: nn.Module, real: Tensor, fake: Tensor, penalty: R1) -> None:
    """The critic's gradient: logistic loss on both batches, R1 on the real one."""
    logistic = F.binary_cross_entropy_with_logits
    robustkern.backward(critic, real, real.new_ones(len(real)), penalty, loss_fn=logistic)
    logistic(critic(fake), fake.new_zeros(len(fake))).backward()


def wgan_gp_step(critic: nn.Module, real: Tensor, fake: Tensor, penalty: WGANGP) -> None:
    """The critic's gradient: the difference of its means, and the penalty in between."""
    part = torch.rand_like(real[:, :1])
    between = part * real + (1 - part) * fake
    loss = critic(fake).mean() - critic(real).mean()
    # The critic has no targets: anything as long as the batch will do.
    (loss + penalty(critic, between, between, method="first_order")).backward()


def mlp(inner: int, *outer: nn.Module, width: int = 128) -> nn.Sequential:
    """Two hidden layers and what comes after them."""
    return nn.Sequential(
        nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), *outer
    )


def critic_network(size: int = 2, width: int = 128) -> nn.Sequential:
    """(N, size) to (N,)."""
    return mlp(size, nn.Linear(width, 1), nn.Flatten(0), width=width)


def centres() -> Tensor:
    """Those of the modes, (8, 2)."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def samples(number: int) -> Tensor:
    """Real ones, (number, 2)."""
    return centres()[torch.randint(MODES, (number,))] + WIDTH * torch.randn(number, 2)


def train(name: str, penalty: R1 | WGANGP, steps: int, seed: int) -> nn.Module:
    """A generator trained against a critic under the penalty."""
    torch.manual_seed(seed)
    generator, critic = mlp(8, nn.Linear(128, 2)), critic_network()
    critic_step = r1_step if isinstance(penalty, R1) else wgan_gp_step
    adam = [
        torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.0, 0.9)) for m in (generator, critic)
    ]
    for _ in trange(steps, desc=name, leave=False):
        fake = generator(torch.randn(128, 8))
        adam[1].zero_grad()
        critic_step(critic, samples(128), fake.detach(), penalty)
        adam[1].step()
        judged = critic(fake)
        adam[0].zero_grad()
        (F.softplus(-judged) if isinstance(penalty, R1) else -judged).mean().backward()
        adam[0].step()
    return generator


def main(arguments: Sequence[str] | None = None) -> None:
    """Train three GANs and count the modes that each generator reaches."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gamma", type=float, default=0.1, help="weight of R1, twice")
    parser.add_argument("--weight", type=float, default=0.1, help="of WGAN-GP")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rows = []
    for name, penalty in (
        ("no penalty", R1(0.0)),
        ("R1", R1(options.gamma)),
        ("WGAN-GP", WGANGP(options.weight)),
    ):
        generator = train(name, penalty, options.steps, options.seed)
        with torch.no_grad():
            distances = torch.cdist(generator(torch.randn(4000, 8)), centres())
        nearest, mode = distances.min(dim=1)
        close = nearest < 3 * WIDTH
        found = (mode[close].bincount(minlength=MODES) >= 4000 / MODES / 10).sum()
        rows.append([name, f"{found} of {MODES}", percent(close.float().mean().item())])
    print(table(["GAN", "modes found", "samples in a mode"], rows))


if __name__ == "__main__":
    main()
