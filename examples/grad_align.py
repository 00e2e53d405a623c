"""GradAlign against the catastrophic overfitting of FGSM-RS.

Training on one-step attacks from a random start (FGSM-RS, Wong, Rice and Kolter 2020) can end in a
network that withstands one step and nothing else. GradAlign (Andriushchenko and Flammarion 2020)
keeps the input gradient in line across the ball that the attack searches, so that one step says
what many would. Here: scikit-learn's digits, enlarged to 16x16 and made black and white. With seed
0 training on one step alone collapses under many, and with GradAlign much less so; other seeds
collapse less, and there is less to save.

    python examples/grad_align.py
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import robustkern
from robustkern.evaluation import accuracy, pgd
from robustkern.training.data import load
from robustkern.training.report import percent, table

# In pixels. Larger than what suits a smooth network: this one has kinks, and the fewer of them a
# difference takes in, the noisier it is.
SHIFT = 0.01


class GradAlign(robustkern.Penalty):
    """weight mean_i (1 - cos(g(x_i), g(x_i + u_i))), u uniform in [-eps, eps].

    Made anew for each batch of clean inputs x, for the step itself is taken at attacked ones.
    """

    def __init__(self, weight: float, clean: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.clean, self.eps = weight, clean, eps

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The log-odds of the other classes against the target's."""
        # Cross-entropy grows with them, so its gradient points the same way; but it vanishes where
        # the network is sure, and so would what a direction can be told from.
        target = targets[:, None]
        return outputs.scatter(1, target, -torch.inf).logsumexp(1) - outputs.gather(1, target)[:, 0]

    def points(self, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """The clean inputs, and a random point in the ball around each."""
        return [self.clean, self.clean + self.eps * (2 * torch.rand_like(self.clean) - 1)]

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        cosines = F.cosine_similarity(*(g.flatten(1) for g in shifted))
        return self.weight * (1 - cosines).mean()


def network(width: int = 16) -> nn.Sequential:
    """Two convolutions and two linear layers, for 1x16x16 inputs and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, 10),
    )


def step(
    model: nn.Module,
    inputs: Tensor,
    adversarial: Tensor,
    targets: Tensor,
    weight: float,
    eps: float,
    shift: float | str = "auto",
) -> None:
    """The gradient of the loss on the attacked inputs plus the penalty at the clean ones."""
    if weight:
        penalty = GradAlign(weight, inputs, eps)
        robustkern.backward(model, adversarial, targets, penalty, shift=shift)
    else:
        F.cross_entropy(model(adversarial), targets).backward()


def one_step(
    model: nn.Module, inputs: Tensor, targets: Tensor, eps: float, generator: torch.Generator
) -> Tensor:
    """The attack of FGSM-RS."""
    return pgd(model, inputs, targets, eps, steps=1, step_size=1.25 * eps, generator=generator)


def images(pixels: Tensor) -> Tensor:
    """Black and white, and twice as large."""
    return (F.interpolate(pixels, scale_factor=2, mode="bicubic") > 0.5).float()


def train(
    inputs: Tensor, targets: Tensor, weight: float, eps: float, epochs: int, seed: int
) -> nn.Module:
    """A network trained by FGSM-RS, eps growing over the first third of the epochs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    steps = len(inputs) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for epoch in trange(epochs, desc=f"weight {weight:g}", leave=False):
        ball = eps * min(1, 3 * (epoch + 1) / epochs)
        for rows in torch.randperm(len(inputs))[: 64 * steps].split(64):
            x, y = inputs[rows], targets[rows]
            adversarial = one_step(model, x, y, ball, generator)
            optimizer.zero_grad()
            step(model, x, adversarial, y, weight, ball, SHIFT)
            optimizer.step()
            schedule.step()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with GradAlign, and attack both in one step and in many."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--eps", type=float, default=0.4, help="largest change of a pixel")
    parser.add_argument("--weight", type=float, default=0.5, help="of GradAlign")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data = load("digits")
    inputs, attacked = images(data.x_train), images(data.x_test)
    rows = []
    for name, weight in (("FGSM-RS", 0.0), ("FGSM-RS + GradAlign", options.weight)):
        model = train(inputs, data.y_train, weight, options.eps, options.epochs, options.seed)
        batches = (
            attacked,
            one_step(model, attacked, data.y_test, options.eps, torch.Generator().manual_seed(0)),
            pgd(model, attacked, data.y_test, options.eps, steps=20),
        )
        rows.append([name, *(percent(accuracy(model, x, data.y_test)) for x in batches)])
    print(table([f"accuracy, eps {options.eps:g}", "clean", "one step", "PGD-20"], rows))


if __name__ == "__main__":
    main()
