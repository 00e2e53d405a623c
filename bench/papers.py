"""The papers' tables beside ours: recipes trained, attacked and printed, in pieces.

    python bench/papers.py cure --only cure-resnet18-cifar10 --fast --autoattack 1000 --seconds 560

trains the clean network, fine-tunes it, attacks both and prints the table. Run the same command
again until it says that all is done: a training goes on after its last epoch, and nothing that is
finished is repeated. `--seconds` is when nothing more is begun; one attack on all test images may
go beyond it. With `--reduced` everything is smaller, for a CPU, and PGD has a smaller eps too.

Figures go to bench/results/papers-<machine>.json, from which the table is printed and
bench/readme.py makes docs/papers.md. Exit status: 0 if all is done, 1 if a further call is needed,
2 after an error.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from gpu import slug
from paper_tables import TABLES, shown_table
from recipe_runs import Runs, Setting, with_starts

RESULTS = Path(__file__).resolve().parent / "results"
ERRORS = (ValueError, OSError, ImportError)


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
        strange = [name for name in arguments.only or () if name not in shown.rows]
        if strange:
            raise ValueError(
                f"--only must name recipes of the table: {', '.join(shown.rows)}, "
                f"got {', '.join(strange)}"
            )
        if arguments.autoattack < 0:
            raise ValueError(f"--autoattack must not be negative, got {arguments.autoattack}")
        figures = shown.figures(arguments.reduced, arguments.autoattack)
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
    rows = {recipe: runs.row(recipe) for recipe in recipes}
    print(shown_table(shown, recipes, rows, runs.setting))
    print("all is done" if done else "not done: run this again")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
