"""The demonstration: one network, fine-tuned by each method, and what each cost and bought."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustkern.evaluation import RobustAccuracy, robust_accuracy
from robustkern.training.data import Dataset, load
from robustkern.training.extras import require
from robustkern.training.files import atomic_path, output_folder, write_json
from robustkern.training.models import Normalize, ResNet, pixel_statistics
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.report import percent, progress_bar, table, versions
from robustkern.training.schedules import Schedule
from robustkern.training.session import usual_eps
from robustkern.training.trainer import Advance, Trainer

# In the order of the table; the plot gives each a colour of Okabe and Ito's palette and a marker.
_BEFORE = "before fine-tuning"
_PLAIN, _NAIVE = "no penalty", "CURE, naive"
_METHODS = (_PLAIN, _NAIVE, "CURE", "anchored CURE", "GN", "SGR")
_COLOURS = ("#000000", "#999999", "#D55E00", "#0072B2", "#56B4E9", "#E69F00", "#009E73")
_MARKERS = ("x", "+", "v", "o", "s", "^", "D")


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration; the defaults are for `digits`."""

    train_images: int = 2000
    test_images: int = 450
    width: int = 32
    blocks: tuple[int, ...] = (1, 1)
    crop: int = 1
    clean_epochs: int = 10
    epochs: int = 10
    lr: float = 0.001
    shift: float | str = 0.005
    pgd_steps: int = 20
    timing_rounds: int = 15
    cure_weight: float = 0.5
    gn_weight: float = 1.0
    sgr_weight: float = 2.0


@dataclass(frozen=True)
class Result:
    """A row of the table: median cost of a step, in plain and in naive steps, and accuracies."""

    method: str
    plain_steps: float | None
    naive_steps: float | None
    accuracy: RobustAccuracy


def demo(
    *,
    data: str = "digits",
    data_folder: str | Path = "data",
    output: str | Path = "robustkern-demo",
    seed: int = 0,
    settings: Settings = Settings(),
) -> list[Result]:
    """Train a clean network, fine-tune it by each method, print the table, save plot and results.

    All methods start from the same network and see the same batches. The three CUREs have one
    formula, the norm of the authors' code, one weight and one h, with which each pixel moves by the
    smaller of the two eps of the table. The learning rate falls to zero over the epochs.

    Args:
        data: as for `load`. Of larger sets the first images are used.
        data_folder: where torchvision keeps its files.
        output: folder for `demo.png` and `demo.json`.
        seed: of the network and the batches; the global random state is seeded with it.
        settings: sizes.

    Returns:
        The rows of the table.

    Raises:
        ImportError: matplotlib, tqdm or scikit-learn is missing.
        OSError: the output folder cannot be written to.
        ValueError: the data cannot be loaded.
    """
    start = time.perf_counter()
    folder = output_folder(output, "demo")
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 4.5), layout="constrained")
    images = load(data, data_folder).first(settings.train_images, settings.test_images)
    eps = usual_eps(images)
    epochs = settings.clean_epochs + settings.epochs * len(_METHODS)
    tests = len(images.x_test) * (1 + 2 * len(eps)) * (1 + len(_METHODS))
    with progress_bar(epochs * len(images.x_train) + tests, "clean network") as bar:

        def attacked(model: nn.Module) -> RobustAccuracy:
            return robust_accuracy(
                model,
                images.x_test,
                images.y_test,
                eps,
                steps=settings.pgd_steps,
                seed=seed,
                advance=bar.update,
            )

        clean = _clean_network(images, seed, settings, bar.update)
        results = [Result(_BEFORE, None, None, attacked(clean))]
        bar.set_description("cost of a step")
        costs = _step_costs(_trainers(clean, images, eps[1], seed, settings), settings)
        for method, trainer in _trainers(clean, images, eps[1], seed, settings).items():
            bar.set_description(method)
            _fit(trainer, settings.epochs, bar.update)
            results.append(Result(method, *costs[method], attacked(trainer.model)))
    seconds = time.perf_counter() - start
    content = {
        "data": images.name,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        "seconds": seconds,
        "results": [dataclasses.asdict(result) for result in results],
    }
    write_json(folder / "demo.json", content)
    _plot(figure, images.name, results, settings, folder / "demo.png")
    print(demo_table(results, settings.pgd_steps))
    print(f"{seconds:.0f} s; plot and numbers are in {folder / 'demo.png'} and demo.json beside it")
    return results


