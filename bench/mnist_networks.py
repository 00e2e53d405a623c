"""Trains the networks whose evaluation and analysis on MNIST are kept in bench/results.

Each method fine-tunes the same clean network; its twin starts from another seed. Run

    python bench/mnist_networks.py --data mnist.npz --output runs

A run that was interrupted goes on with the same command. Weights were chosen beforehand, on fewer
images and epochs, so that clean accuracy stays within a point of the clean network's.
"""

import argparse
from pathlib import Path
from typing import Any

from robustkern.training.session import Options, train

EPOCHS = 3
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
    "PGD-7 AT": {"adversarial": {"name": "pgd", "eps": 0.15, "steps": 7}},
}


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist.npz", help="an .npz file of MNIST")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the networks")
    parser.add_argument("--train-size", type=int, default=12_000, help="images to train on")
    options = parser.parse_args()
    for seed, kind in enumerate(("networks", "twins")):
        folder = options.output / kind
        start = folder / "start"
        common = {"data": options.data, "train_size": options.train_size, "epochs": EPOCHS}
        finished(start, seed=seed, **common)
        for name, more in METHODS.items():
            init = str(start / "checkpoint.pt")
            finished(folder / name, seed=seed + 2, init=init, **common, **more)


def finished(folder: Path, **options: Any) -> None:
    """Train from wherever the last attempt ended."""
    print(folder, flush=True)
    train(Options(output=str(folder), **options), resume=(folder / "checkpoint.pt").exists())


if __name__ == "__main__":
    main()
