"""Robust accuracy against training cost, for every method: the frontier.

Every method fine-tunes the same clean networks. Its strength (a weight, or the eps it trains with)
is searched on held-out training images: of at most four, the one with the highest PGD accuracy at
the main eps among those that cost little clean accuracy; all are trained on one seed, then the best
two on another, and of these the means decide. The networks of that strength, on these seeds and on
one that the search has not seen, are measured on the test images. Then the steps of all methods are
timed in turn, in several processes one after another, with nothing else running. Run

    python bench/frontier.py mnist --data mnist.npz

It writes bench/results/frontier-<set>.json after every training, and the pictures beside it; run
again after an end by force it goes on where it was. `--smoke` goes all the way in seconds.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from frontier_methods import SETTINGS, Method, Setting, methods, network, trainer
from frontier_picture import claims, draw, draw_steps, summary
from results import PROVENANCE
from torch import nn
from tqdm import tqdm

import robustkern
from robustkern.evaluation import accuracy, apgd, pgd
from robustkern.evaluation.passes import Attack
from robustkern.training.data import Dataset, load
from robustkern.training.files import atomic_path, write_json
from robustkern.training.trainer import Trainer

FINALISTS = 2  # strengths of a method that are searched on a second seed
SPAN = 8  # steps timed as one, so that what comes every second, fourth or eighth counts in full
TIMERS = 4  # processes that time steps, so that what is peculiar to one does not decide
Row = dict[str, Any]


def smoke(setting: Setting) -> Setting:
    """The same on a few images, one strength and one seed of the finals."""
    return dataclasses.replace(
        setting, train=32, validation=16, test=16, batch_size=16, clean_epochs=1, epochs=1, seeds=1,
        grids={name: grid[1:2] for name, grid in setting.grids.items()}, search_steps=1,
        pgd_steps=1, restarts=1, apgd_images=4, apgd_steps=2, timing_rounds=1,
    )  # fmt: skip


def check_enough(data: Dataset, setting: Setting) -> None:
    """Refuse data of another set, or with fewer images than the figures are said to be of."""
    channels = {"mnist": 1, "cifar10": 3}[setting.set]
    if data.shape[0] != channels:
        raise ValueError(
            f"check_enough: data must be images of {setting.set}, of {channels} channel(s), "
            f"got {data.shape[0]}"
        )
    needed = (setting.train + setting.validation, setting.test)
    found = (len(data.x_train), len(data.x_test))
    if found[0] < needed[0] or found[1] < needed[1]:
        raise ValueError(
            f"check_enough: data must hold at least {needed[0]} training and {needed[1]} test "
            f"images, got {found[0]} and {found[1]}"
        )


def held_out(data: Dataset, setting: Setting) -> Dataset:
    """Training images, with validation images in the place of the test images."""
    end = setting.train + setting.validation
    return dataclasses.replace(
        data.first(setting.train),
        x_test=data.x_train[setting.train : end],
        y_test=data.y_train[setting.train : end],
    )


class Bench:
    """The data and the clean networks of a process that trains.

    Args:
        setting: of the run.
        data: all of them.
        kept: folder of the networks that the search has trained, for the finals of the same seed.
    """

    def __init__(self, setting: Setting, data: Dataset, kept: Path | None = None) -> None:
        self.setting, self.data, self.kept = setting, held_out(data, setting), kept
        self.test = data.first(1, setting.test)
        self.methods = {method.name: method for method in methods(setting)}
        # Every process makes them itself: on one thread they come out the same.
        self.clean = functools.cache(self._clean)

    def _clean(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        plain = self.methods["no penalty"]
        run = trainer(plain, 0.0, network(self.data), self.data, self.setting, seed)
        for _ in range(self.setting.clean_epochs):
            run.run_epoch()
        return run.model

    def epochs(self, name: str) -> int:
        """Of fine-tuning by a method."""
        return self.methods[name].epochs or self.setting.epochs

    def trainer(self, method: Method, strength: float, seed: int) -> Trainer:
        """Of a copy of the clean network of that seed."""
        model = copy.deepcopy(self.clean(seed))
        return trainer(method, strength, model, self.data, self.setting, seed + 1)

    def trained(self, kind: str, name: str, strength: float, seed: int) -> Row:
        """Train, and measure on validation images (`search`) or on test images (`final`)."""
        row = {
            "kind": kind, "method": name, "strength": strength, "seed": seed,
            "family": self.methods[name].family, "naive_of": self.methods[name].naive_of,
            "epochs": self.epochs(name), "commit": PROVENANCE["commit"],
        }  # fmt: skip
        try:
            model, cost = self.fine_tuned(name, strength, seed)
        except FloatingPointError as error:
            return {**row, "failed": str(error)}
        measure = self.searched if kind == "search" else self.measured
        return {**row, **cost, **measure(model)}

    def fine_tuned(self, name: str, strength: float, seed: int) -> tuple[nn.Module, Row]:
        """The network, and what it took; trained once, where there is a folder to keep it in."""
        run = self.trainer(self.methods[name], strength, seed)
        file = None
        if self.kept is not None:
            file = self.kept / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-{strength:g}-{seed}.pt"
            if file.exists():
                found = torch.load(file, weights_only=True)
                run.model.load_state_dict(found["model"])
                return run.model, found["cost"]
        torch.manual_seed(seed)
        records = [run.run_epoch() for _ in range(self.epochs(name))]
        cost = {
            "passes": {
                "forward": statistics.mean(record.forward_passes for record in records),
                "backward": statistics.mean(record.backward_passes for record in records),
            },
            "seconds": sum(record.seconds for record in records),
        }
        if file is not None:
            with atomic_path(file) as temporary:
                torch.save({"model": run.model.state_dict(), "cost": cost}, temporary)
        return run.model, cost

    def searched(self, model: nn.Module) -> Row:
        """Accuracy on the validation images, clean and attacked."""
        eps, steps = self.setting.main_eps, self.setting.search_steps
        return {
            "clean": accuracy(model, self.data.x_test, self.data.y_test),
            "pgd": accuracy(
                model, self.data.x_test, self.data.y_test,
                attack=lambda m, x, y: pgd(m, x, y, eps, steps=steps),
            ),
        }  # fmt: skip

    def measured(self, model: nn.Module) -> Row:
        """How many test images are classified right, clean and under each attack."""
        setting = self.setting

        def right(samples: int, attack: Attack | None = None) -> int:
            x, y = self.test.x_test[:samples], self.test.y_test[:samples]
            return round(accuracy(model, x, y, attack=attack) * len(x))

        def attacked(eps: float) -> int:
            starts = torch.Generator().manual_seed(0)
            return right(
                setting.test,
                lambda m, x, y: pgd(
                    m, x, y, eps, steps=setting.pgd_steps, restarts=setting.restarts,
                    generator=starts,
                ),
            )  # fmt: skip

        return {
            "right": right(setting.test),
            "pgd_right": [attacked(eps) for eps in setting.eps],
            "apgd_right": right(
                setting.apgd_images,
                lambda m, x, y: apgd(m, x, y, setting.main_eps, steps=setting.apgd_steps),
            ),
        }

    def step_times(
        self, names: Iterable[str], rounds: int, compiled: bool
    ) -> dict[str, list[tuple[float, float]]]:
        """Seconds of a step of each method, in turn, and of a plain one taken just before.

        Args:
            names: of the methods.
            rounds: after a step of each that warms up, without what comes every other step only.
            compiled: the compiled methods too; where there is no compiler they have no times.
        """
        runs: dict[str, Trainer] = {}
        for name in dict.fromkeys(["no penalty", *names]):
            method = self.methods[name]
            if method.compiled and not compiled:
                continue
            run = self.trainer(method, method.grid[len(method.grid) // 2], seed=0)
            try:
                self._steps(run, 1)
            except Exception as error:
                if not method.compiled:
                    raise
                tqdm.write(f"{name}: no step, {type(error).__name__}")
                continue
            runs[name] = run
        plain = runs["no penalty"]
        times: dict[str, list[tuple[float, float]]] = {n: [] for n in names if n in runs}
        for _ in range(rounds):
            for name in times:
                beside = self._steps(plain, SPAN) / SPAN
                run = runs[name]
                own = beside if run is plain else self._steps(run, SPAN) / SPAN
                times[name].append((own, beside))
        return times

    def _steps(self, run: Trainer, steps: int) -> float:
        index = torch.arange(self.setting.batch_size)
        run.model.train()
        run.penalty.set_epoch(0)
        start = time.perf_counter()
        for _ in range(steps):
            run.step(index)
        return time.perf_counter() - start


class Results:
    """The rows of a run, written whole after each, and read again by a run that goes on."""

    def __init__(self, path: Path, setting: Setting, note: str) -> None:
        self.path = path
        versions = {"robustkern": robustkern.__version__, "torch": torch.__version__}
        # As JSON has it: lists for tuples.
        self.head = json.loads(
            json.dumps({"versions": versions, "setting": dataclasses.asdict(setting), "note": note})
        )
        self.rows: list[Row] = []
        if path.exists():
            try:
                found = dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"Results: {path} must hold results, got {error!r}") from error
            for key, value in self.head.items():
                if found.get(key) != value:
                    raise ValueError(
                        f"Results: {path} must be of the same {key} to go on with, "
                        f"{_difference(found.get(key), value)}; move it away to begin anew"
                    )
            self.rows = found["rows"]

    def append(self, *rows: Row) -> None:
        self.rows += rows
        content = {"provenance": {**PROVENANCE, "threads": 1}, **self.head, "rows": self.rows}
        write_json(self.path, content)

    def has(self, kind: str, method: str, strength: float, seed: int) -> bool:
        key = (kind, method, strength, seed)
        return any((r["kind"], r["method"], r.get("strength"), r.get("seed")) == key
                   for r in self.rows)  # fmt: skip


def _difference(found: Any, wanted: Any) -> str:
    """The first thing that differs, in words."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return f"got {found!r} for {wanted!r}"
    key = next(k for k in {**wanted, **found} if found.get(k) != wanted.get(k))
    return f"got {key} {found.get(key)} for {wanted.get(key)}"


