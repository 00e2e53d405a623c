"""What bench/frontier.py found: a line for each method, the edge, the pictures and the claims."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from robustkern.evaluation import wilson_interval

Content = dict[str, Any]
# Okabe and Ito's colours, which the colour-blind can tell apart, and a marker of its own for each.
LOOKS = {
    "plain": ("#000000", "o", "no penalty, weight decay"),
    "penalty": ("#0072B2", "o", "penalties by first-order passes"),
    "naive": ("#D55E00", "X", "the same by double backward"),
    "attack": ("#E69F00", "s", "training on attacks"),
    "both": ("#009E73", "D", "attacks and a penalty"),
}


class Share(NamedTuple):
    """Of images classified right: the mean over the seeds, and its 95% Wilson interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A method: its costs are in plain training steps."""

    method: str
    family: str
    naive_of: str | None
    strength: float
    epochs: int
    clean: Share
    pgd: tuple[Share, ...]
    apgd: Share
    main: float  # PGD at the main eps, with its range over the seeds
    low: float
    high: float
    passes: float  # of a step, counted
    step: float  # measured
    cost: float  # of the fine-tuning
    on_edge: bool = False


def summary(content: Content) -> list[Line]:
    """The methods whose every seed was trained and whose step was timed, from the cheapest on."""
    setting = content["setting"]
    main = setting["eps"].index(setting["main_eps"])
    steps_per_epoch = -(-setting["train"] // setting["batch_size"])
    times = {r["method"]: r["plain_steps"] for r in content["rows"] if r["kind"] == "step"}
    finals: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["kind"] == "final":
            finals.setdefault(row["method"], []).append(row)
    lines = []
    for method, rows in finals.items():
        unfinished = len(rows) < setting["seeds"] or method not in times
        if unfinished or any("failed" in r for r in rows):
            continue
        images = setting["test"]
        pgd = zip(*(r["pgd_right"] for r in rows), strict=True)
        at_main = [r["pgd_right"][main] / images for r in rows]
        # A plain step is a pass forward and one back to the parameters, which is twice the work.
        passes = [(r["passes"]["forward"] + 2 * r["passes"]["backward"]) / 3 for r in rows]
        lines.append(
            Line(
                method, rows[0]["family"], rows[0]["naive_of"], rows[0]["strength"],
                rows[0]["epochs"],
                clean=shared([r["right"] for r in rows], images),
                pgd=tuple(shared(counts, images) for counts in pgd),
                apgd=shared([r["apgd_right"] for r in rows], setting["apgd_images"]),
                main=statistics.mean(at_main), low=min(at_main), high=max(at_main),
                passes=statistics.mean(passes),
                step=times[method], cost=rows[0]["epochs"] * steps_per_epoch * times[method],
            )
        )  # fmt: skip
    return with_edge(sorted(lines, key=lambda line: line.cost))


def diverged(content: Content) -> list[str]:
    """The methods whose loss did not stay finite with all strengths of a search, or in a final."""
    stages: dict[tuple[str, str, int], list[bool]] = {}
    for row in content["rows"]:
        if row["kind"] != "step":
            stage = (row["method"], row["kind"], row["seed"])
            stages.setdefault(stage, []).append("failed" in row)
    return sorted(
        {method for (method, kind, _), failed in stages.items()
         if (all(failed) if kind == "search" else any(failed))}
    )  # fmt: skip


def shared(counts: Sequence[int], images: int) -> Share:
    """From each seed's count of the same images."""
    count = statistics.mean(counts)
    return Share(count / images, *wilson_interval(round(count), images))


def dominates(a: Line, b: Line) -> bool:
    """Whether `a` costs no more and is no less robust, and one of them strictly."""
    return a.cost <= b.cost and a.main >= b.main and (a.cost < b.cost or a.main > b.main)


