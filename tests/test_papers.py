"""`bench/papers.py`, reduced, on a few made-up images."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from robustkern import __version__ as VERSION
from robustkern.training.recipes import RECIPES
from robustkern.training.schedules import Schedule

BENCH = Path(__file__).resolve().parent.parent / "bench"
MARK = " (reduced, made-up images)"


@pytest.fixture
def papers(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import papers

    return papers


@pytest.fixture
def recipe_runs(papers):
    import recipe_runs

    return recipe_runs


@pytest.fixture
def call(papers, tmp_path, monkeypatch, capsys):
    """Run the command; its exit status, what it printed, and the rows of its results."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (30, 3, 8, 8), dtype=np.uint8), np.arange(30) % 5
    np.savez(tmp_path / "images.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    results = tmp_path / "results.json"

    def run(*arguments, data="images.npz"):
        places = ["--data", str(tmp_path / data), "--output", str(results)]
        runs = ["--runs", str(tmp_path / "runs"), "--reduced", "--note", "made-up images"]
        monkeypatch.setattr(sys, "argv", ["papers.py", *arguments, *places, *runs])
        status = papers.main()
        printed = capsys.readouterr()
        rows = json.loads(results.read_text())["rows"] if results.exists() else []
        return status, printed.out + printed.err, rows

    return run


def test_a_table_is_made_in_pieces_and_nothing_twice(call, tmp_path):
    command = ["cure", "--only", "cure-resnet18-cifar10"]
    status, printed, rows = call(*command, "--seconds", "0")
    assert (status, rows) == (1, [])
    assert "%" not in printed
    assert "94.9" in printed
    assert "not done" in printed

    status, printed, rows = call(*command)
    assert status == 0
    assert printed.count("\nepoch ") + 1 == 7 + 5
    assert [row["recipe"] for row in rows] == ["clean-resnet18-cifar10", "cure-resnet18-cifar10"]
    lines = [line for line in printed.splitlines() if line.startswith(("| clean", "| cure"))]
    for row, line in zip(rows, lines, strict=True):
        assert f"{100 * row['clean']:.1f}%{MARK}" in line
        assert f"{100 * row['pgd20-8']:.1f}%{MARK}" in line
        assert f"{100 * row['pgd20-2']:.1f}%{MARK}" in line
        assert line.count("%") == line.count(f"%{MARK}") == 3
    assert [row["forward_passes"] for row in rows] == [7, 20]
    assert str(tmp_path) not in json.dumps(rows)

    # As if it was killed between the training and the attack.
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "rows": rows[:1]}))
    status, printed, again = call(*command)
    assert (status, again) == (0, rows)
    assert "\nepoch " not in "\n" + printed

    status, printed, again = call(*command, "--seconds", "0")
    assert (status, again) == (0, rows)
    assert "written" not in printed


def test_every_attack_of_a_table_is_made(call, recipe_runs, monkeypatch):
    monkeypatch.setattr(recipe_runs, "autoattack", lambda model, inputs, targets, eps: inputs)
    monkeypatch.setattr(
        recipe_runs, "carlini_wagner", lambda model, inputs, targets, **_: 1 - inputs
    )
    command = ["tv", "--only", "tv-resnext34-cifar10"]
    status, printed, (row,) = call(*command)
    assert status == 0
    assert {"pgd20-8", "distance"} <= set(row)
    assert row["distance_images"] == 10
    assert f"{MARK}, 10 images" in printed
    status, printed, (row,) = call(*command, "--autoattack", "4")
    assert status == 0
    assert row["autoattack_images"] == 4
    assert f"{100 * row['autoattack-8']:.1f}%{MARK}, 4 images" in printed
    for images in ("50", "60"):  # more than there are
        _, printed, (row,) = call(*command, "--autoattack", images)
        assert row["autoattack_images"] == 10
    assert "written" not in printed


def test_the_authors_structure_is_trained_from_the_clean_network(call):
    status, printed, rows = call("cure", "--only", "authors-cure-resnet18-cifar10")
    assert status == 0
    clean, authors = rows
    assert authors["options"]["penalties"] == [
        {"name": "cure", "weight": "4", "h": "0:0,1.25:1.5", "norm": True}
    ]
    assert f" 1.00{MARK} |" in printed  # in its own time
    assert (authors["forward_passes"], clean["forward_passes"]) == (5 * 5, 7)