def ranking(
    rows: list[Row], method: Method, margin: float, grid: Sequence[float], seeds: int
) -> tuple[float, ...]:
    """The strengths of `grid` from the best on, by means over the seeds; without what failed."""
    search = {(r["method"], r["strength"], r["seed"]): r for r in rows if r["kind"] == "search"}

    def mean(key: str, name: str, strength: float) -> float:
        return statistics.mean(search[name, strength, seed][key] for seed in range(seeds))

    least = mean("clean", "no penalty", 0.0) - margin

    def merit(strength: float) -> tuple[bool, float]:
        clean = mean("clean", method.name, strength)
        # Of those that are too strong, the one that costs least is the nearest.
        allowed = clean >= least
        return allowed, mean("pgd", method.name, strength) if allowed else clean

    tried = [
        s for s in grid if not any("failed" in search[method.name, s, i] for i in range(seeds))
    ]
    return tuple(sorted(tried, key=merit, reverse=True))


_BENCH: list[Any] = []  # of a worker: its one argument, made once


def begin(make: Callable[..., Any], *arguments: Any) -> None:
    """Make, in a worker of one thread, what trains there: `trained` takes a task, gives a row."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _BENCH.append(make(*arguments))


def processes(workers: int, make: Callable[..., Any], *arguments: Any) -> ProcessPoolExecutor:
    """So many workers, begun with `make`."""
    # glibc would give the memory of each batch back, and an attack spend a third of its time on
    # getting it again.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**30))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, begin, (make, *arguments))


def _end_with_parent() -> None:
    """A worker would work off what it was given, for nobody, when its parent has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _trained(*task: Any) -> Row:
    row: Row = _BENCH[0].trained(*task)
    return row


