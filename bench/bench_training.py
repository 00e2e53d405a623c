"""What fine-tuning with each method costs and buys on real images.

Every method starts from the same clean network and sees the same batches. Run, for example,

    python bench/bench_training.py mnist --data mnist.npz
    python bench/bench_training.py cifar10 --data cifar10.npz --note "CIFAR-10, JPEG copy"

It prints a table and writes bench/results/training-<set>.json.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier_methods import network
from results import write_results
from torch import nn
from tqdm import tqdm

from robustkern.evaluation import accuracy, pgd
from robustkern.training.data import Dataset, load
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.schedules import Schedule
from robustkern.training.trainer import Trainer


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: a penalty as the command line knows it, or the authors' structure."""

    name: str
    penalty: dict[str, Any]
    precision: str = "float32"
    naive: bool = False
    shift: float | str = "auto"


@dataclass(frozen=True)
class Setting:
    """Of a data set: sizes, a recipe and the methods to compare."""

    train: int
    test: int
    clean_epochs: int
    epochs: int
    lr: float
    batch_size: int
    augment: bool
    eps: tuple[float, ...]
    steps: int
    seeds: int
    methods: tuple[Method, ...]


def cure(weight: float, h: float, name: str = "cure", **options: Any) -> dict[str, Any]:
    return {"name": name, "weight": str(weight), "h": str(h), **options}


# In the authors' code the penalty is the norm; "norm" gives ours the same formula and weight.
_NORM = cure(0.5, 2.8, norm=True)
_SQUARE = cure(0.1, 0.5)
SETTINGS = {
    "mnist": Setting(
        train=12_000, test=2_000, clean_epochs=3, epochs=3, lr=1e-3, batch_size=64,
        augment=False, eps=(0.1, 0.15), steps=20, seeds=2,
        methods=(
            Method("no penalty", {"name": "none"}),
            Method("CURE, authors' structure", _NORM, naive=True),
            Method("CURE", _NORM),
            Method("CURE, bfloat16", _NORM, "bfloat16"),
            Method("CURE anchored", {**_NORM, "name": "anchored-cure"}),
            Method("GN", {"name": "gn", "weight": "1"}),
        ),
    ),
    "cifar10": Setting(
        train=6_000, test=1_000, clean_epochs=8, epochs=4, lr=1e-3, batch_size=64,
        augment=True, eps=(1 / 255, 2 / 255, 4 / 255), steps=10, seeds=1,
        methods=(
            Method("no penalty", {"name": "none"}),
            Method("CURE, authors' structure", {**_SQUARE, "norm": True}, naive=True),
            Method("CURE", _SQUARE),
            Method("CURE, bfloat16", _SQUARE, "bfloat16"),
            Method("CURE, shift 3e-3", _SQUARE, shift=3e-3),
            Method("CURE anchored", {**_SQUARE, "name": "anchored-cure"}),
            Method("GN", {"name": "gn", "weight": "0.1"}),
        ),
    ),
}  # fmt: skip


def trainer(
    method: Method, model: nn.Module, data: Dataset, setting: Setting, seed: int
) -> Trainer:
    options: dict[str, Any] = {
        "lr": Schedule.parse("lr", str(setting.lr)),
        "batch_size": setting.batch_size,
        "crop": 4 if setting.augment else 0,
        "flip": setting.augment,
        "precision": method.precision,
        "shift": method.shift,
        "seed": seed,
    }
    make = NaiveCURETrainer if method.naive else Trainer
    return make(model, data, ScheduledPenalty([method.penalty], data.shape), **options)


def attacked(model: nn.Module, data: Dataset, eps: float, steps: int) -> float:
    return accuracy(
        model, data.x_test, data.y_test, attack=lambda m, x, y: pgd(m, x, y, eps, steps=steps)
    )


def main() -> None:
    """Train, attack, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("set", choices=SETTINGS)
    parser.add_argument("--data", required=True, help=".npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--note", default="", help="what to say of the data beside the figures")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.set]
    data = load(arguments.data).first(setting.train, setting.test)
    rows: list[dict[str, Any]] = []
    epochs = setting.seeds * (setting.clean_epochs + setting.epochs * len(setting.methods))
    with tqdm(total=epochs, unit="epoch") as bar:
        for seed in range(setting.seeds):
            torch.manual_seed(seed)
            clean = trainer(setting.methods[0], network(data), data, setting, seed)
            for _ in range(setting.clean_epochs):
                clean.run_epoch()
                bar.update()
            for method in setting.methods:
                run = trainer(method, copy.deepcopy(clean.model), data, setting, seed + 1)
                seconds = 0.0
                for _ in range(setting.epochs):
                    record = run.run_epoch()
                    bar.update()
                    seconds += record.seconds
                rows.append(
                    {
                        "set": arguments.set,
                        "note": arguments.note,
                        "seed": seed,
                        "method": method.name,
                        "penalty": method.penalty,
                        "precision": method.precision,
                        "shift": method.shift,
                        "seconds": seconds,
                        "clean": record.clean_accuracy,
                        "eps": setting.eps,
                        "pgd_steps": setting.steps,
                        "pgd": [attacked(run.model, data, e, setting.steps) for e in setting.eps],
                    }
                )
                tqdm.write(f"{method.name}: {seconds:.0f} s, clean {record.clean_accuracy:.3f}")
    print(f"{'method':<28}{'seconds':>9}{'clean':>8}" + "".join(f"{e:>9.4f}" for e in setting.eps))
    for method in setting.methods:
        of_method = [row for row in rows if row["method"] == method.name]
        mean = [
            statistics.mean(values) for values in zip(*(r["pgd"] for r in of_method), strict=True)
        ]
        print(
            f"{method.name:<28}{statistics.mean(r['seconds'] for r in of_method):>9.1f}"
            f"{statistics.mean(r['clean'] for r in of_method):>8.3f}"
            + "".join(f"{value:>9.3f}" for value in mean)
        )
    default = Path(__file__).parent / "results" / f"training-{arguments.set}.json"
    write_results(arguments.output or default, rows)


if __name__ == "__main__":
    main()
