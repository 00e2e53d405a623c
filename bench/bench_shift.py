"""How far to shift: agreement of the first-order gradient with double backward, over shifts.

Smooth networks of several sizes, trained for a moment so that their gradients have structure. The
truth is double backward in float64 at the same parameters and inputs. For each compute dtype and
shift (in standard deviations of the inputs) the cosine to the truth of the penalty's parameter
gradient is measured; the default shifts of `robustkern.backward` rest on the result.

Run `python bench/bench_shift.py`; it takes a few minutes and writes bench/results/shift.json.
"""

import argparse
import contextlib
import copy
import statistics
from pathlib import Path

import torch
from results import write_results
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import robustkern

SHIFTS = [10 ** (exponent / 2) for exponent in range(-10, 1)]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
PENALTIES = {
    "GN": robustkern.GradientPenalty(1.0, p=2, power=2),
    "TV": robustkern.GradientPenalty(1.0),
    "CURE": robustkern.CURE(weight=1.0, h=0.5),
}


def convolutional(channels: int, width: int, depth: int, activation: nn.Module) -> nn.Module:
    """Convolutions with batch norm, a global mean, a linear layer."""
    layers: list[nn.Module] = []
    for index in range(depth):
        outer = width * 2 ** (index // 2)
        stride = 2 if index % 2 else 1
        layers += [nn.Conv2d(channels, outer, 3, stride, 1), nn.BatchNorm2d(outer), activation]
        channels = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def networks() -> dict[str, tuple[nn.Module, tuple[int, int, int]]]:
    """Smooth networks, and the shape of their inputs."""
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    return {
        "perceptron 1x8x8": (perceptron, (1, 8, 8)),
        "4 layers 1x28x28": (convolutional(1, 16, 4, nn.GELU()), (1, 28, 28)),
        "8 layers 3x32x32": (convolutional(3, 16, 8, nn.GELU()), (3, 32, 32)),
        "8 layers 3x64x64": (convolutional(3, 16, 8, nn.Softplus(beta=4)), (3, 64, 64)),
    }


def images(samples: int, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images in [0, 1], ten classes of them, with noise."""
    targets = torch.arange(samples) % 10
    prototypes = F.interpolate(torch.rand(10, shape[0], 4, 4), shape[1:], mode="bilinear")
    noise = F.interpolate(torch.rand(samples, shape[0], 8, 8), shape[1:], mode="bilinear")
    return 0.5 * prototypes[targets] + 0.5 * noise, targets


def train(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """A few steps, so that the network is no longer random."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for start in range(0, len(inputs), 64):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[start : start + 64]), targets[start : start + 64]).backward()
        optimizer.step()


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    """One float64 vector."""
    return torch.cat([g.double().flatten() for g in gradients])


def first_order(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    penalty: robustkern.Penalty,
    dtype: torch.dtype,
    shift: float,
) -> torch.Tensor:
    """The penalty's parameter gradient, as the difference of two steps; bfloat16 by autocast."""
    autocast = dtype == torch.bfloat16
    model = copy.deepcopy(model).to(torch.float32 if autocast else dtype)
    inputs = inputs.to(torch.float32 if autocast else dtype)
    vectors = []
    with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
        for weighted in (penalty, robustkern.Lazy(penalty, every=2)):  # with it, and without
            model.zero_grad()
            robustkern.backward(model, inputs, targets, weighted, shift=shift)
            vectors.append(flat([p.grad for p in model.parameters()]))
    return vectors[0] - vectors[1]


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "shift.json"
    )
    output = parser.parse_args().output
    torch.manual_seed(0)
    rows = []
    cases = [(name, label, penalty) for name in networks() for label, penalty in PENALTIES.items()]
    built = networks()
    for model, shape in built.values():
        train(model, *images(64 * 30, shape))
    for name, label, penalty in tqdm(cases):
        model, shape = built[name]
        inputs, targets = images(16, shape)
        deviation = inputs.std(correction=0).item()
        exact = copy.deepcopy(model).double()
        value = penalty(exact, inputs.double(), targets)
        truth = flat(list(torch.autograd.grad(value, list(exact.parameters()), allow_unused=False)))
        for dtype_name, dtype in DTYPES.items():
            for shift in SHIFTS:
                found = first_order(model, inputs, targets, penalty, dtype, shift * deviation)
                cosine = F.cosine_similarity(found, truth, dim=0).item()
                length = (found.norm() / truth.norm()).item()
                rows.append(
                    {
                        "network": name,
                        "penalty": label,
                        "dtype": dtype_name,
                        "shift": shift,
                        "cosine": cosine,
                        "length": length,
                    }
                )
    print(f"{'shift / std':>12}" + "".join(f"{d + ' worst':>18}{'median':>8}" for d in DTYPES))
    for shift in SHIFTS:
        line = f"{shift:12.1e}"
        for dtype_name in DTYPES:
            found = [r["cosine"] for r in rows if (r["dtype"], r["shift"]) == (dtype_name, shift)]
            line += f"{min(found):18.5f}{statistics.median(found):8.4f}"
        print(line)
    write_results(output, rows)


if __name__ == "__main__":
    main()