def train(
    pool: ProcessPoolExecutor, tasks: list[tuple[str, str, float, int]], results: Results
) -> None:
    """Train what the results do not have yet; each is written when it is done."""
    left = [task for task in tasks if not results.has(*task)]
    futures: list[Future[Row]] = [pool.submit(_trained, *task) for task in left]
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), unit="training") as bar:
        try:
            for future in as_completed(futures):
                row = future.result()
                results.append(row)
                bar.set_postfix_str(f"{row['method']} {row['strength']:g}")
                bar.update()
        finally:  # after an error nothing more would be written
            for future in futures:
                future.cancel()


def run(setting: Setting, data: Dataset, results: Results, workers: int, only: list[str]) -> None:
    """Search, train, and time the steps."""
    torch.set_num_threads(1)
    bench = Bench(setting, data)
    every = [m for m in bench.methods.values() if not m.compiled and (not only or m.name in only)]
    announce(Bench(dataclasses.replace(setting, clean_epochs=0), data), every, results, workers)
    kept = results.path.with_name(f"{results.path.stem}-networks")
    if not results.rows:  # what lies there is of another run
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    with processes(workers, Bench, setting, data, kept) as pool:
        # All strengths on one seed, the best on another, the best of both on every seed. The first
        # methods train last: most are quick, and leave no worker idle for long.
        grids = {m.name: m.grid for m in every}
        for seed, best in enumerate((FINALISTS, 1)):
            search = [("search", name, s, seed) for name, grid in grids.items() for s in grid]
            train(pool, search[::-1], results)
            grids = {
                m.name: ranking(results.rows, m, setting.margin, grids[m.name], seed + 1)[:best]
                for m in every
            }
        final = [
            ("final", name, strength, seed)
            for name, grid in grids.items()
            for strength in grid
            for seed in range(setting.seeds)
        ]
        train(pool, final[::-1], results)
    shutil.rmtree(kept)
    timed = {row["method"] for row in results.rows if row["kind"] == "step"}
    untimed = [name for name in only or bench.methods if name not in timed]
    # Where there is no compiler, compiled methods stay untimed.
    if any(not bench.methods[name].compiled for name in untimed):
        results.append(*step_rows(setting, data, untimed))