def within_a_point(a: Line, b: Line) -> bool:
    """Whether `a` is at most a point less robust; one point is one, rounded as it may be."""
    return a.main >= b.main - 0.01 - 1e-9


def at_an_end(content: Content) -> list[str]:
    """The methods whose strength is the least or the greatest tried: a wider search might help."""
    tried: dict[str, set[float]] = {}
    for row in content["rows"]:
        if row["kind"] == "search":
            tried.setdefault(row["method"], set()).add(row["strength"])
    return [
        f"{line.method} ({line.strength:g})"
        for line in summary(content)
        for grid in [tried.get(line.method, set())]
        if len(grid) > 1 and line.strength in (min(grid), max(grid))
    ]


def with_edge(lines: list[Line]) -> list[Line]:
    """The same lines, and which of them no other dominates."""
    return [
        Line(**{**vars(line), "on_edge": not any(dominates(other, line) for other in lines)})
        for line in lines
    ]


def claims(content: Content) -> list[tuple[str, bool]]:
    """What the project says of these figures, in figures, and whether it holds."""
    lines = {line.method: line for line in summary(content)}
    found = []
    if "PGD-7" not in lines:
        found.append(("PGD-7 has no figures to compare with", False))
    else:
        goal = lines["PGD-7"]
        near = [
            line
            for line in lines.values()
            if line.family in ("penalty", "both") and within_a_point(line, goal)
        ]
        text = f"PGD-7 reaches {100 * goal.main:.1f}% for {goal.cost:,.0f} plain steps"
        if near:
            best = min(near, key=lambda line: line.cost)
            share = best.cost / goal.cost
            text += (
                f"; the cheapest penalty within one point, {best.method}, {100 * best.main:.1f}% "
                f"for {best.cost:,.0f}, {share:.3f} of its cost; at most half is asked"
            )
        else:
            text += "; no penalty comes within one point"
        found.append((text, bool(near) and share <= 0.5))
    naive, ours = lines.get("CURE, authors' structure"), lines.get("CURE")
    if naive and not ours:
        found.append(("CURE has no figures to compare", False))
    if naive and ours:
        share = ours.step / naive.step
        text = (
            f"CURE reaches {100 * ours.main:.1f}%, its authors' structure {100 * naive.main:.1f}%, "
            f"within one point is asked; it takes {share:.3f} of the time, at most 0.6 is asked"
        )
        found.append((text, within_a_point(ours, naive) and share <= 0.6))
        forms = [
            line
            for line in lines.values()
            if line.family == "penalty" and "CURE" in line.method and within_a_point(line, naive)
        ]
        text = "no form of CURE comes within one point of its authors' structure"
        if forms:
            best = min(forms, key=lambda line: line.cost)
            share = best.step / naive.step
            text = (
                f"the cheapest form of CURE within one point of its authors' structure, "
                f"{best.method}, {100 * best.main:.1f}%, takes {share:.3f} of the time, at most "
                "0.6 is asked"
            )
        found.append((text, bool(forms) and share <= 0.6))
    pairs = [(lines[n.naive_of], n) for n in lines.values() if n.naive_of in lines]
    if pairs:
        beaten = [f"{ours.method} by {n.method}" for ours, n in pairs if dominates(n, ours)]
        text = "no method is dominated by its naive version" + (
            f": {', '.join(beaten)}" if beaten else f", of {len(pairs)} such"
        )
        found.append((text, not beaten))
    return found


