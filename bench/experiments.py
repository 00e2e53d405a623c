"""The studies behind the defaults: what was tried, on held-out training images only.

Every variant of a study (bench/studies.py) fine-tunes the same clean networks, on the same batches,
and is measured on training images that no network has seen; the test images are not touched, so
that what is chosen here is not chosen on them. Run, for example,

    python bench/experiments.py cure --data mnist.npz

It writes bench/results/experiments-<study>.json after every training; run again after an end by
force it goes on where it was. `--smoke` goes all the way in seconds.
"""

import argparse
import copy
import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from frontier import Results, Row, check_enough, held_out, processes, smoke, train
from frontier_methods import Method, network, trainer
from penalty_gradients import batches, explained, roughness
from results import PROVENANCE
from studies import STUDIES, Clamp, Study, Variant, activated
from torch import Tensor, nn
from tqdm import tqdm

from robustkern.evaluation import accuracy, fgsm, pgd
from robustkern.training.data import Dataset, load
from robustkern.training.trainer import Trainer

CLEAN = Method("no penalty", "plain")
EXPLAINED_BATCHES = 2
Task = tuple[str, str, float, int]


def study_of(name: str, *, small: bool) -> Study:
    """The study; small, on a few images with one strength and one seed of each variant."""
    study = STUDIES[name]()
    if not small:
        return study
    variants = tuple(
        dataclasses.replace(
            variant,
            method=dataclasses.replace(variant.method, grid=variant.method.grid[:1]),
            seeds=1,
        )
        for variant in study.variants
    )
    setting = smoke(study.setting)
    return dataclasses.replace(study, setting=setting, variants=variants, attacked=8)


def tasks(study: Study) -> list[Task]:
    """Everything to do: to explain a clean network is named after its activation."""
    trainings = [
        ("trained", variant.name, strength, seed)
        for variant in study.variants
        for strength in variant.method.grid
        for seed in range(variant.seeds)
    ]
    if not study.explained:
        return trainings
    clean = {(v.activation, seed): None for v in study.variants for seed in range(v.seeds)}
    return [*(("explained", activation, 0.0, seed) for activation, seed in clean), *trainings]


class Laboratory:
    """The data and the clean networks of a process that trains."""

    def __init__(self, name: str, small: bool, data: Dataset) -> None:
        self.name, self.study, self.data = name, study_of(name, small=small), data
        self.variants = {variant.name: variant for variant in self.study.variants}
        # Every process makes them itself: on one thread they come out the same.
        self.clean = functools.cache(self._clean)

    def _clean(self, activation: str, seed: int) -> nn.Module:
        setting = self.study.setting
        torch.manual_seed(seed)
        model = activated(network(self.data), activation)
        run = trainer(CLEAN, 0.0, model, self.data, setting, seed)
        for _ in range(setting.clean_epochs):
            run.run_epoch()
        return run.model

    def trainer(self, variant: Variant, strength: float, seed: int) -> Trainer:
        """Of a copy of the clean network of that seed and activation."""
        model = copy.deepcopy(self.clean(variant.activation, seed))
        if variant.clamped:
            model = nn.Sequential(Clamp(), model)
        run = trainer(variant.method, strength, model, self.data, self.study.setting, seed + 1)
        # A step with an augmentation draws a seed for it: all must, to see the same batches.
        run.augmentation = run.augmentation or _unchanged
        return run

    def trained(self, kind: str, name: str, strength: float, seed: int) -> Row:
        """The row of a task."""
        study = self.study
        row = {"study": self.name, "kind": kind, "method": name, "strength": strength, "seed": seed}
        row["commit"] = PROVENANCE["commit"]
        if kind == "explained":
            model = self.clean(name, seed)
            return {**row, **explained(model, self._batches(), study.setting.step_length)}
        run = self.trainer(self.variants[name], strength, seed)
        torch.manual_seed(seed)
        records, figures = [], []
        try:
            for epoch in range(1, study.setting.epochs + 1):
                records.append(run.run_epoch())
                if study.each_epoch or epoch == study.setting.epochs:
                    measured = self.measured(run.model)
                    figures.append(
                        {"epoch": epoch, "clean": records[-1].clean_accuracy, **measured}
                    )
        except FloatingPointError as error:
            return {**row, "failed": str(error)}
        row["seconds"] = sum(record.seconds for record in records)
        row["passes"] = {
            "forward": statistics.mean(record.forward_passes for record in records),
            "backward": statistics.mean(record.backward_passes for record in records),
        }
        row |= {"attacked": study.attacked, "figures": figures}
        if study.explained:
            row["roughness"] = roughness(run.model, self._batches(), study.setting.step_length)
        return row

    def measured(self, model: nn.Module) -> Row:
        """Accuracy on held-out images, under FGSM and PGD at each eps."""
        x, y = self.data.x_test[: self.study.attacked], self.data.y_test[: self.study.attacked]
        eps, steps = self.study.setting.eps, self.study.setting.pgd_steps
        return {
            "fgsm": [
                accuracy(model, x, y, attack=lambda m, a, b, e=e: fgsm(m, a, b, e)) for e in eps
            ],
            "pgd": [
                accuracy(model, x, y, attack=lambda m, a, b, e=e: pgd(m, a, b, e, steps=steps))
                for e in eps
            ],
        }

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        return batches(self.data, self.study.setting.batch_size, EXPLAINED_BATCHES)

    def step_time(self, variant: Variant) -> float:
        """Processor seconds of one step, after another that warms up."""
        run = self.trainer(variant, variant.method.grid[0], seed=0)
        index = torch.arange(self.study.setting.batch_size)
        run.model.train()
        run.penalty.set_epoch(0)
        for _ in range(2):
            start = time.process_time()
            run.step(index)
            seconds = time.process_time() - start
        return seconds