def _step_times(*arguments: Any) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = _BENCH[0].step_times(*arguments)
    return times


def step_rows(setting: Setting, data: Dataset, names: list[str]) -> list[Row]:
    """Times of a step of each method, in processes like those that train."""
    rounds = math.ceil(setting.timing_rounds / TIMERS)
    compiled = setting.timing_rounds > 1
    found = []
    for _ in tqdm(range(0, setting.timing_rounds, rounds), unit="process", desc="timing steps"):
        with processes(1, Bench, setting, data) as pool:
            found.append(pool.submit(_step_times, names, rounds, compiled).result())
    rows = []
    for name in names:
        pairs = [pair for times in found for pair in times.get(name, ())]
        if pairs:
            rows.append(
                {
                    "kind": "step", "method": name, "rounds": len(pairs),
                    "seconds": statistics.median(own for own, _ in pairs),
                    "plain_steps": statistics.median(own / plain for own, plain in pairs),
                    "commit": PROVENANCE["commit"],
                }
            )  # fmt: skip
    return rows


def unfinished(rows: list[Row], method: Method, seeds: int) -> tuple[int, list[int]]:
    """How many searches, and the finals of which seeds, a method lacks; none after it failed."""
    strengths, searches = len(method.grid), 0
    for seed, most in enumerate((strengths, FINALISTS)):
        strengths = min(strengths, most)
        key = ("search", method.name, seed)
        found = [r for r in rows if (r["kind"], r["method"], r.get("seed")) == key]
        searches += strengths - len(found)
        strengths -= sum("failed" in r for r in found)
    done = {r["seed"] for r in rows if (r["kind"], r["method"]) == ("final", method.name)}
    return searches, [seed for seed in range(seeds) if strengths and seed not in done]