def demo_table(results: Sequence[Result], steps: int) -> str:
    """Lay out the results: cost of a step, clean accuracy, and PGD accuracy at two eps.

    Args:
        results: a row each.
        steps: of PGD, for the titles.

    Returns:
        The table.
    """
    low, high = results[0].accuracy.eps[1:3]
    header = ["fine-tuned with", "step, in plain steps", "faster than naive", "clean accuracy"]
    header += [f"PGD-{steps} at {_short(eps)}" for eps in (low, high)]
    rows = [
        [
            result.method,
            "" if result.plain_steps is None else f"{result.plain_steps:.1f}",
            "" if result.naive_steps is None else f"{1 / result.naive_steps:.1f}x",
            percent(result.accuracy.clean),
            *map(percent, result.accuracy.pgd[1:3]),
        ]
        for result in results
    ]
    return table(header, rows)


def _clean_network(images: Dataset, seed: int, settings: Settings, advance: Advance) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        Normalize(*pixel_statistics(images.x_train)),
        ResNet(settings.width, settings.blocks, images.shape[0], images.classes),
    )
    nothing = ScheduledPenalty([], images.shape)
    trainer = Trainer(network, images, nothing, crop=settings.crop, seed=seed)
    _fit(trainer, settings.clean_epochs, advance)
    return network


def _trainers(
    clean: nn.Module, images: Dataset, eps: float, seed: int, settings: Settings
) -> dict[str, Trainer]:
    """A trainer for each method, all with a copy of `clean` and the same batches to come."""
    h = eps * math.sqrt(math.prod(images.shape))  # the sign direction moves each pixel by eps
    cure = {"weight": f"{settings.cure_weight}", "h": f"{h}", "norm": True}
    specs: dict[str, list[dict[str, Any]]] = {
        _PLAIN: [],
        _NAIVE: [{"name": "cure", **cure}],
        "CURE": [{"name": "cure", **cure}],
        "anchored CURE": [{"name": "anchored-cure", **cure}],
        "GN": [{"name": "gn", "weight": f"{settings.gn_weight}"}],
        "SGR": [{"name": "sgr", "weight": f"{settings.sgr_weight}"}],
    }
    options: dict[str, Any] = {
        "lr": Schedule(((0, settings.lr), (settings.epochs, 0))),
        "crop": settings.crop,
        "shift": settings.shift,
        "seed": seed + 1,
    }

    def trainer(method: str) -> Trainer:
        make = NaiveCURETrainer if method == _NAIVE else Trainer
        penalty = ScheduledPenalty(specs[method], images.shape)
        return make(copy.deepcopy(clean), images, penalty, **options)

    return {method: trainer(method) for method in _METHODS}


def _fit(trainer: Trainer, epochs: int, advance: Advance) -> None:
    for _ in range(epochs):
        trainer.run_epoch(advance)


def _step_costs(
    trainers: Mapping[str, Trainer], settings: Settings
) -> dict[str, tuple[float, float]]:
    """Compare the methods' steps in turn, round after round.

    A round takes one step of every method in turn, so that whatever else the machine does falls on
    all of them alike; the first two rounds warm up.

    Returns:
        For each method the median cost of a step, in plain and in naive steps.
    """
    times: dict[str, list[float]] = {method: [] for method in trainers}
    for _ in range(2 + settings.timing_rounds):
        for method, trainer in trainers.items():
            trainer.model.train()
            trainer.penalty.set_epoch(0)
            start = time.perf_counter()
            trainer.step(torch.arange(trainer.batch_size))
            times[method].append(time.perf_counter() - start)

    def ratio(method: str, unit: str) -> float:
        pairs = zip(times[method][2:], times[unit][2:], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {method: (ratio(method, _PLAIN), ratio(method, _NAIVE)) for method in trainers}


def _plot(
    figure: Any, data: str, results: Sequence[Result], settings: Settings, path: Path
) -> None:
    axes = figure.add_subplot()
    for result, colour, marker in zip(results, _COLOURS, _MARKERS, strict=True):
        attacked = result.accuracy
        axes.plot(
            [0, *attacked.eps],
            [100 * fraction for fraction in (attacked.clean, *attacked.pgd)],
            color=colour,
            marker=marker,
            linestyle="--" if result.method == _NAIVE else "-",
            label=result.method,
        )
    axes.set_xlabel("eps, largest change of a pixel (pixels from 0 to 1)")
    axes.set_ylabel(f"accuracy under PGD-{settings.pgd_steps} (% of test images)")
    axes.set_title(f"{data}: the same network, fine-tuned in six ways")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _short(eps: float) -> str:
    """A radius as people write it: 0.1, or 2/255."""
    levels = eps * 255
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels)) else f"{eps:g}"