def draw(content: Content, path: Path) -> None:
    """PGD accuracy at the main eps against cost, beside `path` as PNG and SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, ScalarFormatter

    lines, setting = summary(content), content["setting"]
    figure = Figure((10, 6.5))
    axes = figure.add_axes((0.08, 0.1, 0.6, 0.83))
    axes.set_xscale("log")
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.tick_params(axis="x", which="both", labelsize=8)
    for line in lines:
        colour, marker, _ = LOOKS[line.family]
        around = [[100 * (line.main - line.low)], [100 * (line.high - line.main)]]
        axes.errorbar(
            line.cost, 100 * line.main, around, color=colour, marker=marker, markersize=7,
            elinewidth=1, alpha=1 if line.on_edge else 0.4,
        )  # fmt: skip
    edge = [line for line in lines if line.on_edge]
    axes.step(
        [line.cost for line in edge], [100 * line.main for line in edge],
        where="post", color="#999999", linewidth=1, zorder=0,
    )  # fmt: skip
    axes.set_xlabel("cost of fine-tuning, in plain training steps (measured)")
    axes.set_ylabel(
        f"accuracy under PGD-{setting['pgd_steps']} at eps {short(setting['main_eps'])} (%)"
    )
    axes.set_title(data_title(content))
    axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for colour, marker, label in LOOKS.values()
    ]
    handles += [
        Line2D(
            [], [], color=LOOKS[line.family][0], marker=LOOKS[line.family][1], linestyle="",
            markersize=5, alpha=1 if line.on_edge else 0.4, label=f"{number}  {line.method}",
        )
        for number, line in enumerate(lines, 1)
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.69, 0.95), fontsize=8, frameon=False
    )
    figure.draw_without_rendering()  # so that points have their pixels
    place_numbers(axes, lines)
    with rc_context({"svg.hashsalt": "frontier"}):
        save(figure, path)


def place_numbers(axes: Any, lines: list[Line]) -> None:
    """A number at each point, those on the edge bold, where neither points nor numbers are."""
    points = [axes.transData.transform((line.cost, 100 * line.main)) for line in lines]
    taken = [tuple(point) for point in points]
    for number, (line, (x, y)) in enumerate(zip(lines, points, strict=True), 1):
        # Ever farther away, above first.
        ways = [(0, 1), (1, 1), (-1, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (0, -1)]
        places = [(x + r * dx, y + r * dy) for r in (14, 20, 28, 38, 50) for dx, dy in ways]
        spot = next(
            (p for p in places if all(max(abs(p[0] - a), abs(p[1] - b)) > 14 for a, b in taken)),
            places[0],
        )
        taken.append(spot)
        inches = ((spot[0] - x) / axes.figure.dpi, (spot[1] - y) / axes.figure.dpi)
        axes.annotate(
            str(number), (line.cost, 100 * line.main), (72 * inches[0], 72 * inches[1]),
            textcoords="offset points", ha="center", va="center", fontsize=8,
            fontweight="bold" if line.on_edge else "normal",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkB": 4},
        )  # fmt: skip


def draw_steps(content: Content, path: Path) -> None:
    """What a step of each method takes, in plain steps, beside `path` as PNG and SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    family = {r["method"]: r["family"] for r in content["rows"] if "family" in r}
    steps = [(r["method"], r["plain_steps"]) for r in content["rows"] if r["kind"] == "step"]
    steps.sort(key=lambda step: -step[1])
    figure = Figure((7, 0.25 * len(steps) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(
        [method for method, _ in steps], [cost for _, cost in steps],
        color=[LOOKS[family.get(method, "penalty")][0] for method, _ in steps],
    )  # fmt: skip
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("a training step, in plain training steps")
    axes.set_title(data_title(content))
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": "frontier"}):
        save(figure, path.with_stem(path.stem + "-steps"))


def short(eps: float) -> str:
    """2/255, as people write small ones, or 0.1."""
    return f"{255 * eps:.0f}/255" if eps < 0.05 else f"{eps:g}"


def data_title(content: Content) -> str:
    """The data set, as it wants to be called."""
    return content["note"] or {"mnist": "MNIST", "cifar10": "CIFAR-10"}[content["setting"]["set"]]


def save(figure: Any, path: Path) -> None:
    """As PNG and as SVG; the same figures make the same files."""
    from robustkern.training.files import atomic_path

    for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
        with atomic_path(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata, bbox_inches="tight")
