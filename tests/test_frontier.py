"""bench/frontier.py, in small: it goes all the way, goes on where it was, and draws the edge."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from robustkern.evaluation import wilson_interval

pytest.importorskip("matplotlib")
pytest.importorskip("pyautoattack")

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))


def frontier(data, output, *more):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "frontier.py"), "mnist", "--smoke", "--workers", "1",
         "--data", str(data), "--output", str(output), *more],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    arrays = {}
    for split, samples in (("train", 160), ("test", 32)):
        labels = np.arange(samples) % 10
        images = generator.integers(0, 64, (samples, 28, 28))
        images[np.arange(samples), 2 * labels, :] = 255  # a row each: easy to learn
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def output(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "frontier.json"
    done = frontier(data, path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_the_search_is_the_same_for_every_method(output):
    rows = json.loads(output.read_text())["rows"]
    for name in {row["method"] for row in rows}:
        seeds = [r["seed"] for r in rows if (r["kind"], r["method"]) == ("search", name)]
        assert sorted(seeds) == [0, 1]  # with one strength each


def test_every_method_is_trained_timed_and_drawn(output):
    from frontier import smoke
    from frontier_methods import MNIST, methods
    from frontier_picture import claims, summary

    content = json.loads(output.read_text())
    expected = {method.name for method in methods(smoke(MNIST)) if not method.compiled}
    for kind in ("search", "final", "step"):
        assert {row["method"] for row in content["rows"] if row["kind"] == kind} == expected
    lines = summary(content)
    assert {line.method for line in lines} == expected
    assert any(line.on_edge for line in lines)
    assert len(claims(content)) == 4
    for name in ("frontier.png", "frontier.svg", "frontier-steps.png", "frontier-steps.svg"):
        assert (output.parent / name).stat().st_size


def test_a_killed_run_repeats_nothing(tmp_path, monkeypatch):
    import frontier
    from frontier_methods import MNIST

    asked = []

    def trained(*task):
        asked.append(task)
        return dict(zip(("kind", "method", "strength", "seed"), task, strict=True))

    monkeypatch.setattr(frontier, "_trained", trained)
    tasks = [("search", "GN", strength, 0) for strength in (1.0, 2.0, 3.0)]
    for part in (tasks[:2], tasks, tasks):
        with ThreadPoolExecutor(1) as pool:
            frontier.train(pool, part, frontier.Results(tmp_path / "f.json", MNIST, ""))
    assert asked == tasks
    rows = frontier.Results(tmp_path / "f.json", MNIST, "").rows
    assert sorted(row["strength"] for row in rows) == [1.0, 2.0, 3.0]


def test_workers_end_with_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("""
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
sys.path.append(sys.argv[1])
from frontier import begin
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin, (dict,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
""")
    run = subprocess.Popen(
        [sys.executable, str(script), str(ROOT / "bench")], stdout=subprocess.PIPE, text=True
    )
    with run:
        assert int(run.stdout.readline()) != run.pid
        run.kill()
        run.communicate(timeout=60)  # the worker has the other end too, until it ends


def test_an_error_does_not_wait_for_the_trainings_behind_it(tmp_path, monkeypatch):
    import frontier
    from frontier_methods import MNIST

    begun = []

    def trained(*task):
        begun.append(task)
        time.sleep(0.2)
        raise RuntimeError("no memory")

    monkeypatch.setattr(frontier, "_trained", trained)
    tasks = [("search", "GN", float(strength), 0) for strength in range(9)]
    results = frontier.Results(tmp_path / "f.json", MNIST, "")
    with pytest.raises(RuntimeError, match="no memory"), ThreadPoolExecutor(1) as pool:
        frontier.train(pool, tasks, results)
    assert len(begun) < len(tasks)


def test_results_of_another_setting_are_refused(tmp_path):
    from frontier import Results
    from frontier_methods import MNIST

    path = tmp_path / "f.json"
    Results(path, dataclasses.replace(MNIST, epochs=7), "").append({"kind": "step"})
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"f\.json must be of the same setting .* got epochs 7 for 3"
    ):
        Results(path, MNIST, "")
    with pytest.raises(ValueError, match="of the same note"):
        Results(path, dataclasses.replace(MNIST, epochs=7), "a copy")
    assert path.read_bytes() == before


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    from frontier import main

    monkeypatch.setattr("sys.argv", ["frontier.py", "mnist", "--data", str(tmp_path / "none.npz")])
    with pytest.raises(SystemExit):
        main()
    message = capsys.readouterr().err
    assert "none.npz does not exist; give an .npz file with x_train, y_train, x_test" in message
    assert "or a name: digits, mnist" in message


@pytest.mark.parametrize("wrong", ["few", "damaged"])
def test_data_and_results_that_cannot_be_used_are_named(wrong, data, tmp_path, monkeypatch, capsys):
    from frontier import main

    path, smoke = tmp_path / "f.json", ["--smoke"] * (wrong == "damaged")
    path.write_text("[1")
    arguments = ["mnist", "--data", str(data), "--output", str(path), *smoke]
    monkeypatch.setattr("sys.argv", ["frontier.py", *arguments])
    with pytest.raises(SystemExit):
        main()
    message = capsys.readouterr().err
    if wrong == "few":
        assert "at least 6000 training and 600 test images, got 160 and 32" in message
    else:
        assert "f.json must hold results, got JSONDecodeError" in message


def test_the_learning_rate_is_the_settings():
    import torch
    from frontier import Bench
    from frontier_methods import MNIST

    from robustkern.training.data import Dataset

    setting = dataclasses.replace(MNIST, train=64, validation=16, test=16, lr=0.0, clean_epochs=0)
    x, y = torch.rand(80, 1, 8, 8), torch.arange(80) % 10
    bench = Bench(setting, Dataset("random", x, y, x, y))
    run = bench.trainer(bench.methods["no penalty"], 0.0, 0)
    before = copy.deepcopy(run.model.state_dict())
    run.run_epoch()
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())


def searched(method, strength, clean, pgd, seed=0):
    return {
        "kind": "search",
        "method": method,
        "strength": strength,
        "seed": seed,
        "clean": clean,
        "pgd": pgd,
    }


def test_every_method_is_searched_alike(tmp_path, monkeypatch):
    import frontier
    import torch
    from frontier_methods import MNIST

    from robustkern.training.data import Dataset

    asked = []

    stale = tmp_path / "f-networks" / "gn-1-0.pt"
    stale.parent.mkdir()
    stale.touch()

    def trained(kind, method, strength, seed):
        assert not stale.exists()
        asked.append((kind, method, strength, seed))
        row = {"kind": kind, "method": method, "strength": strength, "seed": seed}
        if method == "LLR" and seed == 1:
            return {**row, "failed": "the loss"}
        return {**row, "clean": 0.9, "pgd": strength if seed == 0 else -strength}

    monkeypatch.setattr(frontier, "_trained", trained)
    monkeypatch.setattr(frontier, "announce", lambda *arguments: None)
    monkeypatch.setattr(
        frontier, "processes", lambda workers, *arguments: ThreadPoolExecutor(workers)
    )
    timed = []
    monkeypatch.setattr(frontier, "step_rows", lambda s, d, names: timed.extend(names) or [])
    x, y = torch.rand(6_600, 1, 2, 2), torch.arange(6_600) % 10
    results = frontier.Results(tmp_path / "f.json", MNIST, "")
    frontier.run(MNIST, Dataset("r", x, y, x, y), results, 1, ["no penalty", "GN", "LLR"])
    assert timed == ["no penalty", "GN", "LLR"]
    gn = [(kind, strength, seed) for kind, method, strength, seed in asked if method == "GN"]
    grid = MNIST.grids["gn"]
    best, second = grid[-1], grid[-2]
    assert gn[:4] == [("search", strength, 0) for strength in reversed(grid)]
    assert gn[4:6] == [("search", second, 1), ("search", best, 1)]
    # Of equal means, the first in the ranking.
    assert gn[6:] == [("final", best, seed) for seed in (2, 1, 0)]
    assert not [task for task in asked if task[:2] == ("final", "LLR")]
    assert not list(tmp_path.glob("*-networks"))


def test_what_the_search_has_trained_is_not_trained_again(tmp_path, monkeypatch):
    import torch
    from frontier import Bench
    from frontier_methods import CIFAR10

    from robustkern.training.data import Dataset
    from robustkern.training.trainer import Trainer

    # With batch norm and random starts: there is more to keep than parameters.
    setting = dataclasses.replace(
        CIFAR10, train=32, validation=16, test=16, batch_size=16, clean_epochs=0, epochs=1
    )
    x, y = torch.rand(48, 3, 8, 8), torch.arange(48) % 10
    data = Dataset("random", x, y, x, y)
    task = ("FGSM-RS", 0.01)
    first, cost = Bench(setting, data, tmp_path).fine_tuned(*task, 1)
    alone, _ = Bench(setting, data).fine_tuned(*task, 1)
    other, _ = Bench(setting, data).fine_tuned(*task, 0)
    monkeypatch.setattr(Trainer, "run_epoch", lambda self: pytest.fail("trained again"))
    again, same_cost = Bench(setting, data, tmp_path).fine_tuned(*task, 1)
    assert same_cost == cost
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        assert torch.equal(value, alone.state_dict()[key])
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_what_is_left_is_announced(tmp_path, monkeypatch, capsys):
    import frontier
    import torch
    from frontier_methods import MNIST

    from robustkern.training.data import Dataset

    x, y = torch.rand(6_600, 1, 2, 2), torch.arange(6_600) % 10
    bench = frontier.Bench(MNIST, Dataset("random", x, y, x, y))
    every = [bench.methods["no penalty"], bench.methods["GN"]]

    def step_times(names, rounds, compiled):
        assert names == ["no penalty", "GN"]
        return {"no penalty": [(1.0, 1.0)], "GN": [(2.0, 1.0)]}

    monkeypatch.setattr(bench, "step_times", step_times)
    results = frontier.Results(tmp_path / "f.json", MNIST, "")

    def rows(kind, method, *seeds):
        return [{"kind": kind, "method": method, "seed": seed} for seed in seeds]

    def announced():
        frontier.announce(bench, every, results, 1)
        return re.findall(r"\d+", capsys.readouterr().out)

    assert announced()[:4] == ["8", "2", "6", "1"]
    results.append(*rows("search", "GN", 0, 0, 0, 0, 1, 1), *rows("final", "GN", 2, 1))
    # The network of GN that is left to measure is one of the search.
    assert announced()[:3] == ["2", "1", "4"]
    results.append(*rows("search", "no penalty", 0, 1), *rows("final", "no penalty", 2, 1, 0))
    results.append(*rows("final", "GN", 0))
    # Of each method a step and a plain one, in rounds, are left.
    seconds = (1 + 1 + 2 + 1) * frontier.SPAN * MNIST.timing_rounds
    assert announced() == ["0", "0", "0", "1", f"{seconds / 60:.0f}"]
    results.append({"kind": "step", "method": "no penalty"}, {"kind": "step", "method": "GN"})
    assert announced()[-1] == "0"


def test_of_what_failed_nothing_is_left():
    from frontier import unfinished
    from frontier_methods import Method

    method = Method("GN", "penalty", grid=(1.0, 2.0, 3.0))

    def rows(seed, *failed):
        row = {"kind": "search", "method": "GN", "seed": seed}
        return [{**row, "failed": "the loss"} if each else row for each in failed]

    first = rows(0, True, False, True)
    assert unfinished(first[:2], method, 3) == (3, [0, 1, 2])
    assert unfinished(first, method, 3) == (1, [0, 1, 2])
    assert unfinished(rows(0, True, True, True), method, 3) == (0, [])
    assert unfinished([*first, *rows(1, True)], method, 3) == (0, [])
    measured = {"kind": "final", "method": "GN", "seed": 1}
    assert unfinished([*first, *rows(1, False), measured], method, 3) == (0, [0, 2])


def test_a_step_is_timed_beside_a_plain_one(monkeypatch):
    import frontier
    import torch
    from frontier_methods import MNIST

    from robustkern.training.data import Dataset

    setting = dataclasses.replace(
        MNIST, train=16, validation=16, test=16, batch_size=16, clean_epochs=0
    )
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    bench = frontier.Bench(setting, Dataset("random", x, y, x, y))
    timed = []

    def steps(run, count):
        timed.append((run.penalty.penalty is not None, count))
        return float(count * len(timed))

    monkeypatch.setattr(bench, "_steps", steps)
    times = bench.step_times(["GN"], 2, compiled=False)
    warm, span = [(False, 1), (True, 1)], [(False, frontier.SPAN), (True, frontier.SPAN)]
    assert timed == warm + 2 * span
    assert times == {"GN": [(4.0, 3.0), (6.0, 5.0)]}
    timed.clear()
    assert bench.step_times(["no penalty"], 1, compiled=False) == {"no penalty": [(2.0, 2.0)]}


def test_steps_are_timed_in_several_processes(monkeypatch):
    import frontier
    from frontier_methods import MNIST

    measured = iter(
        [
            {
                "no penalty": [(1.0, 1.0), (1.0, 1.0)],
                "CURE": [(4.0, 1.0), (5.0, 1.0)],
                "CURE, compiled": [(3.0, 1.0), (3.0, 1.0)],
            },
            {"no penalty": [(2.0, 2.0), (2.0, 2.0)], "CURE": [(8.0, 2.0), (9.0, 2.0)]},
        ]
    )
    asked = []
    monkeypatch.setattr(
        frontier, "_step_times", lambda *task: (asked.append(task), next(measured))[1]
    )
    monkeypatch.setattr(frontier, "processes", lambda workers, *more: ThreadPoolExecutor(workers))
    monkeypatch.setattr(frontier, "TIMERS", 2)
    setting = dataclasses.replace(MNIST, timing_rounds=3)
    names = ["no penalty", "CURE", "CURE, compiled", "GN"]
    rows = {row["method"]: row for row in frontier.step_rows(setting, None, names)}
    assert asked == [(names, 2, True)] * 2
    assert list(rows) == names[:3]
    assert rows["CURE"]["plain_steps"] == (4.0 + 4.5) / 2  # of 4, 5, 4 and 4.5
    assert rows["CURE"]["seconds"] == (5.0 + 8.0) / 2
    assert [row["rounds"] for row in rows.values()] == [4, 4, 2]


def test_the_strength_is_the_most_robust_of_those_that_keep_clean_accuracy():
    from frontier import ranking
    from frontier_methods import Method

    rows = [
        searched("no penalty", 0.0, 0.98, 0.1),
        searched("GN", 1.0, 0.98, 0.3),
        searched("GN", 2.0, 0.97, 0.5),
        searched("GN", 3.0, 0.90, 0.7),
        searched("GN", 4.0, 0.91, 0.6),
    ]
    gn = Method("GN", "penalty")
    assert ranking(rows, gn, 0.02, (1.0, 2.0, 3.0, 4.0), 1) == (2.0, 1.0, 4.0, 3.0)
    rows[2]["failed"] = "the loss"
    assert ranking(rows, gn, 0.02, (1.0, 2.0), 1) == (1.0,)
    assert ranking(rows, gn, 0.02, (2.0,), 1) == ()


def test_the_best_strengths_are_searched_on_a_second_seed():
    from frontier import ranking
    from frontier_methods import Method

    rows = [searched("no penalty", 0.0, 0.98, 0.1, seed) for seed in (0, 1)]
    rows += [searched("GN", 1.0, 0.98, 0.3), searched("GN", 2.0, 0.97, 0.4)]
    rows += [searched("GN", 1.0, 0.98, 0.5, seed=1), searched("GN", 2.0, 0.97, 0.3, seed=1)]
    assert ranking(rows, Method("GN", "penalty"), 0.02, (1.0, 2.0), 2) == (1.0, 2.0)
    rows[-2]["clean"] = 0.92  # 0.95 is the mean
    assert ranking(rows, Method("GN", "penalty"), 0.02, (1.0, 2.0), 2) == (2.0, 1.0)
    rows[-2]["failed"] = "the loss"
    assert ranking(rows, Method("GN", "penalty"), 0.02, (1.0, 2.0), 2) == (2.0,)


def content(*measured):
    """Results of one seed on 100 images, from (method, family, naive of, step, right)."""
    rows = []
    for method, family, naive_of, step, right in measured:
        rows.append(
            {"kind": "final", "method": method, "family": family, "naive_of": naive_of, "seed": 0,
             "strength": 1.0, "epochs": 1, "passes": {"forward": 1.0, "backward": 1.0}, "right": 98,
             "pgd_right": [right], "apgd_right": right // 2}
        )  # fmt: skip
        rows.append({"kind": "step", "method": method, "plain_steps": step})
    setting = {
        "set": "mnist", "eps": [0.1], "main_eps": 0.1, "epochs": 1, "train": 64, "batch_size": 64,
        "seeds": 1, "test": 100, "apgd_images": 50, "pgd_steps": 20,
    }  # fmt: skip
    return {"setting": setting, "note": "", "rows": rows}


def test_the_edge_is_what_nothing_dominates():
    from frontier_picture import summary

    found = summary(
        content(
            ("PGD-7", "attack", None, 7.0, 90),
            ("CURE", "penalty", None, 4.0, 85),
            ("CURE, authors' structure", "naive", "CURE", 8.0, 80),
            ("no penalty", "plain", None, 1.0, 20),
        )
    )
    assert [(line.method, line.on_edge) for line in found] == [
        ("no penalty", True), ("CURE", True), ("PGD-7", True), ("CURE, authors' structure", False),
    ]  # fmt: skip


def test_a_method_whose_step_was_not_timed_has_no_line():
    from frontier_picture import summary

    killed = content(("CURE", "penalty", None, 4.0, 86), ("GN", "penalty", None, 2.0, 50))
    del killed["rows"][-1]
    assert [line.method for line in summary(killed)] == ["CURE"]


def test_every_share_has_the_interval_of_its_images():
    from frontier_picture import summary

    (found,) = summary(content(("CURE", "penalty", None, 4.0, 86)))
    assert found.clean == (0.98, *wilson_interval(98, 100))
    assert found.pgd == ((0.86, *wilson_interval(86, 100)),)
    assert found.apgd == (0.86, *wilson_interval(43, 50))


def test_no_name_is_cut_off_the_picture(tmp_path):
    from frontier_picture import draw
    from matplotlib.image import imread

    widths = []
    for name in ("CURE", "CURE" * 30):
        draw(content((name, "penalty", None, 4.0, 86)), tmp_path / "frontier.json")
        widths.append(imread(tmp_path / "frontier.png").shape[1])
    assert widths[1] > 1.3 * widths[0]


def test_numbers_in_the_picture_do_not_lie_on_each_other(tmp_path, monkeypatch):
    import frontier_picture
    from matplotlib.text import Text

    figures = []
    monkeypatch.setattr(frontier_picture, "save", lambda figure, path: figures.append(figure))
    near = [(f"CURE {i}", "penalty", None, 4 + 0.02 * i, 80 + i % 2) for i in range(8)]
    far = [("no penalty", "plain", None, 1.0, 10), ("PGD-7", "attack", None, 8.0, 90)]
    frontier_picture.draw(content(*near, *far), tmp_path / "frontier.json")
    (figure,) = figures
    figure.draw_without_rendering()
    # Of the text alone, without the line to its point.
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_only_what_left_nothing_to_measure_is_said_to_have_failed():
    from frontier_picture import diverged

    def row(method, kind, seed, failed):
        return {"method": method, "kind": kind, "seed": seed, **({"failed": "x"} if failed else {})}

    rows = [row("GN", "search", 0, True), row("GN", "search", 0, False)]
    rows += [row("GN", "final", seed, False) for seed in range(3)]
    rows += [row("LLR", "search", 0, False), row("LLR", "search", 1, True)]
    rows += [row("SGR", "final", 0, False), row("SGR", "final", 1, True)]
    rows.append({"method": "GN", "kind": "step"})
    assert diverged({"rows": rows}) == ["LLR", "SGR"]


def test_the_table_has_the_intervals():
    from readme import frontier_table

    table = frontier_table(content(("CURE", "penalty", None, 4.0, 86)))
    assert "| 98.0% (93.0-99.4) | 86.0% (77.9-91.5) | 86.0% (73.8-93.0) |" in table


@pytest.mark.parametrize(
    ("cure", "expected"),
    [((3.0, 89), [True, True, True, True]), ((6.0, 88), [False, False, False, True]),
     ((9.0, 70), [False, False, False, False]), ((3.0, 70), [False, False, False, True])],
)  # fmt: skip
def test_claims_are_judged_by_the_figures(cure, expected):
    from frontier_picture import claims

    found = claims(
        content(
            ("PGD-7", "attack", None, 7.0, 90),
            ("CURE", "penalty", None, *cure),
            ("CURE, authors' structure", "naive", "CURE", 8.0, 80),
        )
    )
    assert [holds for _, holds in found] == expected


def test_what_failed_holds_no_claim():
    from frontier_picture import claims

    found = content(
        ("CURE", "penalty", None, 3.0, 90),
        ("PGD-7", "attack", None, 7.0, 90),
        ("CURE, authors' structure", "naive", "CURE", 8.0, 80),
    )
    for row in found["rows"][:4]:
        row["failed"] = "the loss"
    assert claims(found) == [
        ("PGD-7 has no figures to compare with", False),
        ("CURE has no figures to compare", False),
    ]


def test_one_point_less_is_within_one_point():
    from frontier_picture import claims

    rights = (13, 12)  # of 100: in floats, 0.13 - 0.01 is more than 0.12
    goal, ours = (
        content(("PGD-7", "attack", None, 7.0, rights[0])),
        content(("CURE", "penalty", None, 3.0, rights[1])),
    )
    goal["rows"] += ours["rows"]
    ((text, holds),) = claims(goal)
    assert "0.429 of its cost" in text
    assert holds


def test_strengths_at_an_end_of_the_grid_are_named():
    from frontier_picture import at_an_end

    found = content(("GN", "penalty", None, 2.0, 80), ("CURE", "penalty", None, 4.0, 86))
    for method, grid in (("GN", (1.0, 2.0, 3.0)), ("CURE", (0.5, 1.0, 2.0)), ("LLR", (1.0, 2.0))):
        found["rows"] += [{"kind": "search", "method": method, "strength": s} for s in grid]
    found["rows"] += content(("no penalty", "plain", None, 1.0, 10))["rows"]
    twice = {"kind": "search", "method": "no penalty", "strength": 1.0}
    found["rows"] += [{**twice, "seed": seed} for seed in (0, 1)]
    assert at_an_end(found) == ["GN (1)"]


def test_more_seeds_are_no_more_test_images():
    from frontier_picture import summary

    once, thrice = (content(("PGD-7", "attack", None, 7.0, 90)) for _ in range(2))
    thrice["setting"]["seeds"] = 3
    thrice["rows"] += [{**thrice["rows"][0], "seed": seed} for seed in (1, 2)]
    assert summary(thrice) == summary(once)
