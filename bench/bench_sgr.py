"""Does SGR beat GN on long-range-correlated noise? On MNIST.

Every method fine-tunes the same clean network on the same batches. Its strength is searched on
validation images: the greatest of the grid that costs no more than a point of the accuracy that
fine-tuning without a penalty has. Run

    python bench/bench_sgr.py --data mnist.npz

It prints a table and writes bench/results/sgr-mnist.json. `--smoke` goes all the way in seconds.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import nn
from tqdm import tqdm

from robustkern import CovarianceFunction
from robustkern.evaluation import accuracy, lrc_accuracy, pgd
from robustkern.training.adversarial import lrc_augmentation
from robustkern.training.data import Dataset, load
from robustkern.training.models import Normalize, cnn, pixel_statistics
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.trainer import Trainer

# The strengths searched: weights, and for LRC training the deviation of the noise.
GRIDS = {
    "no penalty": (0.0,),
    "GN": (1.0, 10.0, 30.0, 100.0, 300.0),
    "SGR": (10.0, 100.0, 300.0, 1000.0, 3000.0),
    "LRC-trained": (0.1, 0.2, 0.3, 0.5),
}
LOSS_ALLOWED = 0.01


@dataclass(frozen=True)
class Setting:
    """Sizes of the run."""

    train: int = 12_000
    validation: int = 4_000
    test: int = 1_000
    clean_epochs: int = 3
    epochs: int = 3
    seeds: int = 2
    search_draws: int = 5
    draws: int = 100
    eps: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    decay_lengths: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    # One of each: every eps is tried at this length, every length at this eps.
    middle_eps: float = 0.3
    middle_length: float = 4.0
    pgd_eps: tuple[float, ...] = (0.1, 0.15)
    pgd_steps: int = 20


SMOKE = Setting(
    train=256, validation=64, test=32, clean_epochs=9, epochs=1, seeds=1, search_draws=2, draws=3,
    eps=(0.1, 0.3), decay_lengths=(1.0, 4.0), pgd_steps=2,
)  # fmt: skip


def trainer(method: str, strength: float, model: nn.Module, data: Dataset, seed: int) -> Trainer:
    specs: list[dict[str, Any]] = []
    if method in ("GN", "SGR"):
        specs = [{"name": method.lower(), "weight": str(strength)}]
    penalty = ScheduledPenalty(specs, data.shape)
    if method == "SGR":
        # The data's variance makes the weight a noise-to-signal ratio.
        penalty.penalty.covariance.standardize(variance(data))
    noise = lrc_augmentation(data.shape, strength) if method == "LRC-trained" else None
    return Trainer(model, data, penalty, augmentation=noise, seed=seed)


def variance(data: Dataset) -> float:
    """Of a pixel over the training images, the mean over pixels."""
    return data.x_train.var(0).mean().item()


def fine_tuned(
    method: str, strength: float, clean: nn.Module, data: Dataset, epochs: int, seed: int
) -> tuple[Trainer, float]:
    """The trainer after its epochs, and how many seconds they took."""
    run = trainer(method, strength, copy.deepcopy(clean), data, seed)
    return run, sum(run.run_epoch().seconds for _ in range(epochs))


def searched(clean: nn.Module, data: Dataset, setting: Setting, bar: Any) -> list[dict[str, Any]]:
    """Accuracy on the validation images, clean and under noise, for every strength."""
    rows = []
    for method, grid in GRIDS.items():
        for strength in grid:
            run, _ = fine_tuned(method, strength, clean, data, setting.epochs, seed=1)
            ((noisy,),) = lrc_accuracy(
                run.model, data.x_test, data.y_test, [setting.middle_eps], [setting.middle_length],
                draws=setting.search_draws, seed=1,
            )  # fmt: skip
            clean_accuracy = accuracy(run.model, data.x_test, data.y_test)
            rows.append(
                {"method": method, "strength": strength, "clean": clean_accuracy, "lrc": noisy}
            )
            tqdm.write(f"search: {method} {strength:g}: {clean_accuracy:.3f}, {noisy:.3f}")
            bar.update()
    return rows


def chosen(search: list[dict[str, Any]], method: str) -> float:
    """The greatest strength that costs little clean accuracy."""
    least = search[0]["clean"] - LOSS_ALLOWED
    of_method = [row for row in search if row["method"] == method]
    allowed = [row for row in of_method if row["clean"] >= least]
    if not allowed:  # the whole grid is too strong: the weakest is the nearest
        return min(row["strength"] for row in of_method)
    return max(row["strength"] for row in allowed)


def measured(model: nn.Module, data: Dataset, setting: Setting) -> dict[str, Any]:
    """Accuracy on the test images, by decay length and by eps, and under PGD."""

    def under_noise(eps: Sequence[float], lengths: Sequence[float | CovarianceFunction]) -> Any:
        return lrc_accuracy(model, data.x_test, data.y_test, eps, lengths, draws=setting.draws)

    def attacked(eps: float) -> float:
        return accuracy(
            model, data.x_test, data.y_test,
            attack=lambda m, x, y: pgd(m, x, y, eps, steps=setting.pgd_steps),
        )  # fmt: skip

    (by_eps,) = under_noise(setting.eps, (setting.middle_length,))
    others = [z for z in setting.decay_lengths if z != setting.middle_length]
    *found, (of_data,) = under_noise((setting.middle_eps,), [*others, data_noise(data)])
    by_length = {setting.middle_length: by_eps[setting.eps.index(setting.middle_eps)]}
    by_length |= {z: row[0] for z, row in zip(others, found, strict=True)}
    return {
        "clean": accuracy(model, data.x_test, data.y_test),
        "lrc_by_eps": by_eps,
        "lrc_by_length": [by_length[z] for z in setting.decay_lengths],
        "lrc_of_data": of_data,
        "pgd": [attacked(eps) for eps in setting.pgd_eps],
    }


def data_noise(data: Dataset) -> CovarianceFunction:
    """Noise with the covariance of the images, of unit variance."""
    images = data.x_train[:2000]
    covariance = CovarianceFunction(*data.shape, unbiased=False).standardize(1.0)
    covariance.update(images - images.mean(0))
    return covariance


def network(data: Dataset) -> nn.Module:
    """That of bench_training.py."""
    body = cnn(data.shape, data.classes, width=16)
    return nn.Sequential(Normalize(*pixel_statistics(data.x_train)), body)


def split(data: Dataset, setting: Setting) -> tuple[Dataset, Dataset]:
    """Training images with validation images in the place of the test images, and with these."""
    end = setting.train + setting.validation
    held_out = dataclasses.replace(
        data.first(setting.train),
        x_test=data.x_train[setting.train : end],
        y_test=data.y_train[setting.train : end],
    )
    return held_out, data.first(setting.train, setting.test)


def main() -> None:
    """Search, train, attack, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", required=True, help=".npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--smoke", action="store_true", help="a few images, a few draws")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting = SMOKE if arguments.smoke else Setting()
    validation, test = split(load(arguments.data), setting)
    rows: list[dict[str, Any]] = []
    search: list[dict[str, Any]] = []
    runs = sum(map(len, GRIDS.values())) + setting.seeds * len(GRIDS)
    start = time.perf_counter()
    with tqdm(total=runs, unit="run") as bar:
        for seed in range(setting.seeds):
            torch.manual_seed(seed)
            clean = network(test)
            pretraining = trainer("no penalty", 0.0, clean, test, seed)
            for _ in range(setting.clean_epochs):
                pretraining.run_epoch()
            if not search:  # on the first seed alone
                search = searched(clean, validation, setting, bar)
            for method in GRIDS:
                strength = chosen(search, method)
                run, seconds = fine_tuned(method, strength, clean, test, setting.epochs, seed + 1)
                learned = {}
                if method == "SGR":
                    covariance = run.penalty.penalty.covariance
                    learned = {"decay_length": covariance.decay_length()}
                rows.append(
                    {
                        "seed": seed, "method": method, "strength": strength, "seconds": seconds,
                        **measured(run.model, test, setting), **learned,
                        "setting": dataclasses.asdict(setting), "variance": variance(test),
                        "search": [row for row in search if row["method"] == method],
                    }
                )  # fmt: skip
                tqdm.write(f"{method}: {seconds:.0f} s, clean {rows[-1]['clean']:.3f}")
                bar.update()
    print(f"{time.perf_counter() - start:.0f} s")
    columns = ["clean", *(f"eps {e:g}" for e in setting.eps)]
    columns += [f"{z:g} px" for z in setting.decay_lengths]
    columns += [*(f"PGD {e:g}" for e in setting.pgd_eps), "data's"]
    print(f"{'method':<12}{'':>6}" + "".join(f"{column:>9}" for column in columns))
    for method in GRIDS:
        of_method = [row for row in rows if row["method"] == method]
        values = [statistics.mean(row["clean"] for row in of_method)]
        for key in ("lrc_by_eps", "lrc_by_length", "pgd"):
            values += map(statistics.mean, zip(*(row[key] for row in of_method), strict=True))
        values.append(statistics.mean(row["lrc_of_data"] for row in of_method))
        numbers = "".join(f"{value:>9.3f}" for value in values)
        print(f"{method:<12}{chosen(search, method):>6g}{numbers}")
    name = "sgr-mnist-smoke.json" if arguments.smoke else "sgr-mnist.json"
    write_results(arguments.output or Path(__file__).parent / "results" / name, rows)


if __name__ == "__main__":
    main()
