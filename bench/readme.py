"""Writes the tables of README and docs from the results; `--check` says if they are up to date."""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import analysis_page
import experiments_page
import experiments_why
import papers_page
from analysis_page import table
from frontier_picture import at_an_end, claims, data_title, diverged, short, summary

from robustkern.evaluation import verdict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SECTION = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
# Rows that compute something else, and how many times their bytes the op moves.
COMPARISONS = {"dot": 1.0, "clone": 1.5, "copy": 1.5}
# The op by each of the algorithms that it chooses from, whatever the size.
ALGORITHMS = ("toeplitz", "spectral", "stencil", "all displacements")
NOT_MEASURED = "Not measured yet.\n"


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it differs")
    check = parser.parse_args().check
    old = {page: page.read_text() for page in PAGES}
    new = {page: SECTION.sub(filled, text) for page, text in old.items()}
    found = {match[2] for text in old.values() for match in SECTION.finditer(text)}
    assert found == set(SECTIONS), found ^ set(SECTIONS)
    if check:
        return int(new != old)
    for page, text in new.items():
        page.write_text(text)
    return 0


def filled(section: re.Match[str]) -> str:
    """A section between its marks, made anew."""
    return section[1] + SECTIONS[section[2]]() + section[3]


def read(name: str) -> dict[str, Any] | None:
    """A results file, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def made(results: dict[str, Any]) -> str:
    """Where, with what, by which command, and of which commits: a run may go on at a later one."""
    p = results["provenance"]
    rows = dict.fromkeys(row["commit"] for row in results.get("rows", []) if "commit" in row)
    commits = ", ".join(commit[:12] + commit[40:] for commit in rows or [p["commit"]])
    return (
        f"{p['machine']}, {p['threads']} threads, torch {p['torch']}, Python {p['python']}, "
        f"commit {commits}; `{p['command']}`.\n"
    )


def demo() -> str:
    """What `make demo` printed, and its picture."""
    results = read("demo")
    if results is None:
        return NOT_MEASURED
    shown = results["results"]
    low, high = shown[0]["accuracy"]["eps"][1:3]
    rows = [
        [
            row["method"],
            "" if row["plain_steps"] is None else f"{row['plain_steps']:.1f}",
            "" if row["naive_steps"] is None else f"{1 / row['naive_steps']:.1f}x",
            *(
                f"{100 * value:.1f}%"
                for value in (row["accuracy"]["clean"], *row["accuracy"]["pgd"][1:3])
            ),
        ]
        for row in shown
    ]
    header = ["fine-tuned with", "step, in plain steps", "faster than naive", "clean accuracy"]
    header += [f"PGD-20 at {eps:g}" for eps in (low, high)]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seconds, seed = results["seconds"], results["seed"]
    where = f"`make demo` in {seconds:.0f} s, seed {seed}; {versions}.\n"
    return where + table(header, rows) + "![accuracy against eps](bench/results/demo.png)\n"


def step() -> str:
    """Costs of a training step, and how much faster CURE is than its authors' structure."""
    results = read("cpu-step")
    if results is None:
        return NOT_MEASURED
    text = steps(lambda kind: kind == "step")
    for group, of_group in grouped(results["rows"]).items():
        ratios = {r["method"]: r["ratio"] for r in of_group}
        if group.startswith("step|") and {"CURE", "CURE authors"} <= set(ratios):
            faster = ratios["CURE authors"] / ratios["CURE"]
            text += f"CURE is {faster:.2f} times as fast as in its authors' structure.\n\n"
    return text


def other_steps() -> str:
    """Those of a compiled network, of two ranks, and of the examples."""
    return steps(lambda kind: kind != "step")


def steps(chosen: Callable[[str], bool]) -> str:
    """A table for each group of the chosen kinds."""
    results = read("cpu-step")
    if results is None:
        return NOT_MEASURED
    text = made(results)
    for group, of_group in grouped(results["rows"]).items():
        kind, *setting = group.split("|")
        if chosen(kind):
            rows = [
                [r["method"], milliseconds(r["median_s"]), f"{r['ratio']:.3g}"] for r in of_group
            ]
            header = [
                f"{kind}: {', '.join(setting)}",
                "median time",
                f"in {of_group[0]['baseline']} steps",
            ]
            text += table(header, rows)
    return text


