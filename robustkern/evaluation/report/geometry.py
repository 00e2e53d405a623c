"""Sections of the report page on single images: how far, which way, what they look like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from robustkern.evaluation.report.markup import Html, Section, panels, paragraph, table
from robustkern.evaluation.report.plots import label, png, style, svg
from robustkern.evaluation.report.sections import Results, number, place, union, values
from robustkern.evaluation.report.verdict import percent, strongest_attack


def distances_section(results: Results) -> Section | None:
    """How far the nearest adversarial inputs are."""
    found = values(results, "distances")
    attacks = union([list(value) for value in found.values()])
    rows = [
        [network, *(_distance(value.get(attack)) for attack in attacks)]
        for network, value in found.items()
    ]
    standing = [
        [network, *(_standing(value.get(attack)) for attack in attacks)]
        for network, value in found.items()
    ]
    robustness = [
        [network, number(value["rho"]), str(value["changed"]), str(value["unchanged"])]
        for network, value in values(results, "deepfool_robustness").items()
    ]
    if not rows and not robustness:
        return None
    norms = {
        attack: f"{attack} (L{float(each['p']):g})"
        for value in found.values()
        for attack, each in value.items()
    }
    body = (
        paragraph(
            "How far, in pixels scaled to [0, 1], the nearest adversarial image is that an attack "
            "found: farther is better. The median counts images that the attack could not fool as "
            "farthest of all, the mean leaves them out. Compare Finlay et al., table 2, and "
            "Moosavi-Dezfooli et al. 2016, equation 2."
        )
        + table(
            "Median distance, and the mean",
            ["network", *(norms[attack] for attack in attacks)],
            rows,
        )
        + table(
            "Images not fooled, of those classified right before", ["network", *attacks], standing
        )
        + table(
            "DeepFool robustness: length of the perturbation beside the image's own",
            ["network", "rho", "changed", "unchanged"],
            robustness,
        )
    )
    return Section("distances", "Adversarial distances", body)


def _distance(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    if value["misclassified"] == value["samples"]:
        return "-"
    median = number(value["median"]) if _finite(value["median"]) else "half or more stand"
    return f"{median} (mean {number(value['mean'])})"


def _standing(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"{value['standing']} of {value['samples'] - value['misclassified']}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def segments_section(results: Results) -> Section | None:
    """The softmax on the way from clean to adversarial images."""
    found = values(results, "segments")
    if not found:
        return None
    plots = []
    for network, value in found.items():
        for sample, steps in enumerate(value["probabilities"]):
            name = f"{label(network)}, true class {value['labels'][sample]}"
            plots.append(
                svg(
                    f"segment-{place(results, network)}-{sample}",
                    f"Class probabilities of {name} on the way from clean to adversarial",
                    partial(_draw_segment, steps=steps, name=name),
                    height=3.2,
                )
            )
    text = (
        "What a network says on the straight way from a clean image (0) to its adversarial one "
        "(1); only classes that reach 10% somewhere are named. Compare SGR, figure 6."
    )
    return Section("segments", "Softmax along segments", paragraph(text) + panels(plots))


def _draw_segment(axes: Any, steps: Sequence[Sequence[float]], name: str) -> None:
    way = [step / (len(steps) - 1) for step in range(len(steps))]
    for kind, shares in enumerate(zip(*steps, strict=True)):
        if max(shares) >= 0.1:
            look = {**style(kind), "markevery": max(len(way) // 5, 1)}
            axes.plot(way, shares, label=f"class {kind}", **look)
    axes.set(title=name, xlabel="clean to adversarial", ylabel="probability", ylim=(-0.02, 1.02))


def geometry_section(results: Results) -> Section | None:
    """Random subspaces and the universal perturbation."""
    subspaces, universal = values(results, "subspace"), values(results, "universal")
    if not subspaces and not universal:
        return None
    size = math.prod(results["data"]["shape"])
    plots = []
    if subspaces:
        plots.append(
            svg(
                "subspace",
                "Median distance in random subspaces against their dimension, a line per network, "
                "beside the law of flat boundaries",
                lambda axes: _draw_subspaces(axes, results, subspaces, size),
            )
        )
    header = ["network", "eps (Linf)", "images fooled"]
    rows = [
        [network, number(value["eps"]), percent(value["fooled"])]
        for network, value in universal.items()
    ]
    text = (
        "Attacks that may move within a random subspace only: where boundaries are flat, the "
        "distance grows as √(d/m), d dimensions of the image, m of the subspace (dotted, through "
        "each network's last point). And one perturbation for all images at once. Compare "
        "the talk of Moosavi-Dezfooli and Fawzi on the geometry of boundaries."
    )
    body = paragraph(text) + panels(plots)
    body += table("One perturbation for all images", header, rows)
    return Section("geometry", "Subspaces and a universal perturbation", body)


def _draw_subspaces(axes: Any, results: Results, found: Mapping[str, Any], size: int) -> None:
    for network, value in found.items():
        points = [
            (m, median)
            for m, median in zip(value["dimensions"], value["median_distance"], strict=True)
            if _finite(median)
        ]
        if not points:
            continue
        look = style(place(results, network))
        axes.plot(*zip(*points, strict=True), label=label(network), **look)
        last, distance = points[-1]
        law = [distance * math.sqrt(last / m) for m, _ in points]
        axes.plot([m for m, _ in points], law, color=look["color"], linestyle=":", linewidth=1.5)
    axes.set_xlabel(f"dimension m of the subspace (of {size})")
    axes.set_ylabel("median distance (L2)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def images_section(results: Results) -> Section | None:
    """A grid of clean and adversarial images."""
    found = values(results, "images")
    if not found:
        return None
    text = (
        "The same images clean and attacked: by the strongest attack at the radius and, where "
        "measured, by those that look for the nearest adversarial image and by "
        "long-range-correlated noise (LRC). Below each stands the network's prediction, "
        "with a cross where it is wrong. Compare CURE, figure 11, and Finlay et al.'s slides."
    )
    tables = ""
    for network, value in found.items():
        items = results["networks"][network]
        # Attacks within one radius look alike, so the strongest stands for them.
        alike = items["attacks"]["value"] if "attacks" in items else {"accuracy": {}}
        hidden = set(alike["accuracy"])
        if hidden:
            hidden.remove(strongest_attack(alike))
        pictures = {"clean": value["clean"], **value["adversarial"]}
        rows = [
            [name, *_pictures(name, shown, value["labels"], value["predictions"][name])]
            for name, shown in pictures.items()
            if name not in hidden
        ]
        header = ["", *(f"true {true}" for true in value["labels"])]
        tables += table(f"Images of {network}", header, rows)
    return Section("images", "Images", f'{paragraph(text)}<div class="grids">{tables}</div>\n')


def _pictures(
    name: str, pictures: Sequence[Any], labels: Sequence[int], said: Sequence[int]
) -> list[Html]:
    return [
        Html(
            f"{png(pixels, f'{name}, true class {true}')}<br>"
            f"{prediction}{'' if prediction == true else ' ✗'}"
        )
        for pixels, true, prediction in zip(pictures, labels, said, strict=True)
    ]
