"""Trains a network by each method on MNIST, and a twin of each, and evaluates them.

Each method fine-tunes the same clean network; the twins' starts from another seed. Of a penalty's
weights that one is taken whose network is right most often under PGD-20 on training images that
none of them saw. The networks are subjected to the suite `standard`. Run

    python bench/mnist.py --data mnist.npz

It writes bench/results/evaluation-mnist.json and the page beside it. A run that was interrupted
goes on with the same command.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from results import write_results
from torch import Tensor, nn

from robustkern.evaluation import accuracy, pgd
from robustkern.training.checkpoint import load_checkpoint, restore_model
from robustkern.training.data import load
from robustkern.training.evaluation import PAGE, evaluate
from robustkern.training.session import CHECKPOINT, Options, train

EPOCHS = 3
RADIUS = 0.15
RESULTS = Path(__file__).resolve().parent / "results" / "evaluation-mnist.json"
HELD_OUT = 1_000  # training images after those to train on, to choose weights by


class Method(NamedTuple):
    """What is added to the options of fine-tuning."""

    options: Callable[[float], dict[str, Any]]
    weights: tuple[float, ...] = ()


def penalties(*descriptions: Mapping[str, Any]) -> dict[str, Any]:
    """The options of penalties, whose weights are text, as on the command line."""
    return {"penalties": [{**each, "weight": f"{each['weight']:g}"} for each in descriptions]}


METHODS = {
    "clean": Method(lambda _: {}),
    "CURE": Method(
        lambda weight: penalties({"name": "cure", "weight": weight, "h": "2.8", "norm": True}),
        (0.25, 0.5, 1, 2),
    ),
    "GN": Method(lambda weight: penalties({"name": "gn", "weight": weight}), (30, 100, 300, 1000)),
    "SGR": Method(
        lambda weight: penalties({"name": "sgr", "weight": weight, "standardize": "data"}),
        (1000, 3000, 10_000, 30_000),
    ),
    "TV+Lipschitz": Method(
        lambda weight: penalties(
            {"name": "tv", "weight": weight, "p": 1.0},
            {"name": "lipschitz", "weight": 0.01, "p": 1.0},
        ),
        (0.02, 0.04, 0.075, 0.15),
    ),
    "PGD-7 AT": Method(lambda _: {"adversarial": {"name": "pgd", "eps": RADIUS, "steps": 7}}),
}


def main() -> None:
    """Train what is not there yet, evaluate, and keep the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist.npz", help="an .npz file of MNIST")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the networks")
    parser.add_argument("--train-size", type=int, default=12_000, help="images to train on")
    options = parser.parse_args()
    images = len(load(options.data).x_train)
    if images < options.train_size + HELD_OUT:
        parser.error(
            f"--data must hold {HELD_OUT} training images more than --train-size, "
            f"got {images} and {options.train_size}"
        )
    common = {"data": options.data, "train_size": options.train_size, "epochs": EPOCHS}
    starts = [
        finished(options.output / kind / "start", seed=seed, curvature=RADIUS, **common)
        for seed, kind in enumerate(("networks", "twins"))
    ]
    search = {
        name: held_out_accuracies(options.output / "search" / name, method, starts[0], **common)
        for name, method in METHODS.items()
        if method.weights
    }
    networks, twins = (
        [
            finished(
                start.parent.parent / name,
                seed=seed,
                init=str(start),
                curvature=RADIUS,
                **common,
                **method.options(best(search[name]) if name in search else 0.0),
            )
            for name, method in METHODS.items()
        ]
        for seed, start in enumerate(starts, 2)
    )
    folder = options.output / "evaluation"
    report = evaluate(
        networks, twins=twins, suite="standard", radius=RADIUS, data=options.data, output=folder
    )
    for measured in report["networks"].values():
        del measured["images"]  # the page shows them
    searched = {name: {"accuracies": found, "best": best(found)} for name, found in search.items()}
    write_results(RESULTS, [report | {"search": {"images": HELD_OUT, "methods": searched}}])
    shutil.copyfile(folder / PAGE, RESULTS.with_suffix(".html"))


def held_out_accuracies(
    folder: Path, method: Method, start: Path, **common: Any
) -> dict[float, float]:
    """Accuracy under PGD-20 on held-out training images after fine-tuning with each weight."""
    size = common["train_size"]
    data = load(common["data"]).first(size + HELD_OUT)
    images, labels = data.x_train[size:], data.y_train[size:]
    found = {}
    for weight in method.weights:
        more = method.options(weight)
        path = finished(folder / f"{weight:g}", seed=2, init=str(start), **common, **more)
        network = restore_model(load_checkpoint(path))
        found[weight] = accuracy(network, images, labels, attack=attack)
        print(f"right under PGD-20: {100 * found[weight]:.1f}%", flush=True)
    return found


def attack(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """PGD-20 at the radius of the evaluation."""
    return pgd(network, images, labels, RADIUS)


def best(accuracies: Mapping[float, float]) -> float:
    """The weight with the largest accuracy; of several the smallest."""
    return max(sorted(accuracies), key=accuracies.__getitem__)


def finished(folder: Path, **options: Any) -> Path:
    """Train, or go on."""
    print(folder, flush=True)
    return train(Options(output=str(folder), **options), resume=(folder / CHECKPOINT).exists())


if __name__ == "__main__":
    main()
