import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import robustkern
from robustkern import functional
from robustkern.gradients.passes import _SHIFTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))
README = (ROOT / "README.md").read_text()
# What is made from results, and code.
MADE = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->|```.*?```|`[^`]*`", re.DOTALL)
FIGURE = re.compile(
    r"\d[\d.,]*(?:x\b|\s?(?:%|times\b|plain steps|m?s\b|seconds|minutes|hours|[KMG]B\b))"
)
# Every other figure and its source.
TYPED = {
    "43.7%": "the CURE paper",
    "36.3%": "the CURE paper",
    "41.1%": "the CURE paper",
    "44.5%": "the CURE paper",
    "99.6%": "the SGR paper",
    "79.5%": "the SGR paper",
    "95%": "the default of wilson_interval",
    "5%": "the default of Detector",
    "5 MB": "test_wheel.py",
}


def results(name):
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def test_tables_are_those_of_the_results():
    check = [sys.executable, "bench/readme.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


def test_no_other_figure_is_typed_by_hand():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    found = {figure for page in pages for figure in FIGURE.findall(MADE.sub("", page.read_text()))}
    assert found == set(TYPED)


def test_the_papers_figures_are_those_it_is_held_against():
    from papers import TABLES

    rows = TABLES["cure"].rows
    for recipe in ("cure-resnet18-cifar10", "pgd-resnet18-cifar10"):
        assert f"{rows[recipe].attacked}%" in README


def test_the_command_is_that_of_a_method_in_the_table():
    method = "FGSM-RS + TV, p=1, every 4th step, shift 0.075, 4 epochs"
    finals = [
        row
        for row in results("frontier-mnist")["rows"]
        if (row["kind"], row["method"]) == ("final", method)
    ]
    assert f"**{method}**" in README
    options = f"--penalty tv --p 1 --weight {finals[0]['strength']:g} --every 4 --shift 0.075"
    assert options in README
    assert f"--init clean/checkpoint.pt --epochs {finals[0]['epochs']} " in README


def test_steps_cost_what_their_passes_do():
    costs = {
        r["method"]: r["ratio"]
        for r in results("cpu-step")["rows"]
        if r["group"].startswith("step|")
    }
    passes = {"CURE": 4, "CURE anchored": 3, "GN": 2, "TV": 2, "SGR": 2, "CURE + GN + SGR": 4}
    for name, number in passes.items():
        assert costs[name] < 1.1 * number
    for name in ("CURE", "GN"):
        assert costs[name] < costs[f"{name} double backward"]


def test_double_backward_of_the_examples_costs_about_as_much_or_less():
    costs = {(r["group"], r["method"]): r["ratio"] for r in results("cpu-step")["rows"]}
    examples = [group for group, method in costs if method == "first order"]
    assert examples
    for group in examples:
        assert costs[group, "double backward"] < 1.1 * costs[group, "first order"]


def test_a_product_with_a_short_covariance_is_cheaper():
    seconds = {
        r["group"]: r["median_s"] for r in results("cpu-ops")["rows"] if r["method"] == "robustkern"
    }
    for reach, size in ((2, "(128, 3, 32, 32)"), (3, "(128, 1, 28, 28)")):
        short, whole = (
            seconds[f"covariance_product|{what}|{size}|float32|cpu"]
            for what in (f"fwd, reach {reach}", "fwd")
        )
        assert short < whole


def test_first_order_agrees_with_double_backward_at_the_automatic_shift():
    from penalty_gradients import SHIFTS, USUAL

    cosines = [
        row["cosine"]
        for row in results("shift")["rows"]
        if row["dtype"] == "float32" and math.isclose(row["shift"], _SHIFTS[torch.float32])
    ]
    assert min(cosines) >= 0.999
    trained = [
        row[mode]["cosine"][SHIFTS.index(USUAL)]
        for row in results("experiments-batch-statistics")["rows"]
        if row["kind"] == "explained" and row["method"] != "ReLU"
        for mode in ("batch", "eval")
    ]
    assert len(trained) == 8
    assert min(trained) >= 0.99


def test_the_evaluations_weights_are_the_most_robust_of_those_tried():
    (report,) = results("evaluation-mnist")["rows"]
    for name, method in report["search"]["methods"].items():
        found = {float(weight): value for weight, value in method["accuracies"].items()}
        best, ends = method["best"], (min(found), max(found))
        assert found[best] == max(found.values())
        end = ", an end" if best in ends else ""
        assert f"{name} {best:g} (of {ends[0]:g} to {ends[1]:g}{end})" in README


def test_what_is_to_be_seen_in_the_demo():
    rows = {row["method"]: row for row in results("demo")["results"]}
    clean = {name: row["accuracy"]["clean"] for name, row in rows.items()}
    attacked = {name: row["accuracy"]["pgd"][1:3] for name, row in rows.items()}
    unprotected = ("before fine-tuning", "no penalty")
    for name in unprotected:
        assert max(attacked[name]) < clean[name] / 2
    for name in rows.keys() - set(unprotected):
        assert clean[name] > clean["no penalty"] - 0.02
        assert less_by(0.1, attacked["no penalty"], attacked[name])
    assert less_by(-0.03, attacked["CURE, naive"], attacked["CURE"])
    assert rows["anchored CURE"]["naive_steps"] < rows["CURE"]["naive_steps"] < 1


def test_what_is_said_of_long_range_noise():
    rows = results("sgr-mnist")["rows"]

    def means(method, key):
        seeds = [row[key] for row in rows if row["method"] == method]
        columns = zip(*seeds, strict=True) if isinstance(seeds[0], list) else [seeds]
        return [statistics.mean(column) for column in columns]

    assert abs(means("SGR", "clean")[0] - means("GN", "clean")[0]) < 0.01
    assert less_by(0, means("GN", "lrc_by_eps"), means("SGR", "lrc_by_eps"))
    assert not less_by(0, means("GN", "lrc_by_length"), means("SGR", "lrc_by_length"))
    for strong in ("lrc_by_length", "lrc_of_data"):
        for method in ("GN", "SGR"):
            assert less_by(-0.05, means(method, strong), means("no penalty", strong))
        assert less_by(0.2, means("no penalty", strong), means("LRC-trained", strong))
    for method, other in (("GN", "SGR"), ("SGR", "GN")):
        assert less_by(0.1, means("no penalty", "pgd"), means(method, "pgd"))
        assert less_by(-0.03, means(method, "pgd"), means(other, "pgd"))


def less_by(margin, one, other):
    """Whether each of the one is below its like in the other by more than the margin."""
    return all(a + margin < b for a, b in zip(one, other, strict=True))


def test_kernels_compile_without_a_stack():
    rows = results("resources")["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["stack"] for row in rows} == {0}


def test_every_op_and_penalty_is_named():
    for name in set(functional.__all__) - {"show_config"}:
        assert f"`{name}(" in README
    for name in ("CURE", "SGR", "GradientPenalty", "LipschitzPenalty", "Sum", "Lazy"):
        assert f"`{name}(" in README
        assert hasattr(robustkern, name)


def test_every_command_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