def attacks() -> str:
    """Attacks beside the passes that they are made of."""
    results = read("cpu-attacks")
    if results is None:
        return NOT_MEASURED
    rows = []
    for group, (passes, attack) in grouped(results["rows"]).items():
        what = ", ".join(group.split("|")[1:])
        times = [milliseconds(r["median_s"]) for r in (attack, passes)]
        rows.append([what, *times, f"{attack['ratio']:.3f}"])
    header = ["attack", "median time", "its passes alone", "ratio"]
    return (
        "PGD beside as many forward passes and input gradients, the others beside forward passes "
        f"of the same batches. {made(results)}" + table(header, rows)
    )


def hessians() -> str:
    """Ways to the largest eigenvalues of input Hessians."""
    results = read("cpu-hessian")
    if results is None:
        return NOT_MEASURED
    text = made(results)
    for group, of_group in grouped(results["rows"]).items():
        rows = [
            [r["method"], milliseconds(r["median_s"]), f"{1 / r['ratio']:.3g}x"] for r in of_group
        ]
        text += table([group, "median time", f"faster than {of_group[0]['baseline']}"], rows)
    return text


def milliseconds(seconds: float) -> str:
    """Three digits, and no exponent."""
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def ops() -> str:
    """The ops against their alternatives."""
    results = read("cpu-ops")
    if results is None:
        return NOT_MEASURED
    return (
        "The ops on the CPU against the fastest other way to compute them. The limit is the "
        "STREAM bandwidth of a dot product (or a copy, to write something) of the same size; "
        "beside it stand the bandwidths of torch.dot, of a copy into memory that is there, and of "
        f"a clone, which has to get new memory as the op does. {made(results)}"
        + op_table(results["rows"])
    )


def op_table(measured: list[dict[str, Any]], digits: int = 2) -> str:
    """A line for each group of op rows; milliseconds to so many digits."""
    rows = []
    for group, of_group in grouped(measured).items():
        ours = next(r for r in of_group if r["method"] == "robustkern")
        aside = ("robustkern", *COMPARISONS, *ALGORITHMS)
        best = min((r for r in of_group if r["method"] not in aside), key=lambda r: r["median_s"])
        op, *rest = group.split("|")
        share = f"{100 * ours['share_of_limit']:.0f}%" if "share_of_limit" in ours else ""
        for r in of_group:
            if r["method"] in COMPARISONS and "share_of_limit" in ours:
                rate = COMPARISONS[r["method"]] * r["ratio"]
                share += f"; {100 * rate:.0f}% of a {r['method']}'s"
        rows.append(
            [
                f"`{op}`",
                ", ".join(rest),
                f"{1e3 * ours['median_s']:.{digits}f} ms",
                f"{1e3 * best['median_s']:.{digits}f} ms ({best['method']})",
                f"{best['ratio']:.1f}x",
                share,
            ]
        )
    return table(["op", "size", "robustkern", "best other", "faster by", "of the limit"], rows)


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows by group, in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def gpu() -> str:
    """All that `make gpu` found, on every GPU it has run on."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    texts = [gpu_results(results) for results in found.values() if "parts" in results]
    return "".join(texts) or (
        "GPU figures are not measured yet; `make gpu` on a machine with an NVIDIA GPU makes them.\n"
    )


def gpu_results(results: dict[str, Any]) -> str:
    """One GPU's parts, ops and steps."""
    p = results["provenance"]
    text = (
        f"`make gpu` on an {p['gpu']}: driver {p['driver']}, torch {p['torch']}, CUDA {p['cuda']}, "
        f"Triton {p['triton']}, Python {p['python']}, commit {p['commit'][:12]}.\n"
    )
    parts = [
        [name, part["status"], f"{part['seconds']:.0f} s", part["last"].replace("|", "/")]
        for name, part in results["parts"].items()
    ]
    text += table(["part", "outcome", "time", "last line"], parts)
    ops_rows = [r for r in results["rows"] if r["part"] == "ops"]
    if ops_rows:
        text += (
            "The ops against the fastest other way of equal accuracy; the limit is a copy of 512 "
            "MB, measured in every round. Inputs go through copies that no cache holds together.\n"
        ) + op_table(ops_rows, digits=3)
        choices = [
            [r["group"].replace("|", ", "), r["method"], f"{1e3 * r['median_s']:.3f} ms"]
            for r in ops_rows
            if r["method"] in ALGORITHMS and "graph replay" not in r["group"]
        ]
        if choices:
            text += "What each algorithm takes where it may be chosen.\n" + table(
                ["op", "algorithm", "time"], choices
            )
    for group, rows in grouped([r for r in results["rows"] if r["part"] == "steps"]).items():
        title = group.removeprefix("step|").replace("|", ", ")
        text += f"Training steps, {title}, channels_last, no TF32.\n" + table(
            ["step", "median time", "in plain steps", "peak memory"], map(step_row, rows)
        )
    return text