def test_a_row_that_is_not_compiled_says_so(papers, recipe_runs):
    import paper_tables

    row = {"seconds": 3.0, "forward_passes": 5.0, "backward_passes": 6.0}
    for compiled, text in ((True, "3 s"), (False, "3 s, not compiled")):
        setting = recipe_runs.Setting("", reduced=False, fast=True, note="")
        shown = paper_tables.training({**row, "options": {"compile": compiled}}, setting)
        assert shown == [text, "5, 6"]


def test_a_table_without_the_authors_structure_has_no_column_for_it(papers, recipe_runs):
    import paper_tables

    setting = recipe_runs.Setting("", reduced=False, fast=False, note="")
    for name, there in (("cure", True), ("cure-svhn", False)):
        shown = paper_tables.shown_table(papers.TABLES[name], list(RECIPES), {}, setting)
        assert ("in the time of the authors' structure" in shown) == there
        assert "in the time of PGD-7" in shown


def test_a_reduced_run_names_the_processor_it_ran_on(papers, recipe_runs):
    import paper_tables
    import papers_page

    provenance = {"machine": "a processor", "gpu": "a GPU", "threads": 2, "torch": "", "python": ""}
    row = {"command": "python", "commit": "0"}
    for reduced, where in ((True, "a processor"), (False, "a GPU")):
        setting = recipe_runs.Setting("", reduced=reduced, fast=False, note="")
        table = paper_tables.TABLES["cure"]
        text = papers_page.measured(table, provenance, setting, {"clean-resnet18-svhn": row})
        assert f"\n\n{where}, 2 threads" in text


def test_times_are_in_those_of_the_same_network(papers):
    import paper_tables

    seconds = {
        "clean-resnet18-cifar10": 10.0,
        "authors-cure-resnet18-cifar10": 80.0,
        "fgsm-rs-cure-resnet18-cifar10": 20.0,
        "pgd-resnet18-cifar10": 60.0,
        "cure-wideresnet28x10-cifar10": 7.0,
    }
    rows = {name: {"seconds": value} for name, value in seconds.items()}

    def ratios(name):
        found = [paper_tables.ratio(name, "authors-cure", rows, whole=False)]
        return [*found, paper_tables.ratio(name, "pgd", rows, whole=True)]

    nan = pytest.approx(float("nan"), nan_ok=True)
    assert ratios("fgsm-rs-cure-resnet18-cifar10") == [0.25, 0.5]
    assert ratios("pgd-resnet18-cifar10") == [nan, 1]
    assert ratios("anchored-cure-resnet18-cifar10") == [nan, nan]
    assert ratios("cure-wideresnet28x10-cifar10") == [nan, nan]


