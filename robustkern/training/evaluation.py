"""Evaluation of checkpoints: from files to a report, or as far as it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from robustkern.evaluation.report.page import report_page
from robustkern.evaluation.report.verdict import verdict
from robustkern.evaluation.suites.runner import LEAST_CALIBRATION, SUITES, evaluate_networks
from robustkern.training.checkpoint import checkpoint_names, load_checkpoint, restore_model
from robustkern.training.data import Dataset, load
from robustkern.training.extras import require
from robustkern.training.files import (
    atomic_path,
    fingerprint,
    output_folder,
    read_results,
    write_json,
)
from robustkern.training.report import percent, progress_bar, table, versions
from robustkern.training.session import check_fits, find_device, usual_eps, usual_radius

PAGE, REPORT, PARTIAL = "report.html", "report.json", "partial.json"
_HELD_OUT = 500  # for the detector: its threshold is known well enough


def evaluate(
    checkpoints: Sequence[str | Path],
    *,
    twins: Sequence[str | Path] = (),
    suite: str = "quick",
    eps: Sequence[float] | None = None,
    radius: float | None = None,
    data: str | None = None,
    data_folder: str | Path = "data",
    test_size: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "auto",
    output: str | Path = "robustkern-evaluation",
) -> dict[str, Any]:
    """Attack checkpoints' networks with a suite; write `report.html` and `report.json`.

    After each measure the results so far are written to `partial.json`, from which a run that was
    interrupted goes on. The networks are named after the checkpoints' folders.

    Args:
        checkpoints: files that `train` wrote.
        twins: as many others or none: each was trained like the checkpoint in its place, from
            another seed.
        suite: `quick`, `standard` or `full`, see `evaluation.evaluate_networks`.
        eps: L-infinity radii of the curves, in input units (pixels scaled to [0, 1]); None for
            `usual_eps`.
        radius: the main one; None for `usual_radius`.
        data: name or path of the data set; the one that the first was trained on when None.
        data_folder: where torchvision keeps its files.
        test_size: use the first so many test images. The detector and the universal perturbation
            are fitted to the 500 after them; where fewer than a tenth as many are left, or fewer
            than the detector needs, a tenth of all test images is held out for that, the last
            ones: at least 19, but no more than half.
        batch_size: samples per pass.
        seed: of the attacks.
        device: where to compute.
        output: folder for the report.

    Returns:
        What `report.json` holds.

    Raises:
        ImportError: tqdm, matplotlib or a library of the attacks is missing.
        OSError: the output folder cannot be written to.
        ValueError: no checkpoint, another number of twins, one that is its checkpoint, an unknown
            suite, a damaged checkpoint, images that a network does not take, an option out of
            range, or a folder with the partial results of another evaluation.
    """
    if not checkpoints or len(twins) not in (0, len(checkpoints)):
        raise ValueError(
            "evaluate: checkpoints must hold at least one and twins as many or none, "
            f"got {len(checkpoints)} and {len(twins)}"
        )
    for path, twin in zip(checkpoints, twins, strict=False):
        if Path(path).resolve() == Path(twin).resolve():
            raise ValueError(f"evaluate: twins must be other networks than checkpoints, got {path}")
    if suite not in SUITES:
        raise ValueError(f"evaluate: suite must be one of {', '.join(SUITES)}, got {suite}")
    folder = output_folder(output, "evaluate")
    require("matplotlib.figure", "plots")  # of the page, which comes last
    saved, others = (
        [load_checkpoint(path) for path in checkpoints],
        list(map(load_checkpoint, twins)),
    )
    chosen = saved[0]["options"]["data"] if data is None else data
    images = load(chosen, data_folder)
    for content in (*saved, *others):
        check_fits("evaluate", content["model"], images)
    inputs, targets, calibration = _split(images, test_size)
    names = checkpoint_names(checkpoints)
    place = find_device(device)
    radii = usual_eps(images) if eps is None else eps
    main = usual_radius(images) if radius is None else radius
    # What decides the results: those of another evaluation are not gone on with.
    made_with = {
        "suite": suite,
        "eps": list(radii),
        "radius": main,
        "test_size": test_size,
        "batch_size": batch_size,
        "seed": seed,
        "data": images.name,
        "device": place.type,
        "images": [fingerprint(each.numpy().tobytes()) for each in (inputs, targets, *calibration)],
        "checkpoints": {
            name: fingerprint(Path(path).read_bytes())
            for name, path in zip(names, checkpoints, strict=True)
        },
        "twins": [fingerprint(Path(path).read_bytes()) for path in twins],
        "robustkern": versions()["robustkern"],
    }
    partial = folder / PARTIAL
    results = read_results(partial, "evaluation", made_with, "results")
    matrix = SUITES[suite].transfer and len(names) + len(others) > 1
    items = len(SUITES[suite].items) * len(names) + matrix
    done = 0 if results is None else sum(map(len, results["networks"].values()))
    with progress_bar(items, "evaluate", initial=done, unit="measure") as bar:

        def progress(name: str, item: str) -> None:
            bar.set_description(f"{name}: {item}" if name else item)

        def save(so_far: dict[str, Any]) -> None:
            write_json(partial, {"made_with": made_with, "results": so_far})
            bar.update(1)

        results = evaluate_networks(
            {
                name: restore_model(content).to(place)
                for name, content in zip(names, saved, strict=True)
            },
            inputs,
            targets,
            eps=radii,
            radius=main,
            suite=suite,
            twins={
                name: restore_model(content).to(place)
                for name, content in zip(names, others, strict=False)
            },
            calibration=calibration,
            batch_size=batch_size,
            seed=seed,
            partial_results=results,
            save=save,
            progress=progress,
        )
    report = {
        **results,
        "data": {
            "name": images.name,
            "source": str(chosen),
            "folder": str(data_folder),
            **results["data"],
        },
        "device": place.type,
        "versions": versions(),
        "checkpoints": dict(zip(names, map(str, checkpoints), strict=True)),
        "twins": dict(zip(names, map(str, twins), strict=False)),
    }
    page = report_page(report)
    write_json(folder / REPORT, report)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    partial.unlink(missing_ok=True)
    return report


def verdict_text(report: Mapping[str, Any]) -> str:
    """Lay out what an evaluation found, a row for each network, and what speaks against it.

    Args:
        report: what `evaluate` returned.

    Returns:
        A table of the accuracies on clean images, under the strongest attack, and under all of
        them together, image by image; below it the warnings.
    """
    found = verdict(report)
    header = ["network", "clean", "strongest attack", "under it", "worst case", "warnings"]
    rows = [
        [
            each.network,
            _percent(each.clean),
            each.strongest or "none",
            _percent(each.strongest_accuracy),
            _percent(each.worst),
            str(len(each.warnings)),
        ]
        for each in found
    ]
    data = report["data"]
    return "\n".join(
        [
            f"{data['images']} images of {data['name']}, changed by up to {report['radius']:.4g}:",
            table(header, rows),
            *(f"{each.network}: {warning}" for each in found for warning in each.warnings),
        ]
    )


def _percent(fraction: float | None) -> str:
    return "none" if fraction is None else percent(fraction)


def _split(images: Dataset, size: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The images to evaluate on, their labels, and what is held out from them."""
    total = len(images.x_test)
    used = images.first(test=size)
    x, y = used.x_test, used.y_test
    count = len(x)
    if total - count < max(count // 10, LEAST_CALIBRATION):
        count = total - max(total // 10, min(LEAST_CALIBRATION, total // 2))
    held_out = slice(count, count + _HELD_OUT)
    return x[:count], y[:count], (images.x_test[held_out], images.y_test[held_out])
