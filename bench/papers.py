"""The papers' tables beside ours: recipes trained, attacked and printed, in pieces.

    python bench/papers.py cure --only cure-resnet18-cifar10 --fast --autoattack 1000 --seconds 560

trains the clean network, fine-tunes it, attacks both and prints the table. Run the same command
again until it says that all is done: a training goes on after its last epoch, and nothing that is
finished is repeated. `--seconds` is when nothing more is begun; one attack on all test images may
go beyond it. With `--reduced` everything is smaller: a few minutes on a CPU.

Figures go to bench/results/papers-<machine>.json, from which the table is printed. Exit status: 0
if all is done, 1 if a further call is needed, 2 after an error.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import slug
from results import PROVENANCE, write_results
from torch import Tensor, nn

from robustkern.evaluation import (
    accuracy,
    adversarial_distances,
    adversarial_inputs,
    autoattack,
    carlini_wagner,
    pgd,
)
from robustkern.training.checkpoint import load_checkpoint, restore_model
from robustkern.training.data import Dataset, load
from robustkern.training.recipes import find_recipe, from_recipe
from robustkern.training.report import percent, table
from robustkern.training.session import Options, find_device, train

RESULTS = Path(__file__).resolve().parent / "results"
ERRORS = (ValueError, OSError, ImportError)
FAST = {"precision": "bfloat16", "channels_last": True, "compile": True}
REDUCED_IMAGES = {"train_size": 2000, "test_size": 300}
REDUCED_EPOCHS = 5  # times fewer


@dataclass(frozen=True)
class Paper:
    """What a paper reports of a network, as it stands there in per cent; "" where it does not."""

    clean: str = ""
    attacked: str = ""
    autoattack: str = ""
    distance: str = ""


@dataclass(frozen=True)
class Table:
    """A paper's table: the attack, and the paper's figures by recipe."""

    title: str
    steps: int
    eps: tuple[int, ...]  # in 255ths
    rows: dict[str, Paper]
    distances: int = 0  # test images whose distance to the nearest adversarial one is measured


TABLES = {
    "cure": Table(
        "CURE, Moosavi-Dezfooli et al. 2019, table 2: CIFAR-10", 20, (8,),
        {
            "clean-resnet18-cifar10": Paper("94.9", "0"),
            "cure-resnet18-cifar10": Paper("81.2", "36.3"),
            "anchored-cure-resnet18-cifar10": Paper(),
            "cure-norm-resnet18-cifar10": Paper(),
            "pgd-resnet18-cifar10": Paper("79.4", "43.7"),
            "fgsm-rs-resnet18-cifar10": Paper(),
            "clean-wideresnet28x10-cifar10": Paper("94.6", "0"),
            # AutoAttack: by its authors, on the network of the paper's.
            "cure-wideresnet28x10-cifar10": Paper("83.1", "41.4", autoattack="38.5"),
            "pgd-wideresnet28x10-cifar10": Paper("87.3", "45.8"),
        },
    ),
    "cure-svhn": Table(
        "CURE, Moosavi-Dezfooli et al. 2019, table 3: SVHN", 10, (12,),
        {
            "clean-resnet18-svhn": Paper("96.3", "0.9"),
            "cure-resnet18-svhn": Paper("91.1", "28.4"),
            "pgd-resnet18-svhn": Paper("93", "33"),
        },
    ),
    # The two figures under attack are of two strengths, the stronger one last.
    "sgr": Table(
        "SGR, Roth et al. 2018: CIFAR-10, white box at two strengths of the paper's", 20, (4, 8),
        {
            "clean-carlini-cifar10": Paper(),
            "sgr-sign-carlini-cifar10": Paper("84.2", "33.7 / 10.0"),
            "sgr-pgd-carlini-cifar10": Paper(),
        },
    ),
    # The paper's are by I-FGSM.
    "tv": Table(
        "TV and Lipschitz, Finlay et al. 2018: CIFAR-10", 20, (8,),
        {
            "clean-resnext34-cifar10": Paper("95.93", distance="0.09"),
            "tv-resnext34-cifar10": Paper("96.42", distance="0.30"),
            "tv-lipschitz-resnext34-cifar10": Paper("95.87", "1.9", distance="0.31"),
            "strong-tv-lipschitz-resnext34-cifar10": Paper("94.02", "6.3", distance="0.52"),
        },
        distances=100,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What, with the recipe, tells one row of the results from another."""

    reduced: bool
    fast: bool
    note: str

    @property
    def mark(self) -> str:
        """What stands beside every figure."""
        marks = [text for text in ("reduced" if self.reduced else "", self.note) if text]
        return f" ({', '.join(marks)})" if marks else ""


