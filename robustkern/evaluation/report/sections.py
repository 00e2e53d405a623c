"""Sections of the report page on what attacks leave right, and what all sections share.

Each takes the results of an evaluation and gives its section, or None where nothing of it was
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from robustkern.evaluation.report.markup import Html, Section, panels, paragraph, strong, table
from robustkern.evaluation.report.plots import label, style, svg
from robustkern.evaluation.report.verdict import percent, strongest_attack

Results = Mapping[str, Any]


def values(results: Results, item: str) -> dict[str, Any]:
    """For each network that has the item, its value."""
    return {
        network: items[item]["value"]
        for network, items in results["networks"].items()
        if items.get(item, {}).get("value") is not None
    }


def place(results: Results, network: str) -> int:
    """Which network it is: says how its lines look."""
    return list(results["networks"]).index(network)


def number(value: float | None) -> str:
    """Three digits of a number; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def share(value: float | None) -> str:
    """A percentage; a dash where there is none."""
    return "-" if value is None else percent(value)


def union(names: Sequence[Sequence[str]]) -> list[str]:
    """All names, each once, in the order in which they come."""
    return list(dict.fromkeys(name for each in names for name in each))


def _curves(results: Results, item: str, title: str, unit: str) -> tuple[list[Html], list[Html]]:
    found = values(results, item)
    if not found:
        return [], []

    def draw(axes: Any) -> None:
        for network, curve in found.items():
            look = style(place(results, network))
            shares = [
                [100 * fraction for fraction in curve[key]] for key in ("accuracy", "low", "high")
            ]
            axes.plot(curve["eps"], shares[0], label=label(network), **look)
            axes.fill_between(
                curve["eps"], *shares[1:], color=look["color"], alpha=0.15, linewidth=0
            )
        axes.set(title=title, xlabel=unit, ylabel="accuracy (%)", ylim=(-2, 102))

    radii = next(iter(found.values()))["eps"]
    rows = [
        [network, str(curve["samples"]), *map(percent, curve["accuracy"]), percent(curve["area"])]
        for network, curve in found.items()
        if list(curve["eps"]) == list(radii)
    ]
    header = ["network", "n", *(f"{eps:.3g}" for eps in radii), "mean"]
    caption = f"{title}: accuracy at each {unit}"
    return [svg(item, f"{caption}, a line per network", draw)], [table(caption, header, rows)]


def accuracy_section(results: Results) -> Section | None:
    """Accuracy against eps."""
    plots, tables = [], []
    for item, title, unit in (
        ("pgd_curve", "PGD, Linf", "eps"),
        ("fgsm_curve", "FGSM, Linf", "eps"),
        ("pgd_l2_curve", "PGD, L2", "eps (L2)"),
    ):
        plot, rows = _curves(results, item, title, unit)
        plots += plot
        tables += rows
    if not plots:
        return None
    text = (
        "How accuracy falls as attacks may change more: bands are 95% intervals, and “mean” is the "
        "accuracy averaged over the range of eps. Compare CURE, figures 6 and 15, and SGR's score, "
        "the area under the curve."
    )
    body = paragraph(text) + panels(plots) + "".join(tables)
    return Section("accuracy", "Accuracy against eps", body)


def attacks_section(results: Results) -> Section | None:
    """Every attack at the radius."""
    found = values(results, "attacks")
    if not found:
        return None
    attacks = union([list(value["accuracy"]) for value in found.values()])

    def cell(value: Mapping[str, Any], attack: str) -> str:
        if attack not in value["accuracy"]:
            return "-"
        text = percent(value["accuracy"][attack])
        if value["samples"][attack] != results["data"]["images"]:
            text += f" (n {value['samples'][attack]})"
        return strong(text) if attack == strongest_attack(value) else text

    rows = []
    for network, value in found.items():
        worst = value.get("worst")
        all_of_them = (
            f"{percent(worst['accuracy'])} ({percent(worst['low'])} to {percent(worst['high'])}, "
            f"n {worst['samples']})"
            if worst
            else "-"
        )
        rows.append([network, *(cell(value, attack) for attack in attacks), all_of_them])
    header = ["network", *attacks, "worst of all (95% interval)"]
    body = paragraph(
        "What each attack leaves right at the radius of the report; the strongest stands out. "
        "Where n is given, the attack was tried on so many of the images only. In the last column "
        "an image counts if it stands every attack that was tried on it; where n is smaller, the "
        "images that more attacks were tried on fare worse beyond chance, and only these count. "
        "Compare CURE, table 2, "
        "and the rule of Finlay et al. to attack with and without gradients."
    ) + table(f"Accuracy at radius {results['radius']:.3g}", header, rows)

    targeted = [
        [network, percent(value["accuracy"]), percent(value["reached"])]
        for network, value in values(results, "targeted").items()
    ]
    header = ["network", "accuracy", "reached the target"]
    body += table("PGD towards a random other class (SGR, T-PGD)", header, targeted)
    return Section("attacks", "Attacks at the radius", body)


def ladder_section(results: Results) -> Section | None:
    """From weak attacks to strong ones."""
    found = values(results, "ladder")
    if not found:
        return None
    steps = union([list(value["accuracy"]) for value in found.values()])

    def draw(axes: Any) -> None:
        for network, value in found.items():
            shares = [100 * value["accuracy"].get(step, math.nan) for step in steps]
            axes.plot(steps, shares, label=label(network), **style(place(results, network)))
        axes.set(ylabel="accuracy (%)", ylim=(-2, 102))
        axes.tick_params(axis="x", labelsize=9)

    rows = [
        [
            network,
            *(share(value["accuracy"].get(step)) for step in steps),
            f"{100 * value['gap']:.1f}",
        ]
        for network, value in found.items()
    ]
    caption = f"Accuracy under attacks of rising strength at radius {results['radius']:.3g}"
    body = (
        paragraph(
            "A large gap between the weakest attack and the strongest tells of a curved loss; "
            "accuracy that rises along the ladder tells of hidden gradients. Compare CURE, "
            "table 1."
        )
        + panels([svg("ladder", f"{caption}, a line per network", draw)])
        + table(caption, ["network", *steps, "gap (points)"], rows)
    )
    return Section("ladder", "Attack ladder", body)


def noise_section(results: Results) -> Section | None:
    """Long-range-correlated noise."""
    plots, tables = _curves(
        results, "lrc_curve", "Long-range-correlated noise", "standard deviation"
    )
    if not plots:
        return None
    text = (
        "Accuracy under the worst of many draws of noise whose neighbouring pixels agree, like "
        "stains and shadows; no gradient is asked for. Compare SGR, figure 4."
    )
    return Section("noise", "Noise", paragraph(text) + panels(plots) + "".join(tables))