def step_row(row: dict[str, Any]) -> list[str]:
    """What a step takes, or why it cannot be taken."""
    if "error" in row:
        return [row["method"], row["error"].replace("|", "/"), "", ""]
    times = [f"{1e3 * row['median_s']:.1f} ms", f"{row['ratio']:.2f}"]
    return [row["method"], *times, f"{row['peak_bytes'] / 1e9:.2f} GB"]


def training(name: str) -> Callable[[], str]:
    """A table of what fine-tuning with each method cost and bought."""

    def section() -> str:
        results = read(f"training-{name}")
        if results is None:
            return NOT_MEASURED
        first = results["rows"][0]
        rows = []
        for method in dict.fromkeys(r["method"] for r in results["rows"]):
            of_method = [r for r in results["rows"] if r["method"] == method]
            pgd = [statistics.mean(v) for v in zip(*(r["pgd"] for r in of_method), strict=True)]
            clean = statistics.mean(r["clean"] for r in of_method)
            rows.append(
                [
                    method,
                    f"{statistics.mean(r['seconds'] for r in of_method):.0f} s",
                    *(f"{100 * value:.1f}%" for value in (clean, *pgd)),
                ]
            )
        eps = [f"{e * 255:.0f}/255" if name == "cifar10" else f"{e:g}" for e in first["eps"]]
        title = first["note"] or name.upper()
        seeds = len({r["seed"] for r in results["rows"]})
        return (
            f"Fine-tuning a small network on {title}, mean of {seeds} seed(s). {made(results)}"
            + table(
                ["method", "time", "clean", *(f"PGD-{first['pgd_steps']} at {e}" for e in eps)],
                rows,
            )
        )

    return section


def sgr() -> str:
    """SGR against GN and training with the noise itself, at clean accuracies alike."""
    results = read("sgr-mnist")
    if results is None:
        return NOT_MEASURED
    first = results["rows"][0]
    setting = first["setting"]
    length, eps = setting["middle_length"], setting["middle_eps"]
    header = ["fine-tuned with", "strength", "time", "clean"]
    header += [f"eps {e:g}" for e in setting["eps"]]
    header += [f"PGD-{setting['pgd_steps']} at {e:g}" for e in setting["pgd_eps"]]
    by_eps, by_length = [], []
    for method in dict.fromkeys(r["method"] for r in results["rows"]):
        of_method = [r for r in results["rows"] if r["method"] == method]

        def means(key: str, of_method: list[dict[str, Any]] = of_method) -> list[str]:
            columns = zip(*(r[key] for r in of_method), strict=True)
            return [f"{100 * statistics.mean(column):.1f}%" for column in columns]

        clean = statistics.mean(r["clean"] for r in of_method)
        seconds = statistics.mean(r["seconds"] for r in of_method)
        by_eps.append(
            [
                method,
                f"{of_method[0]['strength']:g}",
                f"{seconds:.0f} s",
                f"{100 * clean:.1f}%",
                *means("lrc_by_eps"),
                *means("pgd"),
            ]
        )
        of_data = statistics.mean(r["lrc_of_data"] for r in of_method)
        by_length.append([method, *means("lrc_by_length"), f"{100 * of_data:.1f}%"])
    lengths = [f"{z:g} pixels" for z in setting["decay_lengths"]]
    grids = [
        f"{r['method']} from {', '.join(format(s['strength'], 'g') for s in r['search'])}"
        for r in results["rows"]
        if r["seed"] == first["seed"] and len(r["search"]) > 1
    ]
    return (
        f"Long-range-correlated noise on MNIST: accuracy under the worst of {setting['draws']} "
        f"draws per image, at decay length {length:g} pixels, for {setting['test']:,} test images, "
        f"mean of {setting['seeds']} seed(s). All methods start from one clean network. Strengths, "
        f"which are weights or the deviation of the noise trained with: {'; '.join(grids)}; of "
        "those that keep clean accuracy on validation images within one point of no penalty, the "
        f"greatest. {made(results)}"
        + table(header, by_eps)
        + f"The same at eps {eps:g}, by decay length and for noise of the data's covariance.\n"
        + table(["fine-tuned with", *lengths, "the data's"], by_length)
    )


