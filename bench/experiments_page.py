"""Sections of docs/experiments.md: tables of the studies, and what their numbers say."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis_page import table
from frontier_picture import data_title, short
from studies import STUDIES

Row = dict[str, Any]
Results = dict[str, Any]
# Where one attack in a single step is withstood so much more often than one in many, the network
# has learnt the single step alone.
OVERFITS = 4.0


@dataclass(frozen=True)
class Line:
    """A variant with one strength: its rows, by seed."""

    variant: str
    strength: float
    rows: dict[int, Row]

    @property
    def passes(self) -> float:
        """Of a step, in plain steps: a forward pass, and one back, which is twice the work."""
        return statistics.mean(
            (row["passes"]["forward"] + 2 * row["passes"]["backward"]) / 3
            for row in self.rows.values()
        )

    def last(self, seed: int) -> Row:
        """Figures after the last epoch."""
        figures: Row = self.rows[seed]["figures"][-1]
        return figures


def lines(results: Results) -> list[Line]:
    """In the order of the study; trainings whose loss did not stay finite are left out."""
    found: dict[tuple[str, float], dict[int, Row]] = {}
    for row in results["rows"]:
        if row["kind"] == "trained" and "failed" not in row:
            found.setdefault((row["method"], row["strength"]), {})[row["seed"]] = row
    return [
        Line(variant.name, strength, dict(sorted(rows.items())))
        for variant in STUDIES[results["rows"][0]["study"]]().variants
        for strength in variant.method.grid
        if (rows := found.get((variant.name, strength)))
    ]


def setting(results: Results) -> str:
    """What was trained and measured, and what failed."""
    of, rows = results["setting"], results["rows"]
    attacked = next(row["attacked"] for row in rows if "attacked" in row)
    failed = {row["method"]: None for row in rows if "failed" in row}
    return (
        f"{data_title(results)}: {of['train']:,} training images, {of['clean_epochs']} clean "
        f"epochs, then {of['epochs']} of fine-tuning; clean accuracy on {of['validation']:,} other "
        f"training images, attacks on the first {attacked}. Means, and in brackets the range, over "
        "the seeds. "
        + (f"The loss of {', '.join(failed)} did not always stay finite. " if failed else "")
    )


def spread(values: Iterable[float], *, signed: bool = False) -> str:
    """Mean of shares, and in brackets their range, in percent; signed, in points."""
    shares = [100 * value for value in values]
    sign, unit = ("+", "") if signed else ("", "%")
    text = f"{statistics.mean(shares):{sign}.1f}{unit}"
    if len(shares) == 1:
        return text
    return f"{text} ({min(shares):{sign}.1f} to {max(shares):{sign}.1f})"


def main_pgd(results: Results) -> Callable[[Row], float]:
    """PGD accuracy at the main eps."""
    where = results["setting"]["eps"].index(results["setting"]["main_eps"])
    return lambda figures: float(figures["pgd"][where])


def clean(figures: Row) -> float:
    """Clean accuracy."""
    return float(figures["clean"])


def accuracies(results: Results, strength: str) -> str:
    """A line for each variant and strength.

    Bold where none is more robust for as few passes, or as robust for fewer.
    """
    setting, found = results["setting"], lines(results)
    main = main_pgd(results)
    value = {
        (line.variant, line.strength): statistics.mean(main(line.last(s)) for s in line.rows)
        for line in found
    }
    rows = []
    for line in found:
        own = value[line.variant, line.strength]
        beaten = any(
            other.passes <= line.passes
            and value[other.variant, other.strength] >= own
            and (other.passes, value[other.variant, other.strength]) != (line.passes, own)
            for other in found
        )
        last = [line.last(seed) for seed in line.rows]
        rows.append(
            [
                line.variant if beaten else f"**{line.variant}**",
                f"{line.strength:.3g}" if line.strength else "",
                str(len(last)),
                f"{line.passes:.2f}",
                spread(figures["clean"] for figures in last),
                *(spread(f["pgd"][i] for f in last) for i in range(len(setting["eps"]))),
            ]
        )
    header = ["fine-tuned with", strength, "seeds", "passes of a step", "clean"]
    header += [f"PGD-{setting['pgd_steps']} at {short(eps)}" for eps in setting["eps"]]
    return table(header, rows)


def contrast(results: Results, pairs: Sequence[tuple[Line, Line]], title: str) -> str:
    """What the first of each pair has more than the second, over pairs and the seeds in both."""
    main, eps = main_pgd(results), short(results["setting"]["main_eps"])
    both = [(a.last(s), b.last(s)) for a, b in pairs for s in a.rows if s in b.rows]
    if not both:
        return ""
    differences = {
        name: [of(a) - of(b) for a, b in both]
        for name, of in ((f"PGD accuracy at {eps}", main), ("clean accuracy", clean))
    }
    robust = differences[f"PGD accuracy at {eps}"]
    often, trainings = (
        ("every time", f"{len(both)} trainings") if len(both) > 1 else ("once", "1 training")
    )
    verdict = (
        f"more robust {often}" if min(robust) > 0
        else f"less robust {often}" if max(robust) < 0
        else f"equally robust {often}" if not any(robust)
        else "not the same way every time"
    )  # fmt: skip
    figures = ", ".join(f"{name} {spread(v, signed=True)}" for name, v in differences.items())
    return f"- {title}: {verdict}. {figures} points, {trainings} of each.\n"


def beside(found: list[Line], results: Results, variant: str, reference: str) -> str:
    """A variant and another, at the same strengths."""
    usual = {line.strength: line for line in found if line.variant == reference}
    pairs = [
        (line, usual[line.strength])
        for line in found
        if line.variant == variant and line.strength in usual
    ]
    return contrast(results, pairs, f"{variant} against {reference}")


def cure(results: Results) -> str:
    """Each part of CURE beside the whole, and each shift beside the automatic one.

    The norm's weight is another than the square's: it is not beside the whole.
    """
    found = lines(results)
    text = accuracies(results, "weight")
    for variant in dict.fromkeys(line.variant for line in found):
        name, _, shift = variant.partition(", shift ")
        reference = name if shift else "full"
        if variant not in ("full", "norm"):
            text += beside(found, results, variant, reference)
    return text


def combined(results: Results) -> str:
    """Every combination beside FGSM-RS alone, whatever the strength."""
    found = lines(results)
    alone = [line for line in found if line.variant == "FGSM-RS"]
    text = accuracies(results, "weight")
    for line in found:
        if alone and " + " in line.variant:
            title = f"{line.variant}, weight {line.strength:g}, against FGSM-RS"
            text += contrast(results, [(line, alone[0])], title)
    return text


def overfitting(results: Results) -> str:
    """PGD after the first, the best and the last epoch, beside FGSM."""
    setting = results["setting"]
    eps = short(setting["main_eps"])
    rows, found = [], lines(results)
    for line in found:
        epochs = [row["figures"] for row in line.rows.values()]
        rows.append(
            [
                line.variant,
                f"{line.strength:g}" if line.strength else "",
                f"{line.passes:.2f}",
                spread(f[-1]["clean"] for f in epochs),
                spread(f[-1]["fgsm"][0] for f in epochs),
                spread(f[0]["pgd"][0] for f in epochs),
                spread(max(each["pgd"][0] for each in f) for f in epochs),
                spread(f[-1]["pgd"][0] for f in epochs),
                f"{_overfit(line)} of {len(epochs)}",
            ]
        )
    pgd = f"PGD-{setting['pgd_steps']} at {eps}"
    header = ["fine-tuned with", "weight", "passes of a step", "clean", f"FGSM at {eps}"]
    header += [f"{pgd}, {when} epoch" for when in ("first", "best", "last")]
    text = table([*header, "seeds that overfit"], rows)
    return text + "".join(
        _stopped(line, found) for line in found if line.variant in ("FGSM", "FGSM-RS")
    )


def _overfit(line: Line) -> int:
    """How many seeds have learnt the single step alone."""
    last = [line.last(seed) for seed in line.rows]
    return sum(figures["fgsm"][0] > OVERFITS * figures["pgd"][0] for figures in last)


def _stopped(alone: Line, found: list[Line]) -> str:
    """What trains on every seed of the attack alone, and overfits in none."""
    stopped = [
        f"{line.variant}, weight {line.strength:g} "
        f"({spread(line.last(seed)['pgd'][0] for seed in line.rows)})"
        for line in found
        if line.variant.startswith(f"{alone.variant} + ") and not _overfit(line)
        if line.rows.keys() >= alone.rows.keys()
    ]
    return (
        f"- {alone.variant} alone overfits in {_overfit(alone)} of {len(alone.rows)} seeds; in no "
        f"seed, and with this PGD accuracy in the end: {'; '.join(stopped) or 'none'}.\n"
    )


def shift(results: Results) -> str:
    """Beside FGSM at the main eps, whatever the strength."""
    found = lines(results)
    usual = [
        line for line in found if line.variant == f"FGSM, eps {results['setting']['main_eps']:g}"
    ]
    text = accuracies(results, "lambda")
    for line in found:
        if usual and line.variant.startswith("TV") and line.strength == 1.0:
            text += contrast(results, [(line, usual[0])], f"{line.variant} against FGSM")
    return text


def kinks(results: Results) -> str:
    """Every way beside double backward, by activation."""
    found = {(line.variant, line.strength): line for line in lines(results)}
    text = accuracies(results, "weight")
    for name in dict.fromkeys(name for name, strength in found if strength):
        activation, way = name.split(", ", maxsplit=1)
        exact = f"{activation}, double backward"
        pairs = [
            (line, found[exact, strength])
            for (variant, strength), line in found.items()
            if variant == name != exact and (exact, strength) in found
        ]
        text += contrast(results, pairs, f"{activation}, {way} against double backward")
    return text