def _unchanged(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return inputs


def announce(name: str, small: bool, data: Dataset, left: list[Task], workers: int) -> None:
    """Say how much there is to do, from a timed step of each variant."""
    untrained = Laboratory(name, small, data)
    setting = untrained.study.setting
    untrained.study = dataclasses.replace(
        untrained.study, setting=dataclasses.replace(setting, clean_epochs=0)
    )
    asked = {method for kind, method, *_ in left if kind == "trained"}
    times = {
        each: untrained.step_time(untrained.variants[each])
        for each in tqdm(sorted(asked), desc="timing a step", leave=False)
    }
    plain = untrained.step_time(Variant(CLEAN))
    steps = -(-setting.train // setting.batch_size)
    trainings = sum(times[m] * steps * setting.epochs for kind, m, *_ in left if kind == "trained")
    attacks = len(setting.eps) * (1 + setting.pgd_steps) * untrained.study.attacked
    attacks *= setting.epochs if untrained.study.each_epoch else 1
    evaluations = plain / setting.batch_size * attacks * len(left)
    networks = {(untrained.variants[m].activation, s) for k, m, _, s in left if k == "trained"}
    clean = plain * steps * setting.clean_epochs * len(networks) * workers
    # Double backward in float64, and a first-order gradient at each shift, in both modes.
    explaining = plain * 100 * EXPLAINED_BATCHES * sum(kind == "explained" for kind, *_ in left)
    minutes = (trainings + evaluations + clean + explaining) / 60
    print(
        f"{len(left)} trainings and the like left: about {minutes:.0f} minutes of one core, "
        f"{minutes / workers:.0f} in {workers} process(es), if this machine does nothing else"
    )


def run(name: str, small: bool, data: Dataset, results: Results, workers: int) -> None:
    """Train what is left."""
    torch.set_num_threads(1)
    every = tasks(study_of(name, small=small))
    left = [task for task in every if not results.has(*task)]
    if left:
        announce(name, small, data, left, workers)
    with processes(workers, Laboratory, name, small, data) as pool:
        train(pool, every, results)


def load_held_out(path: str, study: Study) -> Dataset:
    """What the study trains on and, as its test images, what it measures on; nothing else."""
    whole = load(path)
    check_enough(whole, study.setting)
    part = held_out(whole, study.setting)
    tensors: dict[str, Any] = {
        key: value.clone() for key, value in vars(part).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(part, **tensors)


def check_study(results: Results, name: str) -> None:
    """Refuse to go on with the results of another study, whose setting may be the same."""
    others = {row["study"] for row in results.rows} - {name}
    if others:
        raise ValueError(
            f"check_study: {results.path} must be of {name} to go on with, "
            f"got {', '.join(sorted(others))}; move it away to begin anew"
        )


def main() -> None:
    """Run what is left of a study."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", required=True, help="as `robustkern train` takes it")
    parser.add_argument("--note", default="", help="what to say of the data beside the figures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--smoke", action="store_true", help="a few images, one seed")
    parser.add_argument("--output", type=Path, help="the JSON file")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    study = study_of(arguments.study, small=arguments.smoke)
    default = Path(__file__).parent / "results" / f"experiments-{arguments.study}.json"
    path = arguments.output or default.with_stem(default.stem + "-smoke" * arguments.smoke)
    try:
        data = load_held_out(arguments.data, study)
        results = Results(path, study.setting, arguments.note)
        check_study(results, arguments.study)
    except FileNotFoundError as error:
        parser.error(f"{error}; {arguments.study} is for {study.setting.set}")
    except ValueError as error:
        parser.error(str(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    run(arguments.study, arguments.smoke, data, results, arguments.workers)
    failed = sum("failed" in row for row in results.rows)
    print(f"{len(results.rows)} rows, {failed} of them failed")
    print(f"{time.perf_counter() - begun:.0f} s; written: {path}")


if __name__ == "__main__":
    main()