def evaluation() -> str:
    """The verdict on each network of the evaluation on MNIST."""
    results = read("evaluation-mnist")
    if results is None:
        return NOT_MEASURED
    (report,) = results["rows"]
    attacks = ("PGD-20", "APGD", "Square", "SPSA")
    rows = []
    for found in verdict(report):
        measured = {item: row["value"] for item, row in report["networks"][found.network].items()}
        accuracy, samples = measured["attacks"]["accuracy"], measured["attacks"]["samples"]
        median = measured["distances"]["CW L2"]["median"]
        low, high = found.worst_interval
        rows.append(
            [
                found.network,
                f"{100 * found.clean:.1f}%",
                *(f"{100 * accuracy[name]:.1f}%" for name in attacks),
                f"{100 * found.worst:.1f}% ({100 * low:.1f} to {100 * high:.1f})",
                "" if median is None else f"{median:.2f}",
                str(len(found.warnings)),
            ]
        )
    whole = report["data"]["images"]
    fewer = [f"{name} on {samples[name]}" for name in attacks if samples[name] < whole]
    header = ["network", "clean", *attacks, "worst case", "median L2 distance (CW)", "warnings"]
    note = f" ({', '.join(fewer)})" if fewer else ""
    raised = [f"- {each.network}: {w}\n" for each in verdict(report) for w in each.warnings]
    search = report["search"]
    weights = []
    for name, method in search["methods"].items():
        tried = sorted(map(float, method["accuracies"]))
        end = ", an end" if method["best"] in (tried[0], tried[-1]) else ""
        weights.append(f"{name} {method['best']:g} (of {tried[0]:g} to {tried[-1]:g}{end})")
    return (
        f"Accuracy on {whole:,} test images{note}, no pixel changed by more "
        f"than {report['radius']:g}; the worst case is over all attacks, image by image, with its "
        f"95% interval. Each penalty's weight is that whose network was right most often under "
        f"PGD-20 on {search['images']:,} held-out training images, one network a weight: "
        f"{', '.join(weights)}. {made(results)}"
        + table(header, rows)
        + ("Warnings:\n\n" + "".join(raised) + "\n" if raised else "")
    )


def shift() -> str:
    """How well the first-order gradient agrees with double backward, over shifts."""
    results = read("shift")
    if results is None:
        return NOT_MEASURED
    shifts = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in results["rows"]):
        line = [dtype]
        for shift in shifts:
            cosines = [
                r["cosine"]
                for r in results["rows"]
                if r["dtype"] == dtype and math.isclose(r["shift"], shift)
            ]
            line.append(f"{statistics.median(cosines):.4f} ({min(cosines):.4f})")
        lines.append(line)
    measured = {(r["network"], r["penalty"]) for r in results["rows"]}
    return (
        "The cosine between the parameter gradient of the penalty by first order, in each dtype, "
        f"and by double backward in float64: median and, in brackets, lowest of {len(measured)} "
        "pairs of a smooth network and a penalty, for shifts in standard deviations of the "
        f"inputs. {made(results)}" + table(["dtype", *(f"{s:.0e}" for s in shifts)], lines)
    )


def recipes() -> str:
    """The settings that the tables of trained networks were made with."""
    rows = []
    for name, title in (("mnist", "MNIST"), ("cifar10", "CIFAR-10")):
        results = read(f"training-{name}")
        settings = {r["method"]: r["penalty"] for r in results["rows"]} if results else {}
        rows += [
            [title, method, p["weight"], p.get("h", ""), "False" if p.get("norm") else ""]
            for method, p in settings.items()
            if method in ("CURE", "CURE anchored", "GN")
        ]
    noise = read("sgr-mnist")
    strengths = {r["method"]: r["strength"] for r in noise["rows"]} if noise else {}
    rows += [
        ["MNIST, long-range noise", method, f"{strengths[method]:g}", "", ""]
        for method in ("GN", "SGR")
        if method in strengths
    ]
    return table(["data", "penalty", "weight", "h", "squared"], rows)


def frontier_edge() -> str:
    """The picture, a line for each method on the edge and for the usual ones, the claims."""
    results = read("frontier-mnist")
    if results is None:
        return NOT_MEASURED
    return (
        "![PGD accuracy against cost](bench/results/frontier-mnist.png)\n\n"
        "![the cost of a step](bench/results/frontier-mnist-steps.png)\n"
        + frontier_table(
            results, beside=("no penalty", "CURE, authors' structure", "CURE", "PGD-7")
        )
        + judged(results)
        + "\n"
        + made(results)
    )


