"""Analysis of checkpoints: from files to the papers' figures, or as many as were finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustkern.analysis.samples import check_count, check_length
from robustkern.training.checkpoint import checkpoint_names, load_checkpoint, restore_model
from robustkern.training.data import load
from robustkern.training.extras import require
from robustkern.training.figures import FIGURES, LeftOut
from robustkern.training.files import (
    atomic_path,
    fingerprint,
    output_folder,
    read_results,
    write_json,
)
from robustkern.training.portrait import Portrait
from robustkern.training.report import percent, progress_bar, table, versions
from robustkern.training.session import check_fits, find_device

H = 1.5  # the CURE paper's


def analyze(
    checkpoints: Sequence[str | Path],
    *,
    figures: Sequence[str] = tuple(FIGURES),
    h: float = H,
    data: str | None = None,
    data_folder: str | Path = "data",
    test_size: int = 1000,
    seed: int = 0,
    device: str = "auto",
    output: str | Path = "robustkern-analysis",
) -> dict[str, Any]:
    r"""Draw the papers' figures of checkpoints' networks, side by side.

    Each figure's data are written to `<figure>.json` as soon as they are found, its pictures to
    `<figure>.png` or, where there are several, `<figure>-<which>.png`. A figure whose data are in
    the folder is not computed again, so a run that was interrupted goes on. The networks, which are
    taken in eval mode, are named after the checkpoints' folders.

    Args:
        checkpoints: files that `train` wrote.
        figures: of those of `training.figures.FIGURES`.
        h: L2 length of finite differences, in input units (pixels scaled to [0, 1]).
        data: name or path of the data set; the one that the first was trained on when None.
        data_folder: where torchvision keeps its files.
        test_size: use the first so many test images, at least 2. The alignment is measured on all,
            the profile on 100 at most, what needs adversarial images on 200.
        seed: of random directions, not negative.
        device: where to compute.
        output: folder for the figures.

    Returns:
        "figures", for each name its data; "left_out", for each that these networks do not have the
        reason; and the "networks" with their "checkpoints".

    Raises:
        ImportError: matplotlib, tqdm or foolbox is missing.
        OSError: the output folder cannot be written to.
        TypeError: one path or name in place of a sequence, or a number of another type.
        ValueError: no checkpoint, an unknown figure, a damaged checkpoint, images that a network
            does not take or fewer than two, outputs that are not finite, an option out of range,
            or a folder with figures of other options.
    """
    for argument, given in (("checkpoints", checkpoints), ("figures", figures)):
        if isinstance(given, str | Path):
            raise TypeError(f"analyze: {argument} must be a sequence, got {given!r}")
    if not checkpoints:
        raise ValueError("analyze: checkpoints must hold at least one, got none")
    unknown = [name for name in figures if name not in FIGURES]
    if unknown or not figures:
        raise ValueError(
            f"analyze: figures must be of {', '.join(FIGURES)}, got {', '.join(unknown) or 'none'}"
        )
    check_length("analyze", "h", h)
    check_count("analyze", "test_size", test_size, 2)
    check_count("analyze", "seed", seed, 0)
    folder = output_folder(output, "analyze")
    require("matplotlib.figure", "plots")
    if any(FIGURES[name].attacks for name in figures):
        require("foolbox", "eval")
    saved = [load_checkpoint(path) for path in checkpoints]
    chosen = saved[0]["options"]["data"] if data is None else data
    images = load(chosen, data_folder).first(test=test_size)
    if len(images.x_test) < 2:
        raise ValueError(
            f"analyze: data {images.name} must hold at least 2 test images, "
            f"got {len(images.x_test)}"
        )
    for content in saved:
        check_fits("analyze", content["model"], images)
    names, place = checkpoint_names(checkpoints), find_device(device)
    networks = {}
    for name, content in zip(names, saved, strict=True):
        model = restore_model(content).to(place)
        inputs = images.x_test.to(next(model.parameters()))
        targets = images.y_test.to(place)
        with torch.no_grad():
            if not model(inputs[:1]).isfinite().all():
                raise ValueError(f"analyze: network {name} must have finite outputs, got others")
        networks[name] = Portrait(model, inputs, targets, content["log"], seed, h)
    made_with = {
        "h": h,
        "test_size": len(images.x_test),
        "seed": seed,
        "data": images.name,
        "images": fingerprint(images.x_test.numpy().tobytes()),
        "checkpoints": {
            name: fingerprint(Path(path).read_bytes())
            for name, path in zip(names, checkpoints, strict=True)
        },
        "robustkern": versions()["robustkern"],
    }
    found = {
        name: read_results(folder / f"{name}.json", "analysis", made_with, "data")
        for name in figures
    }
    left_out = {}
    with progress_bar(len(figures), "analyze", unit="figure") as bar:
        for name in figures:
            bar.set_description(name)
            try:
                if found[name] is None:
                    found[name] = _rounded(FIGURES[name].measure(networks))
                    content = {"made_with": made_with, "versions": versions(), "data": found[name]}
                    write_json(folder / f"{name}.json", content, indent=None)
                for which, figure in FIGURES[name].draw(found[name]).items():
                    with atomic_path(folder / f"{name}{which}.png") as temporary:
                        figure.savefig(temporary, dpi=120, metadata={"Software": None})
            except LeftOut as reason:
                left_out[name] = str(reason)
            bar.update(1)
    return {
        "networks": dict(zip(names, map(str, checkpoints), strict=True)),
        "figures": {name: data for name, data in found.items() if data is not None},
        "left_out": left_out,
    }


def analysis_text(report: Mapping[str, Any]) -> str:
    """Lay out what an analysis found, a row for each network, and what was left out.

    Args:
        report: what `analyze` returned.

    Returns:
        The table, with the columns that its figures have, and a line for each that is left out.
    """
    found = report["figures"]
    columns: dict[str, Mapping[str, str]] = {}
    if "profile" in found:
        for view, title in (("finite", "largest eigenvalue, h"), ("exact", "at the point")):
            columns[title] = {
                name: f"{of_network['mean'][0]:.3g}"
                for name, of_network in found["profile"][view].items()
            }
    if "alignment" in found:
        columns["alignment"] = {
            name: _mean(of_network["cosines"])
            for name, of_network in found["alignment"]["networks"].items()
        }
    if "bounds" in found:
        margin = found["bounds"]["margin"]
        columns["median distance"] = {
            name: _median(of_network["distances"]) for name, of_network in margin.items()
        }
        columns["within bounds"] = {name: _within(each) for name, each in margin.items()}
        columns["misclassified"] = {name: str(each["excluded"]) for name, each in margin.items()}
    lines = []
    if columns:
        rows = [[name, *(each[name] for each in columns.values())] for name in report["networks"]]
        lines = [table(["network", *columns], rows)]
    if "bounds" in found:
        lines.append("bounds are a local quadratic estimate, not a certificate")
    lines += [f"{name} is left out: {reason}" for name, reason in report["left_out"].items()]
    without = found.get("evolution", {}).get("without")
    if without:
        lines.append(f"evolution is without {', '.join(without)}, whose logs have no curvature")
    return "\n".join(lines)


def _rounded(data: Any) -> Any:
    """Numbers to six digits, more than a picture shows, in a file of a third of the size."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "none"


def _median(values: Sequence[float | None]) -> str:
    found = [math.inf if value is None else value for value in values]
    return f"{statistics.median(found):.3g}" if found else "none"


def _within(bounds: Mapping[str, Any]) -> str:
    """Share of the distances that lie between their bounds."""
    inside = [
        distance is not None and lower is not None and lower <= distance
        and (upper is None or distance <= upper)
        for lower, distance, upper in zip(
            bounds["lower"], bounds["distances"], bounds["upper"], strict=True
        )
    ]  # fmt: skip
    return percent(sum(inside) / len(inside)) if inside else "none"
