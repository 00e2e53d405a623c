"""Recipes trained and attacked, with their figures in a results file, in pieces."""

import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.recipes import Recipe, find_recipe, from_recipe
from robustkern.training.session import Options, find_device, train
from robustkern.training.trainer import Trainer

FAST = {"precision": "bfloat16", "channels_last": True, "compile": True}
# Small batches, for enough steps of the few images.
REDUCED = {"train_size": 2000, "test_size": 300, "batch_size": 50, "device": "cpu"}
REDUCED_EPOCHS = 4  # times fewer
REDUCED_LR = 10  # times the rate of a fine-tuning, whose few steps would change nothing
DISTANCES, REDUCED_DISTANCES = 100, 25  # test images whose distance is measured
# Trained in the structure of the authors' code, and the recipe of the same formula, mode and data.
AUTHORS = {"authors-cure-resnet18-cifar10": "cure-norm-resnet18-cifar10"}
# Options that are paths of this machine; they stay out of the results.
PLACES = ("data", "data_folder", "init", "output")


@dataclass(frozen=True)
class Setting:
    """What, with the recipe, tells one row of the results from another."""

    data: str  # in place of the recipe's; a file without its folder
    reduced: bool
    fast: bool
    note: str

    @property
    def mark(self) -> str:
        """What stands beside every figure."""
        marks = [text for text in ("reduced" if self.reduced else "", self.note) if text]
        return f" ({', '.join(marks)})" if marks else ""


class Runs:
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
        size, speed = "reduced" if setting.reduced else "full", "-fast" if setting.fast else ""
        self.runs = runs / f"{size}{speed}"
        self.seconds, self.end = seconds, time.monotonic() + seconds
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
            key = {"recipe": recipe, **dataclasses.asdict(self.setting)}
            made = {name: PROVENANCE[name] for name in ("commit", "command")}
            self.rows.append(row := {**key, **made})
        row |= figures
        write_results(self.path, self.rows)

    def options(self, recipe: str) -> Options:
        """Of the training by a recipe."""
        given = {**self.given, "output": str(self.runs / recipe)}
        start = recipe_of(recipe).start
        if start is not None:
            given["init"] = str(self.checkpoint(start))
        if self.setting.fast:
            # Compiled networks have no double backward.
            given |= {**FAST, "compile": recipe not in AUTHORS}
        options = from_recipe(AUTHORS.get(recipe, recipe), given)
        return reduced(options) if self.setting.reduced else options

    def checkpoint(self, recipe: str) -> Path:
        return self.runs / recipe / "checkpoint.pt"

    def trained(self, recipe: str) -> bool:
        """Train by a recipe as far as the time reaches; is it done?"""
        options, path = self.options(recipe), self.checkpoint(recipe)
        kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in PLACES}
        if row := self.row(recipe):
            self.check_same(row, kept)
            return True
        if self.left() <= 0:
            return False
        start = recipe_of(recipe).start
        if start is not None and "error" in self.row(start):
            self.save(recipe, error=f"{start} failed")
            return True
        try:
            train(
                options,
                resume=path.exists(),
                seconds=self.left(),
                trainer_type=NaiveCURETrainer if recipe in AUTHORS else Trainer,
            )
        except FloatingPointError as error:
            self.save(recipe, options=kept, error=str(error))
            return True
        log = load_checkpoint(path)["log"]
        if len(log) < options.epochs:
            longest = max(epoch["seconds"] for epoch in log)
            if longest > self.seconds:
                raise ValueError(
                    f"--seconds must leave time for an epoch of {recipe}, which took "
                    f"{longest:.0f}, got {self.seconds:g}"
                )
            return False
        self.save(
            recipe,
            options=kept,
            seconds=sum(epoch["seconds"] for epoch in log),
            forward_passes=sum(epoch["forward_passes"] for epoch in log),
            backward_passes=sum(epoch["backward_passes"] for epoch in log),
            test_images=len(self.data(options).x_test),
            clean=log[-1]["clean_accuracy"],
        )
        return True

    def check_same(self, row: dict[str, Any], options: dict[str, Any]) -> None:
        """Refuse a row that was trained by other options than now."""
        now = json.loads(json.dumps(options))
        for name, value in row.get("options", {}).items():
            if name in now and value != now[name]:
                raise ValueError(
                    f"results file {self.path}: {name} of {row['recipe']} must be {now[name]}, as "
                    f"it is trained now, got {value}; move it away, or name another by "
                    "--output"
                )

    def data(self, options: Options) -> Dataset:
        return loaded(options.data, options.data_folder).first(
            options.train_size, options.test_size
        )

    def measured(self, recipe: str, figures: list[str], autoattacked: int) -> bool:
        """Measure figures of a trained network as far as the time reaches; is it done?

        They are `pgd<steps>-<eps>`, `autoattack-<eps>`, eps in 255ths, and `distance`.
        """
        row = self.row(recipe)
        if "error" in row:
            return True
        autoattacked = min(autoattacked, row["test_images"])
        other = row.get("autoattack_images") != autoattacked
        missing = [
            name for name in figures if name not in row or (name.startswith("autoattack") and other)
        ]
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
                images = min(
                    REDUCED_DISTANCES if self.setting.reduced else DISTANCES, len(data.x_test)
                )
                found = distance(model, data.first(test=images))
                self.save(recipe, distance=found, distance_images=images)
            elif kind == "autoattack":
                found = attacked(model, data.first(test=autoattacked), autoattack, int(eps))
                self.save(recipe, **{name: found, "autoattack_images": autoattacked})
            else:
                found = attacked(model, data, pgd, int(eps), steps=int(kind.removeprefix("pgd")))
                self.save(recipe, **{name: found})
        return True


