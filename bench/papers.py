"""The papers' tables beside ours: recipes trained, attacked and printed, in pieces.

    python bench/papers.py cure --only cure-resnet18-cifar10 --fast --autoattack 1000 --seconds 560

trains the clean network, fine-tunes it, attacks both and prints the table. Run the same command
again until it says that all is done: a training goes on after its last epoch, and nothing that is
finished is repeated. `--seconds` is when nothing more is begun; one attack on all test images may
go beyond it. With `--reduced` everything is smaller, for a CPU.

Figures go to bench/results/papers-<machine>.json, from which the table is printed. Exit status: 0
if all is done, 1 if a further call is needed, 2 after an error.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import slug
from recipe_runs import Runs, Setting, with_starts

from robustkern.training.report import percent, table

RESULTS = Path(__file__).resolve().parent / "results"
ERRORS = (ValueError, OSError, ImportError)


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
    distance: bool = False  # of the nearest adversarial images too

    def figures(self, autoattacked: int) -> list[str]:
        """What is to be measured, AutoAttack on so many images, at the largest eps."""
        names = [f"pgd{self.steps}-{eps}" for eps in self.eps]
        names += ["distance"] if self.distance else []
        return names + ([f"autoattack-{self.eps[-1]}"] if autoattacked else [])


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
            # AutoAttack's figure is from its own authors.
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
            "medium-tv-lipschitz-resnext34-cifar10": Paper(attacked="8.4"),
            "strong-tv-lipschitz-resnext34-cifar10": Paper("94.02", "6.3", distance="0.52"),
        },
        distance=True,
    ),
}  # fmt: skip


def shown_table(shown: Table, recipes: list[str], runs: Runs) -> str:
    """The paper's figures beside ours, these from the results file alone."""
    mark = runs.setting.mark
    attack = f"PGD-{shown.steps}"
    header = ["recipe", "clean, paper", "clean", "attacked, paper"]
    header += [f"{attack} at {eps}/255" for eps in shown.eps]
    header += ["AutoAttack, paper", f"AutoAttack at {shown.eps[-1]}/255"]
    if shown.distance:
        header += ["median L2, paper", "median L2"]
    header += ["training", "passes forward, backward"]

    def cell(row: dict[str, Any], key: str) -> str:
        return percent(row[key]) + mark if key in row else ""

    lines = []
    for recipe in recipes:
        paper, row = shown.rows.get(recipe, Paper()), runs.row(recipe)
        line = [recipe, paper.clean, row["error"] if "error" in row else cell(row, "clean")]
        line += [paper.attacked, *(cell(row, f"pgd{shown.steps}-{eps}") for eps in shown.eps)]
        of_autoattack = cell(row, f"autoattack-{shown.eps[-1]}")
        if of_autoattack:
            of_autoattack += f", {row['autoattack_images']} images"
        line += [paper.autoattack, of_autoattack]
        if shown.distance:
            found = row.get("distance", math.nan)
            text = f"most stand{mark}" if found is None else f"{found:.2f}{mark}"
            line += [paper.distance, "" if "distance" not in row else text]
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
        figures = shown.figures(arguments.autoattack)
        recipes = with_starts(arguments.only or list(shown.rows))
        runs = Runs(
            arguments.output or RESULTS / f"papers-{machine}.json",
            Setting(
                Path(arguments.data or "").name,
                arguments.reduced,
                arguments.fast,
                arguments.note,
            ),
            arguments.runs,
            given,
            arguments.seconds,
        )
        done = all(
            runs.trained(recipe) and runs.measured(recipe, figures, arguments.autoattack)
            for recipe in recipes
        )
    except ERRORS as error:
        print(f"bench/papers.py: error: {error}", file=sys.stderr)
        return 2
    print(shown_table(shown, recipes, runs))
    print("all is done" if done else "not done: run this again")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