def frontier(name: str) -> Callable[[], str]:
    """Everything that bench/frontier.py found on a data set."""

    def section() -> str:
        results = read(f"frontier-{name}")
        if results is None:
            return NOT_MEASURED
        setting = results["setting"]
        steps = setting["clean_epochs"] * -(-setting["train"] // setting["batch_size"])
        failed, ends = diverged(results), at_an_end(results)
        found = {line.method: line.strength for line in summary(results)}
        agreed = all(found.get(name) == setting["combined_eps"] for name in ("FGSM-RS", "PGD-7"))
        where = f"../bench/results/frontier-{name}"
        return (
            f"{data_title(results)}: {setting['train']:,} training and {setting['test']:,} test "
            f"images, {setting['epochs']} epochs of fine-tuning, mean of {setting['seeds']} seeds. "
            f"The clean networks that all start from took {steps:,} plain steps, which the costs "
            f"leave out. Strengths were searched on {setting['validation']:,} other training "
            f"images, among those that cost at most {100 * setting['margin']:g} points of clean "
            f"accuracy. Attacks beside a penalty take eps {short(setting['combined_eps'])}"
            + (", as the search chose for FGSM-RS and PGD-7. " if agreed else ". ")
            + (f"The loss of {', '.join(failed)} did not stay finite. " if failed else "")
            + (f"At an end of the strengths tried: {', '.join(ends)}. " if ends else "")
            + made(results)
            + f"\n![PGD accuracy against cost]({where}.png)\n\n"
            f"The bars reach from the least to the greatest of the seeds. PGD starts "
            f"{setting['restarts']} times; APGD takes {setting['apgd_steps']} steps, on "
            f"{setting['apgd_images']} of the test images.\n"
            + frontier_table(results)
            + f"\n![the cost of a step]({where}-steps.png)\n\n"
            + judged(results)
        )

    return section


def judged(results: dict[str, Any]) -> str:
    """What is asked of the frontier, and whether it holds."""
    return "".join(f"- {'Yes' if holds else 'No'}: {text}.\n" for text, holds in claims(results))


def frontier_table(results: dict[str, Any], beside: Sequence[str] | None = None) -> str:
    """From the cheapest method on, those on the edge bold; all, or the edge and those beside it."""
    setting = results["setting"]
    header = ["method", "strength", "epochs", "passes of a step", "step", "fine-tuning", "clean"]
    header += [f"PGD-{setting['pgd_steps']} at {short(eps)}" for eps in setting["eps"]]
    header += [f"APGD at {short(setting['main_eps'])}"]
    rows = [
        [
            f"**{line.method}**" if line.on_edge else line.method,
            f"{line.strength:g}",
            str(line.epochs),
            f"{line.passes:.2f}",
            f"{line.step:.2f}",
            f"{line.cost:,.0f}",
            *(
                f"{100 * mean:.1f}% ({100 * low:.1f}-{100 * high:.1f})"
                for mean, low, high in (line.clean, *line.pgd, line.apgd)
            ),
        ]
        for line in summary(results)
        if beside is None or line.on_edge or line.method in beside
    ]
    return table(header, rows)


def experiment(name: str, says: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A study of bench/experiments.py."""

    def section() -> str:
        results = read(f"experiments-{name}")
        if results is None or not experiments_page.lines(results):
            return NOT_MEASURED
        return experiments_page.setting(results) + made(results) + says(results)

    return section


SECTIONS = {
    "frontier_edge": frontier_edge,
    "frontier_mnist": frontier("mnist"),
    "frontier_cifar10": frontier("cifar10"),
    "demo": demo,
    "step": step,
    "other_steps": other_steps,
    "attacks": attacks,
    "hessians": hessians,
    "evaluation": evaluation,
    "ops": ops,
    "gpu": gpu,
    "mnist": training("mnist"),
    "cifar10": training("cifar10"),
    "sgr": sgr,
    "shift": shift,
    "recipes": recipes,
    "experiments_batch_statistics": experiment(
        "batch-statistics", experiments_why.batch_statistics
    ),
    "experiments_cure": experiment("cure", experiments_page.cure),
    "experiments_cure_cifar10": experiment("cure-cifar10", experiments_page.cure),
    "experiments_combined": experiment("combined", experiments_page.combined),
    "experiments_overfitting": experiment("overfitting", experiments_page.overfitting),
    "experiments_shift": experiment("shift", experiments_page.shift),
    "experiments_kinks": experiment("kinks", experiments_page.kinks),
    **analysis_page.SECTIONS,
    **papers_page.SECTIONS,
}

if __name__ == "__main__":
    sys.exit(main())