@functools.cache
def loaded(data: str, folder: str) -> Dataset:
    """The images, read once."""
    return load(data, folder)


def attacked(model: nn.Module, data: Dataset, attack: Any, eps: int, **more: Any) -> float:
    """Accuracy under an attack of eps 255ths."""

    def move(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return attack(model, inputs, targets, eps / 255, **more)

    return accuracy(model, data.x_test, data.y_test, attack=move)


def distance(model: nn.Module, data: Dataset) -> float | None:
    """Median L2 distance by Carlini and Wagner's attack; None if half the images stand."""

    def move(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return carlini_wagner(model, inputs, targets, steps=200, searches=5)

    x, y = data.x_test, data.y_test
    found = adversarial_distances(model, x, y, adversarial_inputs(model, x, y, move)).median
    return found if found is not None and math.isfinite(found) else None


def reduced(options: Options) -> Options:
    """The same with fewer images and epochs, and a narrow network."""
    epochs = max(1, options.epochs // REDUCED_EPOCHS)
    factor = epochs / options.epochs
    scheduled = ("weight", "h")
    return dataclasses.replace(
        options,
        **REDUCED,
        model=f"narrow:{options.model}",
        epochs=epochs,
        lr=compressed(options.lr, factor, 1 if options.init is None else REDUCED_LR),
        penalties=[
            {key: compressed(p[key], factor) if key in scheduled else p[key] for key in p}
            for p in options.penalties
        ],
    )


def compressed(schedule: str, factor: float, times: float = 1) -> str:
    """A schedule with its epochs multiplied by `factor`, and its values `times` as high.

    >>> compressed("0:0,5:1.5", 0.2), compressed("4", 0.2), compressed("0:0.1,5:0.01", 1, 10)
    ('0:0,1:1.5', '4', '0:1,5:0.1')
    """
    if ":" not in schedule:
        return f"{float(schedule) * times:g}"
    points = [[float(number) for number in point.split(":")] for point in schedule.split(",")]
    return ",".join(f"{epoch * factor:g}:{value * times:g}" for epoch, value in points)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file, if there is one; those of another version are refused."""
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
        of, rows = results["provenance"], results["rows"]
        made_by = {name: of.get(name, "an older one") for name in ("robustkern", "torch")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results file {path} must be one that this wrote, got {error!r}"
        ) from error
    for name, version in made_by.items():
        if version != PROVENANCE[name]:
            raise ValueError(
                f"results file {path} must be of this version of {name}, {PROVENANCE[name]}, "
                f"got {version}; move it away, or name another by --output"
            )
    return rows


def recipe_of(name: str) -> Recipe:
    """The recipe of a row."""
    return find_recipe(AUTHORS.get(name, name))


def with_starts(recipes: list[str]) -> list[str]:
    """The recipes, each behind the one that it starts from."""
    found: list[str] = []
    for recipe in recipes:
        start = recipe_of(recipe).start
        found += [name for name in (start, recipe) if name and name not in found]
    return found