class Bench:
    """The rows of a results file, and the time that is left to add to them.

    Args:
        path: of the results file.
        setting: of the rows to make.
        runs: folder for the trained networks.
        given: options that hold in place of the recipes'.
        seconds: after which nothing more is begun.
    """

    def __init__(
        self, path: Path, setting: Setting, runs: Path, given: dict[str, Any], seconds: float
    ) -> None:
        self.path, self.setting, self.given = path, setting, given
        self.runs = runs / ("reduced" if setting.reduced else "fast" if setting.fast else "full")
        self.end = time.monotonic() + seconds
        self.rows = read_rows(path)

    def left(self) -> float:
        return self.end - time.monotonic()

    def row(self, recipe: str) -> dict[str, Any]:
        """The row of a recipe in this setting; empty before its training is done."""
        key = {"recipe": recipe, **dataclasses.asdict(self.setting)}
        return next((row for row in self.rows if key.items() <= row.items()), {})

    def save(self, recipe: str, **figures: Any) -> None:
        """Add figures to the row of a recipe and write the file."""
        row = self.row(recipe)
        if not row:
            self.rows.append(row := {"recipe": recipe, **dataclasses.asdict(self.setting)})
        row |= figures | {"commit": PROVENANCE["commit"]}
        write_results(self.path, self.rows)

    def options(self, recipe: str) -> Options:
        """Of the training by a recipe."""
        given = {**self.given, "output": str(self.runs / recipe)}
        start = find_recipe(recipe).start
        if start is not None:
            given["init"] = str(self.checkpoint(start))
        if self.setting.fast:
            given |= FAST
        options = from_recipe(recipe, given)
        return reduced(options) if self.setting.reduced else options

    def checkpoint(self, recipe: str) -> Path:
        return self.runs / recipe / "checkpoint.pt"

    def trained(self, recipe: str) -> bool:
        """Train by a recipe as far as the time reaches; is it done?"""
        if self.row(recipe):
            return True
        options, path = self.options(recipe), self.checkpoint(recipe)
        try:
            train(options, resume=path.exists(), seconds=self.left())
        except FloatingPointError as error:
            self.save(recipe, options=dataclasses.asdict(options), error=str(error))
            return True
        log = load_checkpoint(path)["log"]
        if len(log) < options.epochs:
            return False
        self.save(
            recipe,
            options=dataclasses.asdict(options),
            seconds=sum(epoch["seconds"] for epoch in log),
            forward_passes=sum(epoch["forward_passes"] for epoch in log),
            backward_passes=sum(epoch["backward_passes"] for epoch in log),
            test_images=len(self.data(options).x_test),
            clean=log[-1]["clean_accuracy"],
        )
        return True

    def data(self, options: Options) -> Dataset:
        return load(options.data, options.data_folder).first(options.train_size, options.test_size)

    def measured(self, recipe: str, shown: Table, autoattacked: int) -> bool:
        """Attack a trained network as far as the time reaches; is it done?"""
        row = self.row(recipe)
        missing = [f"pgd{shown.steps}-{eps}" for eps in shown.eps]
        missing += ["distance"] if shown.distances else []
        missing += [f"autoattack-{shown.eps[-1]}"] if autoattacked else []
        missing = [name for name in missing if name not in row and "error" not in row]
        if not missing:
            return True
        options = self.options(recipe)
        data = self.data(options)
        model = restore_model(load_checkpoint(self.checkpoint(recipe)))
        model.to(find_device(options.device))
        for name in missing:
            if self.left() <= 0:
                return False
            kind, _, eps = name.partition("-")
            if kind == "distance":
                self.save(recipe, distance=distance(model, data, shown.distances))
            elif kind == "autoattack":
                images = min(autoattacked, len(data.x_test))
                found = attacked(model, data.first(test=images), autoattack, int(eps))
                self.save(recipe, **{name: found, "autoattack_images": images})
            else:
                found = attacked(model, data, pgd, int(eps), steps=shown.steps)
                self.save(recipe, **{name: found})
        return True


