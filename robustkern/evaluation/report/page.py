"""The report page: what an evaluation found, as one HTML file that asks for no network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from robustkern.evaluation.report import geometry, sections, signs
from robustkern.evaluation.report.markup import Html, Section, escape, paragraph, strong, table
from robustkern.evaluation.report.plots import label, svg
from robustkern.evaluation.report.verdict import NetworkVerdict, check_results, percent, verdict

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1.1rem; margin: 0; }
p { max-width: 46rem; }
a { color: #005a8e; }
nav ul { columns: 15rem; padding-left: 1.2rem; }
code, pre { font-size: .9rem; }
pre { white-space: pre-wrap; padding: .6rem; background: #f4f4f4; }
.verdict, .panels { display: grid; gap: 1rem; }
.verdict { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.card { border: 1px solid #bbb; border-left: 6px solid #0072b2; border-radius: 4px;
  padding: .8rem; break-inside: avoid; }
.card.doubt { border-left-color: #d55e00; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: .4rem 0; }
.card dd small { display: block; color: #555; }
.overview { margin: 1.5rem 0; }
.card dd { margin: 0; font-variant-numeric: tabular-nums; }
.card p, .card ul { margin: .3rem 0; font-size: .92rem; }
.card ul { padding-left: 1.1rem; }
figure { margin: 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; max-width: 32rem; }
svg text { font-family: system-ui, sans-serif !important; }
.grids { display: grid; gap: 0 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  white-space: normal; min-width: 6rem; max-width: 11rem; }
tbody th { font-weight: 400; }
.heat { display: block; margin: -.25rem -.6rem; padding: .25rem .6rem;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
td img { width: 3.2rem; image-rendering: pixelated; }
@media print { body { max-width: none; font-size: 11pt; } .scroll { overflow: visible; } }
"""
_SECTIONS = (
    sections.accuracy_section,
    sections.attacks_section,
    sections.ladder_section,
    signs.failures_section,
    signs.masking_section,
    signs.transfer_section,
    geometry.distances_section,
    signs.detection_section,
    signs.gradients_section,
    sections.noise_section,
    geometry.segments_section,
    geometry.geometry_section,
    geometry.images_section,
    signs.cost_section,
)
_LIMITS = (
    "An attack that fails proves nothing: a stronger one may succeed. Where gradients are hidden, "
    "gradient attacks fail on networks that are not robust (Athalye et al. 2018, “Obfuscated "
    "gradients give a false sense of security”), and the checks above find some such cases, not "
    "all (Carlini et al. 2019, “On evaluating adversarial robustness”). The numbers hold for these "
    "images and for changes within the stated radius, not for other changes. A defence should be "
    "attacked by someone who knows how it works."
)