def test_a_training_that_fails_has_its_row(call, recipe_runs, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("the loss is no number")

    monkeypatch.setattr(recipe_runs, "train", fail)
    command = ["cure", "--only", "clean-resnet18-cifar10"]
    for _ in range(2):
        status, printed, (row,) = call(*command)
        assert (status, row["error"]) == (0, "the loss is no number")
        assert "the loss is no number" in printed


def test_nothing_starts_from_a_training_that_failed(call, recipe_runs, monkeypatch):
    train = recipe_runs.train

    def fail_after_an_epoch(options, **_):
        train(options, seconds=0)
        raise FloatingPointError("the loss is no number")

    monkeypatch.setattr(recipe_runs, "train", fail_after_an_epoch)
    status, _, rows = call("cure", "--only", "cure-resnet18-cifar10")
    assert status == 0
    errors = ["the loss is no number", "clean-resnet18-cifar10 failed"]
    assert [row["error"] for row in rows] == errors


def test_too_little_time_for_any_epoch_is_named(call, recipe_runs, monkeypatch):
    train = recipe_runs.train
    monkeypatch.setattr(recipe_runs, "train", lambda *a, **k: train(*a, **{**k, "seconds": 0}))
    monkeypatch.setattr(recipe_runs.Runs, "left", lambda runs: 1.0)
    status, printed, rows = call("cure", "--only", "clean-resnet18-cifar10", "--seconds", "0.0001")
    assert (status, rows) == (2, [])
    assert "--seconds must leave time for an epoch of clean-resnet18-cifar10, which" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "none.npz"}, "load: data file .* does not exist; give an .npz file with .*"),
        (
            {"only": "tv-resnext34-cifar10"},
            "--only must name recipes of the table: .*, authors-cure-resnet18-cifar10, .*, "
            "got tv-resnext34-cifar10",
        ),
        ({"autoattack": "-1"}, "--autoattack must not be negative, got -1"),
    ],
)
def test_errors_are_named(call, arguments, message):
    only = arguments.get("only", "clean-resnet18-cifar10")
    images, data = arguments.get("autoattack", "0"), arguments.get("data", "images.npz")
    status, printed, rows = call("cure", "--only", only, "--autoattack", images, data=data)
    assert (status, rows) == (2, [])
    assert re.fullmatch(f"bench/papers.py: error: {message}\n", printed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"provenance": {"robustkern": "0.0.1"}, "rows": []}',
            "must be of this version of robustkern, .*, got 0.0.1; move it away, or name another",
        ),
        ('{"provenance": {}, "rows": []}', "must be of this version .*, got an older one"),
        (
            json.dumps({"provenance": {"robustkern": VERSION, "torch": "1.0"}, "rows": []}),
            "must be of this version of torch, .*, got 1.0; move it away",
        ),
        ("[1, 2", "must be one that this wrote"),
        ("[1, 2]", "must be one that this wrote"),
    ],
)
def test_results_of_another_version_are_refused(recipe_runs, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^results file {re.escape(str(path))} {message}"):
        recipe_runs.read_rows(path)


def test_rows_of_a_recipe_that_has_changed_are_refused(call, tmp_path):
    command = ["cure", "--only", "clean-resnet18-cifar10"]
    call(*command)
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    results["rows"][0]["options"]["train_size"] = 1200
    path.write_text(json.dumps(results))
    status, printed, _ = call(*command)
    assert status == 2
    assert "train_size of clean-resnet18-cifar10 must be 2000, as it is trained now, got 1200" in (
        printed
    )


def test_every_recipe_of_a_table_exists_and_has_a_narrow_network(papers, recipe_runs):
    import narrow

    named = {recipe for shown in papers.TABLES.values() for recipe in shown.rows}
    assert named - set(recipe_runs.AUTHORS) == set(RECIPES)
    for recipe in RECIPES.values():
        network = getattr(narrow, recipe.options["model"])((3, 32, 32), 10)
        assert sum(parameter.numel() for parameter in network.parameters()) < 200_000


def test_the_page_has_a_table_for_each_setting(call, papers, tmp_path, monkeypatch):
    import papers_page

    monkeypatch.setattr(papers_page, "RESULTS", tmp_path)
    section = papers_page.SECTIONS["papers_cure"]
    assert section() == "Not measured yet.\n"
    _, _, (row,) = call("cure", "--only", "clean-resnet18-cifar10")
    (tmp_path / "results.json").rename(tmp_path / "papers-cpu.json")
    text = section()
    assert text.count(papers.TABLES["cure"].title) == 1
    assert f"{100 * row['clean']:.1f}%{MARK}" in text
    assert text.count("not measured yet") == len(papers.TABLES["cure"].rows) - 1
    assert "`python" in text
    assert str(tmp_path) not in text
    assert papers_page.SECTIONS["papers_sgr"]() == "Not measured yet.\n"


def test_fast_is_bfloat16_channels_last_compiled(recipe_runs, tmp_path):
    for fast in (False, True):
        setting = recipe_runs.Setting("", reduced=False, fast=fast, note="")
        runs = recipe_runs.Runs(tmp_path / "none.json", setting, tmp_path, {}, 1.0)
        options = runs.options("cure-resnet18-cifar10")
        assert (options.compile, options.channels_last) == (fast, fast)
        assert options.precision == ("bfloat16" if fast else "float32")
        authors = runs.options("authors-cure-resnet18-cifar10")
        assert authors.precision == options.precision
        assert not authors.compile
        clean = runs.options("clean-resnet18-cifar10")
        assert options.init == f"{clean.output}/checkpoint.pt"


def test_a_reduced_recipe_is_the_recipe_in_fewer_epochs(recipe_runs):
    full = recipe_runs.from_recipe("cure-resnet18-svhn", {"init": "clean.pt"})
    small = recipe_runs.reduced(full)
    assert (full.epochs, small.epochs) == (20, 5)
    assert small.model == "narrow:resnet18"
    before, after = full.penalties[0], small.penalties[0]
    assert {**after, "weight": ""} == {**before, "weight": ""}
    for slow, fast, times in ((full.lr, small.lr, 10), (before["weight"], after["weight"], 1)):
        slow, fast = Schedule.parse("", slow), Schedule.parse("", fast)
        for epoch in (0, 5, 10, 12, 15, 20):
            assert fast(epoch / 4) == pytest.approx(times * slow(epoch))
    full = recipe_runs.from_recipe("clean-resnet18-svhn", {})
    assert (full.lr, recipe_runs.reduced(full).lr) == ("0:0.01,6:0.1,30:0", "0:0.01,1.4:0.1,7:0")