def attacked(model: nn.Module, data: Dataset, attack: Any, eps: int, **more: Any) -> float:
    """Accuracy under an attack of eps 255ths."""

    def move(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return attack(model, inputs, targets, eps / 255, **more)

    return accuracy(model, data.x_test, data.y_test, attack=move)


def distance(model: nn.Module, data: Dataset, images: int) -> float | None:
    """Median L2 distance by Carlini and Wagner's attack; None if half the images stand."""

    def move(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return carlini_wagner(model, inputs, targets, steps=200, searches=5)

    x, y = data.x_test[:images], data.y_test[:images]
    found = adversarial_distances(model, x, y, adversarial_inputs(model, x, y, move)).median
    return found if found is not None and math.isfinite(found) else None


def reduced(options: Options) -> Options:
    """The same with fewer images and epochs, and a narrow network."""
    epochs = max(1, options.epochs // REDUCED_EPOCHS)
    factor = epochs / options.epochs
    scheduled = ("weight", "h")
    return dataclasses.replace(
        options,
        **REDUCED_IMAGES,
        model=f"narrow:{options.model}",
        epochs=epochs,
        lr=compressed(options.lr, factor),
        penalties=[
            {key: compressed(p[key], factor) if key in scheduled else p[key] for key in p}
            for p in options.penalties
        ],
        device="cpu",
    )


def compressed(schedule: str, factor: float) -> str:
    """A schedule with its epochs multiplied.

    >>> compressed("0:0,5:1.5", 0.2), compressed("4", 0.2)
    ('0:0,1:1.5', '4')
    """
    if ":" not in schedule:
        return schedule
    points = (point.split(":") for point in schedule.split(","))
    return ",".join(f"{float(epoch) * factor:g}:{value}" for epoch, value in points)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, if there is one; those of another version are refused."""
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
        made_by, rows = results["provenance"].get("robustkern", "an older one"), results["rows"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results file {path} must be one that this wrote, got {error!r}"
        ) from error
    if made_by != PROVENANCE["robustkern"]:
        raise ValueError(
            f"results file {path} must be of this version of robustkern, "
            f"{PROVENANCE['robustkern']}, got {made_by}; move it away, or name another by --output"
        )
    return rows


def with_starts(recipes: list[str]) -> list[str]:
    """The recipes, each behind the one that it starts from."""
    found: list[str] = []
    for recipe in recipes:
        start = find_recipe(recipe).start
        found += [name for name in (start, recipe) if name and name not in found]
    return found


def shown_table(shown: Table, recipes: list[str], bench: Bench) -> str:
    """The paper's figures beside ours, these from the results file alone."""
    mark = bench.setting.mark
    attack = f"PGD-{shown.steps}"
    header = ["recipe", "clean, paper", "clean", "attacked, paper"]
    header += [f"{attack} at {eps}/255" for eps in shown.eps]
    header += ["AutoAttack, paper", f"AutoAttack at {shown.eps[-1]}/255"]
    if shown.distances:
        header += ["median L2, paper", "median L2"]
    header += ["training", "passes forward, backward"]

    def cell(row: dict[str, Any], key: str) -> str:
        return percent(row[key]) + mark if key in row else ""

    lines = []
    for recipe in recipes:
        paper, row = shown.rows.get(recipe, Paper()), bench.row(recipe)
        line = [recipe, paper.clean, row["error"] if "error" in row else cell(row, "clean")]
        line += [paper.attacked, *(cell(row, f"pgd{shown.steps}-{eps}") for eps in shown.eps)]
        of_autoattack = cell(row, f"autoattack-{shown.eps[-1]}")
        if of_autoattack:
            of_autoattack += f", {row['autoattack_images']} images"
        line += [paper.autoattack, of_autoattack]
        if shown.distances:
            found = row.get("distance")
            line += [paper.distance, "" if found is None else f"{found:.2f}{mark}"]
        if "seconds" in row:
            passes = f"{row['forward_passes']:.0f}, {row['backward_passes']:.0f}"
            line += [f"{row['seconds']:.0f} s{mark}", passes + mark]
        lines.append([*line, *[""] * (len(header) - len(line))])
    return f"{shown.title}\n\n{table(header, lines)}"


def main() -> int:
    """Train, attack, write the results, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="and what they start from")
    parser.add_argument("--data", help="in place of the recipe's, as `robustkern train` takes it")
    parser.add_argument("--data-folder", default="data", help="where torchvision keeps its files")
    parser.add_argument("--note", default="", help="of the data; shown beside every figure")
    parser.add_argument("--reduced", action="store_true", help="small, on the CPU")
    parser.add_argument("--fast", action="store_true", help="bfloat16, channels_last, compiled")
    parser.add_argument("--autoattack", type=int, default=0, metavar="N", help="on N test images")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after them")
    parser.add_argument("--runs", type=Path, default="robustkern-papers", help="trained networks")
    parser.add_argument("--output", type=Path, help="results file")
    arguments = parser.parse_args()
    shown = TABLES[arguments.table]
    machine = slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
    given = {"data_folder": arguments.data_folder}
    if arguments.data:
        given["data"] = arguments.data
    try:
        recipes = with_starts(arguments.only or list(shown.rows))
        bench = Bench(
            arguments.output or RESULTS / f"papers-{machine}.json",
            Setting(arguments.reduced, arguments.fast, arguments.note),
            arguments.runs,
            given,
            arguments.seconds,
        )
        done = all(
            bench.left() > 0
            and bench.trained(recipe)
            and bench.measured(recipe, shown, arguments.autoattack)
            for recipe in recipes
        )
    except ERRORS as error:
        print(f"bench/papers.py: error: {error}", file=sys.stderr)
        return 2
    print(shown_table(shown, recipes, bench))
    print("all is done" if done else "not done: run this again")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