def report_page(results: Mapping[str, Any]) -> str:
    """Write the results of an evaluation as a page for people.

    It opens with `verdict`; then comes a section for each thing that was measured. Everything is
    inside the file: no script, nothing to load. The same results give the same text.

    Args:
        results: of format 1, as `robustkern evaluate` writes them to `report.json`; what was not
            measured may be absent.

    Returns:
        A whole HTML document.

    Raises:
        ImportError: matplotlib is missing, the extra `plots`.
        TypeError: `results` is no mapping.
        ValueError: another format, or no network.
    """
    check_results("report_page", results)
    found = verdict(results)
    shown = [section for write in _SECTIONS if (section := write(results))]
    shown += [
        Section("limits", "What this does not show", paragraph(_LIMITS)),
        _provenance(results),
    ]
    contents = "".join(
        f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in shown
    )
    body = "".join(
        f'<section id="{section.anchor}">\n<h2>{escape(section.title)}</h2>\n{section.body}'
        "</section>\n"
        for section in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Robustness of {escape(', '.join(results['networks']))}</title>\n"
        f"<style>{_CSS}</style>\n</head>\n<body>\n<header>\n<h1>Robustness report</h1>\n"
        f"{_tested(results)}{_best(found)}</header>\n<main>\n"
        f'<section id="verdict" aria-label="Verdict">\n{_cards(found)}{_overview(found)}'
        f'</section>\n<nav aria-label="Contents">\n<h2>Contents</h2>\n<ul>{contents}</ul>\n</nav>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )


def _tested(results: Mapping[str, Any]) -> Html:
    data, count = results["data"], len(results["networks"])
    size = " x ".join(map(str, data["shape"]))
    return paragraph(
        f"{count} network{'s' if count > 1 else ''} on {data['images']:,} images of "
        f"{data.get('name', 'data')} ({size}, {data['classes']} classes), suite "
        f"“{results['suite']}”. Attacks may change each pixel, scaled to [0, 1], by up to "
        f"{_radius(results['radius'])}."
    )


def _radius(radius: float) -> str:
    levels = radius * 255
    if radius and abs(levels - round(levels)) < 1e-3:
        return f"{radius:.3g} ({round(levels)}/255)"
    return f"{radius:g}"


def _best(found: list[NetworkVerdict]) -> Html:
    measured = [each for each in found if each.worst is not None]
    if len(measured) < 2:
        return Html()
    best = max(measured, key=lambda each: each.worst or 0.0)
    text = (
        f"Most robust under the worst of all attacks: {strong(best.network)}, which keeps "
        f"{strong(percent(best.worst or 0.0))} right ({_interval(best)})."
    )
    if best.warnings:
        text += " That number is in doubt: see the warnings below."
    return Html(f"<p>{text}</p>\n")


def _interval(each: NetworkVerdict) -> str:
    low, high = map(percent, each.worst_interval or ())
    return f"95% interval {low} to {high}, n {each.worst_samples}"


def _cards(found: list[NetworkVerdict]) -> str:
    cards = []
    for each in found:
        clean = "not measured" if each.clean is None else percent(each.clean)
        strongest = worst = "not measured"
        if each.strongest is not None and each.strongest_accuracy is not None:
            strongest = (
                f"{escape(each.strongest)}, {percent(each.strongest_accuracy)}"
                f"<small>n {each.strongest_samples}</small>"
            )
        if each.worst is not None:
            worst = f"{strong(percent(each.worst))}<small>{_interval(each)}</small>"
        if each.warnings:
            items = "".join(f"<li>{escape(warning)}</li>" for warning in each.warnings)
            signs_found = f"<p><strong>Signs of hidden gradients:</strong></p><ul>{items}</ul>"
        elif each.checks:
            signs_found = (
                f"<p>No sign of hidden gradients; checks made: {len(each.checks)}. That proves "
                'nothing: see <a href="#limits">what this does not show</a>.</p>'
            )
        else:
            signs_found = "<p>Nothing looked for hidden gradients.</p>"
        cards.append(
            f'<article class="card{" doubt" if each.warnings else ""}">\n'
            f"<h3>{escape(each.network)}</h3>\n<dl>"
            f"<dt>Clean</dt><dd>{clean}</dd>"
            f"<dt>Worst of all attacks</dt><dd>{worst}</dd>"
            f"<dt>Strongest attack</dt><dd>{strongest}</dd></dl>\n{signs_found}</article>\n"
        )
    return f'<div class="verdict">\n{"".join(cards)}</div>\n'


def _overview(found: list[NetworkVerdict]) -> str:
    measured = [each for each in found if each.worst is not None]
    if not measured:
        return ""
    alt = "Clean accuracy and accuracy under the worst of all attacks with its 95% interval"
    height = 1.5 + 0.35 * len(measured)
    plot = svg("overview", alt, lambda axes: _draw_overview(axes, measured), width=6, height=height)
    return f'<figure class="overview">{plot}</figure>\n'


def _draw_overview(axes: Any, found: list[NetworkVerdict]) -> None:
    for row, each in enumerate(found):
        if each.worst is None or each.worst_interval is None:
            continue
        worst = 100 * each.worst
        low, high = (100 * end for end in each.worst_interval)
        first = row == 0
        axes.errorbar(
            worst,
            row,
            xerr=[[max(worst - low, 0)], [max(high - worst, 0)]],
            color="#D55E00",
            marker="s",
            capsize=3,
            linestyle="none",
            label="worst of all attacks" if first else None,
        )
        if each.clean is not None:
            axes.plot(
                100 * each.clean,
                row,
                color="#0072B2",
                marker="o",
                linestyle="none",
                label="clean" if first else None,
            )
    axes.set(xlim=(-2, 102), xlabel="accuracy (%)", ylim=(len(found) - 0.5, -0.5))
    axes.set_yticks(range(len(found)), [label(each.network) for each in found])


def _provenance(results: Mapping[str, Any]) -> Section:
    checkpoints = results.get("checkpoints", {})
    twins = results.get("twins", {})
    files = [[network, file, twins.get(network, "-")] for network, file in checkpoints.items()]
    versions = [list(each) for each in results.get("versions", {}).items()]
    tables = table("Checkpoints", ["network", "file", "twin"], files) + table(
        "Versions", ["what", "version"], versions
    )
    if not checkpoints:
        return Section("reproduce", "Versions", tables)
    settings = {
        "--suite": results["suite"],
        "--radius": results["radius"],
        "--eps": ",".join(map(str, results["eps"])),
        "--data": results["data"].get("source", results["data"]["name"]),
        "--data-folder": results["data"].get("folder"),
        "--test-size": results["data"]["images"],
        "--batch-size": results["batch_size"],
        "--seed": results["seed"],
        "--device": results.get("device"),
    }
    command = ["robustkern", "evaluate", *checkpoints.values()]
    if twins:
        command += ["--twins", *twins.values()]
    for option, value in settings.items():
        command += [] if value is None else [option, str(value)]
    text = "The command that makes this report again:"
    line = f"<pre><code>{escape(shlex.join(command))}</code></pre>\n"
    return Section("reproduce", "Versions and command", paragraph(text) + line + tables)
