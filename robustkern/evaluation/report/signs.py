"""Sections of the report page on hidden gradients, detection, gradient norms and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from robustkern.evaluation.report.markup import (
    Html,
    Section,
    panels,
    paragraph,
    shaded,
    strong,
    table,
)
from robustkern.evaluation.report.plots import label, style, svg
from robustkern.evaluation.report.sections import Results, number, place, share, union, values
from robustkern.evaluation.report.verdict import percent

_INDICATORS = {
    "zero_gradients": "zero gradients",
    "flat_loss": "loss not raised",
    "black_box_stronger": "attack without gradients ahead by",
    "robust_at_large_eps": "right at a hopeless eps",
}


def failures_section(results: Results) -> Section | None:
    """Failure indicators and label leaking."""
    failures, leaking = values(results, "failures"), values(results, "label_leaking")
    if not failures and not leaking:
        return None
    rows = [
        [network, *(_indicator(value.get(name)) for name in _INDICATORS)]
        for network, value in failures.items()
    ]
    leaks = [
        [
            network,
            *(percent(value[key]) for key in ("clean", "true_labels", "predicted_labels")),
            strong("yes") if value["leaks"] else "no",
        ]
        for network, value in leaking.items()
    ]
    header = ["network", "clean", "true labels", "predicted labels", "leaks"]
    body = (
        paragraph(
            "Checks that tell a robust network from an attack that failed; what stands out is "
            "raised. They follow Athalye et al. 2018, Carlini et al. 2019 and, for label leaking, "
            "Kurakin et al. 2017 and SGR's check."
        )
        + table("Failure indicators", ["network", *_INDICATORS.values()], rows)
        + table("Accuracy under FGSM that knew these labels", header, leaks)
    )
    return Section("failures", "Failure indicators", body)


def _indicator(indicator: Mapping[str, Any] | None) -> str:
    if indicator is None:
        return "-"
    text = percent(indicator["value"])
    return strong(f"{text} raised") if indicator["raised"] else text


def masking_section(results: Results) -> Section | None:
    """Logit gaps under two attacks."""
    found = values(results, "masking")
    if not found:
        return None
    plots = [
        svg(
            f"masking-{place(results, network)}",
            f"Logit gap of {network} under the attack without gradients against the gap under the "
            f"gradient attack; {percent(value['below'])} of the points lie below the diagonal",
            partial(_draw_gaps, network=network, value=value, look=style(place(results, network))),
        )
        for network, value in found.items()
    ]
    rows = [
        [network, percent(value["below"]), str(len(value["white_box"]))]
        for network, value in found.items()
    ]
    text = (
        "Each point is an image: how far the true class leads after a gradient attack (across) and "
        "after one without gradients (up). Points below the diagonal are images at which the "
        "attack without gradients did better. Compare CURE, figure 7."
    )
    header = ["network", "below the diagonal", "n"]
    body = paragraph(text) + panels(plots) + table("Logit gaps", header, rows)
    return Section("masking", "Gradient masking", body)


def _draw_gaps(axes: Any, network: str, value: Mapping[str, Any], look: Mapping[str, Any]) -> None:
    white, black = value["white_box"], value["black_box"]
    low, high = min(*white, *black), max(*white, *black)
    axes.plot([low, high], [low, high], color="#555555", linewidth=1)
    # As pixels: a thousand points as elements would make the page heavy.
    axes.plot(
        white,
        black,
        linestyle="none",
        marker=look["marker"],
        color=look["color"],
        markersize=3,
        alpha=0.5,
        rasterized=True,
    )
    axes.set(title=label(network), xlabel="logit gap, gradient attack")
    axes.set_ylabel("logit gap, no gradients")


def transfer_section(results: Results) -> Section | None:
    """Attacks made on one network and tried on another."""
    matrix = (results.get("transfer") or {}).get("value")
    if not matrix:
        return None
    rows = []
    for network, shares in zip(matrix["evaluated"], matrix["accuracy"], strict=True):
        cells = []
        for source, fraction in zip(matrix["sources"], shares, strict=True):
            text = percent(fraction)
            cells.append(shaded(strong(text) if source == network else text, fraction))
        rows.append([network, *cells])
    body = paragraph(
        "Accuracy of each network (rows) on images made to fool another (columns). Where both are "
        "one network the attack is white box, and stands out; a lower number elsewhere in its row "
        "tells of hidden gradients. Compare SGR, table 1."
    ) + table("Accuracy on transferred PGD images", ["evaluated", *matrix["sources"]], rows)
    return Section("transfer", "Transfer", body)


def detection_section(results: Results) -> Section | None:
    """The detector of large gradient norms."""
    found = values(results, "detection")
    if not found:
        return None
    # A colour means the same attack in every panel.
    attacks = union([list(value["attacks"]) for value in found.values()])
    flagged = [
        [
            network,
            percent(value["false_positive_rate"]),
            *(_flagged(value["attacks"].get(attack)) for attack in attacks),
        ]
        for network, value in found.items()
    ]
    distances = [
        [
            network,
            *(
                number(value["attacks"].get(attack, {}).get("median_distance"))
                for attack in attacks
            ),
        ]
        for network, value in found.items()
    ]
    plots = [
        svg(
            f"roc-{place(results, network)}",
            f"Receiver operating characteristic of the detector on {network}, a line per attack",
            partial(_draw_roc, network=network, value=value, attacks=attacks),
        )
        for network, value in found.items()
        if any(value.get("roc", {}).values())
    ]
    text = (
        "How many of the images that fool the network are flagged by the norm of their gradient, "
        "at a threshold set on other clean images. The evasive attack knows of the detector. In "
        "parentheses stands the area under each curve. Compare Finlay et al., the slides."
    )
    body = (
        paragraph(text)
        + panels(plots)
        + table(
            "Flagged, of n images that fool the network",
            ["network", "clean (false positives)", *attacks],
            flagged,
        )
        + table("Their median distance (L2)", ["network", *attacks], distances)
    )
    return Section("detection", "Detection", body)


def _flagged(attack: Mapping[str, Any] | None) -> str:
    if attack is None:
        return "-"
    return f"{share(attack['flagged'])} (n {attack['fooled']})"


def _draw_roc(axes: Any, network: str, value: Mapping[str, Any], attacks: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=1)
    for attack, curve in value["roc"].items():
        if curve is None:  # it fooled no image
            continue
        look = {**style(attacks.index(attack)), "marker": None}
        name = label(f"{attack} ({curve['auc']:.2f})")
        axes.plot(curve["false_positive"], curve["true_positive"], label=name, **look)
    axes.set(title=label(network), xlabel="clean images flagged", ylabel="attacked images flagged")


def gradients_section(results: Results) -> Section | None:
    """Gradient norms, over the data and under attack."""
    found = values(results, "gradients")
    if not found:
        return None
    rows = [
        [
            network,
            *(number(value[of][key]) for of in ("loss", "outputs") for key in ("mean", "max")),
        ]
        for network, value in found.items()
    ]
    plots = [
        svg(
            f"norms-{place(results, network)}",
            f"Histogram of the gradient norms of {network}, of clean and of attacked images",
            partial(_draw_norms, network=network, value=value),
        )
        for network, value in found.items()
        if value.get("clean_norms") and value.get("pgd_norms")
    ]
    text = (
        "How steep the loss and the outputs are at the images: what the penalties make small. The "
        "largest over these images bounds no other image's. Compare Finlay et al., table 2, "
        "and the histograms of their slides."
    )
    header = ["network", "loss, mean", "loss, largest", "outputs, mean", "outputs, largest"]
    caption = "L2 norm of the gradient of the loss, and 2,∞ norm of the outputs'"
    body = paragraph(text) + panels(plots) + table(caption, header, rows)
    return Section("gradients", "Gradient norms", body)


def _draw_norms(axes: Any, network: str, value: Mapping[str, Any]) -> None:
    groups = {"clean": value["clean_norms"], "attacked": value["pgd_norms"]}
    # Norms span many powers of ten; zeros stand in the first bin.
    logs = {
        name: [math.log10(max(norm, 1e-12)) for norm in norms] for name, norms in groups.items()
    }
    low, high = (end(end(each) for each in logs.values()) for end in (min, max))
    edges = [low + (high - low or 1) * step / 30 for step in range(31)]
    for kind, (name, norms) in enumerate(logs.items()):
        axes.hist(
            norms,
            bins=edges,
            weights=[100 / len(norms)] * len(norms),
            label=f"{name} (n {len(norms)})",
            color=style(kind)["color"],
            histtype="stepfilled",
            alpha=0.55,
        )
    axes.set(title=label(network), ylabel="images (%)")
    axes.set_xlabel("norm of the gradient, power of ten")


def cost_section(results: Results) -> Section | None:
    """Passes and seconds of each item."""
    networks = results["networks"]
    items = union([list(each) for each in networks.values()])
    rows = [[name, *(_cost(each.get(name)) for each in networks.values())] for name in items]
    body = paragraph(
        "Forward and backward passes of the network per image, and seconds. An item counts all the "
        "attacks it looks at, also those that it shares with others and that were made only once."
    ) + table("Cost: forward + backward passes, seconds", ["item", *networks], rows)
    if transfer := results.get("transfer"):
        body += paragraph(f"The transfer matrix took {_cost(transfer)}.")
    return Section("cost", "Cost", Html(body))


def _cost(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "-"
    return f"{record['forward']:.1f} + {record['backward']:.1f}, {record['seconds']:.1f} s"
