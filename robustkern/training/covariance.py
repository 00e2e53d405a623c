"""Pictures of what SGR learns: how perturbations correlate, and what correlated noise does."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.covariance import CovarianceFunction
from robustkern.evaluation import deepfool_source, fgsm_source, lrc_accuracy, pgd_source
from robustkern.evaluation.perturbations import Source
from robustkern.training.checkpoint import load_checkpoint, restore_model
from robustkern.training.data import Dataset, load
from robustkern.training.extras import require
from robustkern.training.files import atomic_path, output_folder, write_json
from robustkern.training.models import Shape
from robustkern.training.report import percent, progress_bar, table, versions
from robustkern.training.session import check_fits, find_device, usual_eps
from robustkern.training.trainer import Advance

DECAY_LENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
EPS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
_DATA = "data"
_SHOWN = 8  # images in the picture of samples
_PATCH = 32  # pixels a side of which the matrix is drawn: a thousand rows, as a screen has


@dataclass(frozen=True)
class Functions:
    """A covariance against distance in pixels, within channels and between them, and its length."""

    radii: tuple[float, ...]
    within: tuple[float, ...]
    between: tuple[float, ...] | None
    decay_length: float | None  # none: it does not fall to 1/e within the image


def covariance_report(
    checkpoints: Sequence[str | Path],
    *,
    data: str | None = None,
    data_folder: str | Path = "data",
    test_size: int = 500,
    attack_eps: float | None = None,
    eps: Sequence[float] = EPS,
    decay_lengths: Sequence[float] = DECAY_LENGTHS,
    draws: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "auto",
    output: str | Path = "robustkern-covariance",
) -> dict[str, Any]:
    """Draw the covariances of perturbations and of the data, and accuracy under correlated noise.

    The perturbations are those of FGSM, PGD and, if foolbox is installed, DeepFool, against the
    networks' own predictions. LRC accuracy is measured for every eps at the middle decay length,
    and for every decay length at the middle eps.

    Args:
        checkpoints: files that `train` wrote.
        data: name or path of the data set; the one that the first was trained on when None.
        data_folder: where torchvision keeps its files.
        test_size: use the first so many test images.
        attack_eps: L-infinity radius of FGSM and PGD; the second of `usual_eps` when None.
        eps: standard deviations of the noise.
        decay_lengths: of the noise, in pixels.
        draws: of the noise, per image.
        batch_size: samples per pass.
        seed: of the noise.
        device: where to compute.
        output: folder for `matrices.png`, `functions.png`, `samples.png`, `accuracy.png` and
            `covariance.json`.

    Returns:
        What the JSON file holds.

    Raises:
        ImportError: matplotlib or tqdm is missing.
        OSError: the output folder cannot be written to.
        ValueError: no checkpoint, eps or decay length; a damaged checkpoint; or images that a
            network does not take.
    """
    for name, given in (
        ("checkpoints", checkpoints),
        ("eps", eps),
        ("decay_lengths", decay_lengths),
    ):
        if not given:
            raise ValueError(f"covariance_report: {name} must not be empty, got {given}")
    folder = output_folder(output, "covariance")
    require("matplotlib.figure", "plots")
    saved = {str(path): load_checkpoint(path) for path in checkpoints}
    chosen = next(iter(saved.values()))["options"]["data"] if data is None else data
    images = load(chosen, data_folder).first(test=test_size)
    for content in saved.values():
        check_fits("covariance", content["model"], images)
    models = {
        path: restore_model(content).to(find_device(device)) for path, content in saved.items()
    }
    radius = usual_eps(images)[1] if attack_eps is None else attack_eps
    middle = eps[len(eps) // 2], decay_lengths[len(decay_lengths) // 2]

    found: dict[str, dict[str, CovarianceFunction]] = {}
    accuracies: dict[str, dict[str, list[float]]] = {}
    sources = {path: _sources(model, radius) for path, model in models.items()}
    work = sum(len(of_model) + len(eps) + len(decay_lengths) for of_model in sources.values())
    with progress_bar(work * len(images.x_test), "perturbations") as bar:
        for path, model in models.items():
            found[path] = _covariances(model, images, sources[path], batch_size, bar.update)
        bar.set_description("LRC accuracy")
        for path, model in models.items():
            accuracies[path] = _lrc_accuracies(
                model,
                images,
                eps,
                decay_lengths,
                middle,
                draws=draws,
                seed=seed,
                batch_size=batch_size,
                advance=bar.update,
            )
    samples = _samples(images, middle[0], decay_lengths, models, sources, seed)
    functions = {
        path: {source: _functions(covariance) for source, covariance in of_model.items()}
        for path, of_model in found.items()
    }
    content = {
        "data": chosen,
        "test_images": len(images.x_test),
        "attack_eps": radius,
        "draws": draws,
        "seed": seed,
        "eps": list(eps),
        "eps_of_decay_lengths": middle[0],
        "decay_lengths": list(decay_lengths),
        "decay_length_of_eps": middle[1],
        "networks": {
            path: {
                "covariances": {
                    source: dataclasses.asdict(curves) for source, curves in functions[path].items()
                },
                "lrc_accuracy": accuracies[path],
            }
            for path in models
        },
        "versions": versions(),
    }
    write_json(folder / "covariance.json", content)
    _plot_matrices(found, folder / "matrices.png")
    _plot_functions(functions, folder / "functions.png")
    _plot_samples(samples, middle[0], radius, folder / "samples.png")
    _plot_accuracy(content, folder / "accuracy.png")
    return content


def covariance_table(content: Mapping[str, Any]) -> str:
    """Lay out what `covariance_report` found: decay lengths, and accuracy under the noise.

    Args:
        content: what it returned.

    Returns:
        The table, a row for each network.
    """
    networks = content["networks"]
    sources = next(iter(networks.values()))["covariances"]
    header = ["network", *(f"decay length, {source}" for source in sources)]
    header += [f"LRC at {eps:g}" for eps in content["eps"]]
    rows = [
        [
            path,
            *(_pixels(curves["decay_length"]) for curves in network["covariances"].values()),
            *map(percent, network["lrc_accuracy"]["eps"]),
        ]
        for path, network in networks.items()
    ]
    return table(header, rows)


def _sources(model: nn.Module, eps: float) -> dict[str, Source]:
    sources = {"FGSM": fgsm_source(model, eps), "PGD": pgd_source(model, eps)}
    with contextlib.suppress(ImportError):
        sources["DeepFool"] = deepfool_source(model)
    return sources


def _covariances(
    model: nn.Module,
    images: Dataset,
    sources: Mapping[str, Source],
    batch_size: int,
    advance: Advance,
) -> dict[str, CovarianceFunction]:
    """That of the data and those of the perturbations, on the CPU."""
    place = next(model.parameters())
    batches = torch.split(images.x_test, batch_size)
    mean = images.x_test.mean(0)
    found = {_DATA: _covariance((batch - mean for batch in batches), images.shape)}

    def perturbations(source: Source) -> Iterable[Tensor]:
        for batch in batches:
            inputs = batch.to(place)
            yield source(inputs, inputs).cpu()
            advance(len(batch))

    for name, source in sources.items():
        found[name] = _covariance(perturbations(source), images.shape)
    return found


def _covariance(perturbations: Iterable[Tensor], shape: Shape) -> CovarianceFunction:
    covariance, seen = CovarianceFunction(*shape), 0
    for perturbation in perturbations:
        seen += len(perturbation)
        covariance.decay = len(perturbation) / seen  # the running average is the mean of them all
        covariance.update(perturbation)
    return covariance


def _lrc_accuracies(
    model: nn.Module,
    images: Dataset,
    eps: Sequence[float],
    decay_lengths: Sequence[float],
    middle: tuple[float, float],
    **options: Any,
) -> dict[str, list[float]]:
    """For every eps at the middle decay length, and the other way round."""

    def measure(strengths: Sequence[float], lengths: Sequence[float]) -> list[float]:
        found = lrc_accuracy(model, images.x_test, images.y_test, strengths, lengths, **options)
        return [fraction for row in found for fraction in row]

    return {
        "eps": measure(eps, middle[1:]),
        "decay_lengths": measure(middle[:1], decay_lengths),
    }


def _functions(covariance: CovarianceFunction) -> Functions:
    radii, values = covariance.profile()
    channels = len(values)
    within = values.diagonal().mean(1)
    between = (values.sum((0, 1)) - values.diagonal().sum(1)) / max(channels * (channels - 1), 1)
    flat = not within[0] > 0  # a network that no perturbation moves has none
    length = 0.0 if flat else covariance.decay_length()
    return Functions(
        tuple(radii.tolist()),
        tuple(within.tolist()),
        tuple(between.tolist()) if channels > 1 else None,
        length if math.isfinite(length) else None,
    )


def _pixels(length: float | None) -> str:
    return "beyond" if length is None else f"{length:.2f}"


def _matrix(covariance: CovarianceFunction) -> Tensor:
    """The block of the first channel, over a patch of the image, its largest value 1."""
    height, width = (min(size, _PATCH) for size in (covariance.height, covariance.width))
    y, x = covariance.height - height, covariance.width - width
    rows, columns = covariance.values.shape[2:]
    patch = CovarianceFunction(1, height, width)
    patch.values.copy_(covariance.values[:1, :1, y : rows - y, x : columns - x])
    matrix = patch.dense()
    return matrix / matrix.abs().max().clamp(min=1e-30)


def _plot_matrices(found: Mapping[str, Mapping[str, CovarianceFunction]], path: Path) -> None:
    sources = list(next(iter(found.values())))
    figure, grid = _figure(len(found), len(sources), 3.0)
    for of_model, axes_row in zip(found.items(), grid, strict=True):
        for source, axes in zip(sources, axes_row, strict=True):
            shown = axes.imshow(
                _matrix(of_model[1][source]).numpy(), cmap="RdBu_r", vmin=-1, vmax=1
            )
            axes.set_title(source)
            axes.set_xticks([])
            axes.set_yticks([])
        axes_row[0].set_ylabel(_short(of_model[0]))
    figure.colorbar(shown, ax=list(grid.flat), label="correlation of pixels", shrink=0.8)
    figure.suptitle("covariance of pixels, first channel, rows in order")
    _save(figure, path)


def _plot_functions(functions: Mapping[str, Mapping[str, Functions]], path: Path) -> None:
    colour = any(f.between for of_model in functions.values() for f in of_model.values())
    figure, grid = _figure(len(functions), 2 if colour else 1, 4.0)
    for (name, of_model), axes_row in zip(functions.items(), grid, strict=True):
        for axes, kind in zip(axes_row, ("within", "between"), strict=False):
            for source, curves in of_model.items():
                values = torch.tensor(getattr(curves, kind))
                label = f"{source}, decay length {_pixels(curves.decay_length)}"
                scale = curves.within[0] or 1.0
                style = "--" if source == _DATA else "-"
                axes.plot(curves.radii, (values / scale).tolist(), style, label=label)
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set_title(f"{_short(name)}, {kind} channels")
            axes.set_xlabel("distance (pixels)")
            axes.set_ylabel("covariance / variance")
            axes.grid(alpha=0.3)
        axes_row[0].legend(frameon=False)
    _save(figure, path)


def _samples(
    images: Dataset,
    eps: float,
    decay_lengths: Sequence[float],
    models: Mapping[str, nn.Module],
    sources: Mapping[str, Mapping[str, Source]],
    seed: int,
) -> list[tuple[str, Tensor]]:
    """The same few images clean, with noise of each decay length, and as each source has them."""
    clean = images.x_test[:_SHOWN]
    rows = [("clean", clean)]
    for length in decay_lengths:
        noise = CovarianceFunction.exponential(*images.shape, length)
        xi = noise.sample(len(clean), torch.Generator().manual_seed(seed))
        rows.append((f"noise, {length:g} px", (clean + eps * xi).clamp(0, 1)))
    for path, of_model in sources.items():
        inputs = clean.to(next(models[path].parameters()))
        for name, source in of_model.items():
            attacked = inputs + source(inputs, inputs)
            rows.append((f"{name}, {_short(path)}", attacked.to(clean)))
    return rows


def _plot_samples(
    rows: Sequence[tuple[str, Tensor]], eps: float, attack_eps: float, path: Path
) -> None:
    figure, grid = _figure(len(rows), len(rows[0][1]), 1.2)
    for (name, samples), axes_row in zip(rows, grid, strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for sample, axes in zip(samples, axes_row, strict=True):
            pixels = sample.permute(1, 2, 0) if len(sample) == 3 else sample[0]
            axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
    figure.suptitle(
        f"long-range-correlated noise, eps {eps:g}, by decay length; attacks, eps {attack_eps:g}"
    )
    _save(figure, path)


def _plot_accuracy(content: Mapping[str, Any], path: Path) -> None:
    figure, grid = _figure(1, 2, 4.0)
    at_length, at_eps = content["decay_length_of_eps"], content["eps_of_decay_lengths"]
    for axes, key, label, title in (
        (grid[0, 0], "eps", "eps (pixels from 0 to 1)", f"decay length {at_length:g} pixels"),
        (grid[0, 1], "decay_lengths", "decay length (pixels)", f"eps {at_eps:g}"),
    ):
        for name, network in content["networks"].items():
            fractions = [100 * fraction for fraction in network["lrc_accuracy"][key]]
            axes.plot(content[key], fractions, marker="o", label=_short(name))
        axes.set_xlabel(label)
        axes.set_ylabel(f"accuracy, worst of {content['draws']} draws (%)")
        axes.set_title(title)
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
    lengths = content["decay_lengths"]
    grid[0, 1].set_xscale("log", base=2)
    grid[0, 1].set_xticks(lengths, [f"{length:g}" for length in lengths])
    grid[0, 0].legend(frameon=False)
    _save(figure, path)


def _figure(rows: int, columns: int, size: float) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(size * columns + 1, size * rows + 0.5), layout="constrained"
    )
    return figure, figure.subplots(rows, columns, squeeze=False)


def _short(checkpoint: str) -> str:
    """A checkpoint by its run: the folder it lies in."""
    return Path(checkpoint).parent.name or Path(checkpoint).stem


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