def announce(untrained: Bench, every: list[Method], results: Results, workers: int) -> None:
    """Say how much is left to do, from a few timed steps; compiled methods' are left out."""
    setting = untrained.setting
    lacking = {m.name: unfinished(results.rows, m, setting.seeds) for m in every}
    searches = {name: count for name, (count, _) in lacking.items()}
    finals = {name: len(seeds) for name, (_, seeds) in lacking.items()}
    # The search's networks, of the first two seeds, are not trained again.
    unseen = {name: sum(seed > 1 for seed in seeds) for name, (_, seeds) in lacking.items()}
    timed = {row["method"] for row in results.rows if row["kind"] == "step"}
    times = untrained.step_times([m.name for m in every], 1, compiled=False)
    plain = times["no penalty"][0][0] / setting.batch_size
    attacks = setting.pgd_steps * setting.test * len(setting.eps) * setting.restarts
    attacks += setting.apgd_steps * setting.apgd_images
    evaluations = plain * sum(finals.values()) * attacks
    evaluations += plain * sum(searches.values()) * setting.search_steps * setting.validation
    trainings = timing = 0.0
    for name, ((own, beside),) in times.items():
        steps = untrained.epochs(name) * setting.steps_per_epoch
        trainings += own * steps * (searches[name] + unseen[name])
        if name not in timed:
            timing += (own + beside) * SPAN * setting.timing_rounds
    minutes = ((trainings + evaluations) / workers + timing) / 60
    print(
        f"{sum(searches.values())} trainings to search strengths, {sum(unseen.values())} more to "
        f"measure {sum(finals.values())} networks, "
        f"in {workers} process(es): about {minutes:.0f} minutes, if this machine does nothing else"
    )


def main() -> None:
    """Run what is left of it, draw the pictures, check the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("set", choices=SETTINGS)
    parser.add_argument("--data", required=True, help="as `robustkern train` takes it")
    parser.add_argument("--note", default="", help="what to say of the data beside the figures")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", nargs="+", default=[], help="methods; then there is no picture")
    parser.add_argument("--smoke", action="store_true", help="a few images, one strength")
    parser.add_argument("--output", type=Path, help="the JSON file; pictures lie beside it")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.set]
    if arguments.smoke:
        setting = smoke(setting)
    names = [method.name for method in methods(setting)]
    strange = [name for name in arguments.only if name not in names]
    if strange or arguments.workers < 1:
        parser.error(
            f"--only takes {', '.join(names)}, and --workers at least 1, "
            f"got {', '.join(strange)} and {arguments.workers}"
        )
    for module in ("pyautoattack", "matplotlib"):  # found missing now, not at the end
        importlib.import_module(module)
    default = Path(__file__).parent / "results" / f"frontier-{arguments.set}.json"
    path = arguments.output or default.with_stem(default.stem + "-smoke" * arguments.smoke)
    try:
        data = load(arguments.data)
        check_enough(data, setting)
        results = Results(path, setting, arguments.note)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    only = list(dict.fromkeys(["no penalty", *arguments.only])) if arguments.only else []
    begun = time.perf_counter()
    run(setting, data, results, arguments.workers, only)
    content = json.loads(path.read_text())
    lines = summary(content)
    width = max(len(line.method) for line in lines)
    for line in lines:
        print(
            f"{line.method:<{width}}{line.strength:>8g}{line.cost:>9.0f}{line.clean.mean:>8.3f}"
            f"{line.main:>8.3f}{'  on the edge' if line.on_edge else ''}"
        )
    if not only:
        for text, holds in claims(content):
            print(f"{'yes' if holds else 'no'}: {text}")
        draw(content, path)
        draw_steps(content, path)
    print(f"{time.perf_counter() - begun:.0f} s; written: {path}")


if __name__ == "__main__":
    main()
