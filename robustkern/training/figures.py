"""The data of each figure of an analysis, and its drawing.

Networks come by name, each as a `Portrait`; data are plain, as JSON holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from robustkern.analysis import (
    InputHessian,
    alignment,
    bounds_against_curvature,
    curvature_profile,
    figures,
    gauss_newton,
    loss_gap,
    losses_along_line,
    normal_sections,
    normal_spectrum,
    perturbed_images,
    plain,
    plane_sections,
    robustness_bounds,
    saliency,
    shared_curvature,
    spectrum,
    subspace_law,
)
from robustkern.evaluation import adversarial_inputs, subspace_deepfool
from robustkern.training.portrait import ATTACKED, Portrait, curving

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Networks = Mapping[str, Portrait]
Data = dict[str, Any]

_PROFILED = 100  # images, as in the CURE paper
_SHOWN = 5  # images in pictures of images
_SECTIONED = 7  # boundaries that are followed
_IN_SUBSPACES = 50  # images that are moved within subspaces
_PARTS = (32, 16, 8, 4, 2)  # of the whole space, the subspaces
_CURVATURES = [0.1 * step for step in range(101)]  # of the illustration of the bounds
_PARABOLAS = [0.0, 1.0, 2.0, 4.0]


class LeftOut(Exception):
    """A figure that these networks do not have; the message says why."""


class Kind(NamedTuple):
    """What a figure measures, its pictures by the end of their names, and if DeepFool is run."""

    measure: Callable[[Networks], Data]
    draw: Callable[[Data], dict[str, Figure]]
    attacks: bool = True


def _profile(networks: Networks) -> Data:
    finite, exact = {}, {}
    for name, each in networks.items():
        x, y = each.inputs[:_PROFILED], each.targets[:_PROFILED]
        finite[name] = plain(curvature_profile(spectrum(InputHessian(each.model, x, y, h=each.h))))
        if each.piecewise_linear:
            spectra = gauss_newton(each.model, x).spectrum()
        else:
            spectra = spectrum(InputHessian(each.model, x, y, method="exact"))
        exact[name] = plain(curvature_profile(spectra))
    return {"finite": finite, "exact": exact}


def _evolution(networks: Networks) -> Data:
    found, without = {}, []
    for name, each in networks.items():
        records = [record for record in each.log if "curvature" in record]
        if not records:
            without.append(name)
            continue
        measured = [record["curvature"] for record in records]
        found[name] = {
            "epochs": [record["epoch"] for record in records],
            **{key: [each[key] for each in measured] for key in measured[0]},
            "accuracy": [each["pgd_accuracy"] for each in measured],
        }
    if not found:
        raise LeftOut("no log has curvature; train with --curvature EPS")
    return {"networks": found, "without": without}


def _alignment(networks: Networks) -> Data:
    found = {}
    for name, each in networks.items():
        _, gradient = loss_gap(each.model, each.inputs, each.targets)
        found[name] = plain(alignment(gradient, each.curvature[1]))
    return {"networks": found, "size": next(iter(networks.values())).inputs[0].numel()}


def _bounds(networks: Networks) -> Data:
    found: Data = {"cross_entropy": {}, "margin": {}}
    for name, each in networks.items():
        distances = each.distances
        x, y = each.inputs[:ATTACKED], each.targets[:ATTACKED]
        for loss, of_networks in found.items():
            c, g = loss_gap(each.model, x, y, loss=loss)
            if loss == "margin":
                nu, u = each.margin_curvature(ATTACKED)
            else:
                nu, u = (rows[:ATTACKED] for rows in each.curvature)
            g, u = g.flatten(1).double(), u.flatten(1).double()
            bounds = robustness_bounds(c.double(), g.norm(dim=1), nu.double(), (g * u).sum(1).abs())
            of_networks[name] = {
                **plain(bounds),
                "excluded": bounds.excluded,
                "distances": plain(distances[bounds.included]),
            }
    return {
        **found,
        "curves": {"curvatures": _CURVATURES, **plain(bounds_against_curvature(_CURVATURES))},
        "parabolas": losses_along_line(_PARABOLAS),
    }


def _planes(points: int) -> Callable[[Networks], Data]:
    def measure(networks: Networks) -> Data:
        place = _chosen(networks, 1)
        # Wide enough for the boundary that is farthest.
        radius = 2 * max(float(each.distances[place].max()) for each in networks.values())
        found = {}
        for name, each in networks.items():
            at = each.inputs[place], each.targets[place], each.normals[place]
            found[name] = plain(
                plane_sections(
                    each.model, *at, radius=radius, points=points, generator=each.generator()
                )
            )
        return {"networks": found, "image": int(place[0])}

    return measure


def _images(networks: Networks) -> Data:
    place = _chosen(networks, _SHOWN)
    first = next(iter(networks.values()))
    models = {name: each.model for name, each in networks.items()}
    moved = {
        name: (each.inputs[place] + each.normals[place]).clamp(0, 1)
        for name, each in networks.items()
    }
    found = perturbed_images(models, first.inputs[place], moved)
    return {"networks": {name: plain(result) for name, result in found.items()}}


def _normal_sections(networks: Networks) -> Data:
    _moved(networks)
    place = _chosen(networks, _SECTIONED)
    radius = 2 * max(float(each.distances[place].max()) for each in networks.values())
    found = {}
    for name, each in networks.items():
        at = each.inputs[place], each.normals[place], each.shared_directions[0]
        found[name] = plain(normal_sections(each.model, *at, radius=radius))
    return {"networks": found}


def _normals(networks: Networks) -> Data:
    _moved(networks)
    spectra, curvature = {}, {}
    for name, each in networks.items():
        spectra[name] = plain(normal_spectrum(each.normals, generator=each.generator()))
        # The directions are those of one half of the images, the curvatures those of the other.
        _, hessian = each.boundary
        shared = each.shared_directions
        random = torch.randn(shared.shape, generator=each.generator(), device=shared.device)
        for kind, directions in (("shared", shared), ("random", random.to(shared))):
            curvature[f"{name}, {kind}"] = plain(
                shared_curvature(curving(hessian), directions, len(hessian.inputs))
            )
    return {"spectra": spectra, "curvature": curvature}


def _subspace(networks: Networks) -> Data:
    _moved(networks)
    found = {}
    for name, each in networks.items():
        place = each.moved[:_IN_SUBSPACES]
        size = each.inputs[0].numel()
        dims = sorted({max(1, size // part) for part in _PARTS})
        measured = torch.stack([_within(each, place, dim) for dim in dims])
        found[name] = plain(subspace_law(size, dims, each.distances[place], measured))
    return {"networks": found}


def _saliency(networks: Networks) -> Data:
    place = _chosen(networks, _SHOWN)
    first = next(iter(networks.values()))
    maps = {
        name: plain(saliency(each.model, each.inputs[place], each.targets[place], of="logit"))
        for name, each in networks.items()
    }
    return {"images": plain(first.inputs[place]), "maps": maps}


def _within(each: Portrait, place: Tensor, dim: int) -> Tensor:
    """Distances of images that are classified rightly, within a random subspace."""
    x, y = each.inputs[place], each.targets[place]

    def attack(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return subspace_deepfool(model, inputs, targets, dim, generator=each.generator())

    lengths = (adversarial_inputs(each.model, x, y, attack) - x).flatten(1).norm(dim=1)
    found: Tensor = lengths.masked_fill(lengths == 0, torch.inf)
    return found


def _chosen(networks: Networks, count: int) -> Tensor:
    """The first images that every network classifies rightly and DeepFool moves on each."""
    moved = [set(each.moved.tolist()) for each in networks.values()]
    shared = sorted(set.intersection(*moved))
    if not shared:
        raise LeftOut("no image is classified rightly and moved by DeepFool on every network")
    return torch.tensor(shared[:count])


def _moved(networks: Networks) -> None:
    for name, each in networks.items():
        if len(each.moved) < 2:
            raise LeftOut(f"DeepFool moves fewer than two images that {name} classifies rightly")


FIGURES = {
    "profile": Kind(
        _profile,
        lambda data: {f"-{view}": figures.profile(data[view]) for view in data},
        attacks=False,
    ),
    "evolution": Kind(
        _evolution, lambda data: {"": figures.evolution(data["networks"])}, attacks=False
    ),
    "alignment": Kind(
        _alignment,
        lambda data: {"": figures.alignments(data["networks"], size=data["size"])},
        attacks=False,
    ),
    "bounds": Kind(
        _bounds,
        lambda data: {
            "-cross-entropy": figures.network_bounds(data["cross_entropy"]),
            "-margin": figures.network_bounds(data["margin"]),
            "-curves": figures.bound_curves(data["curves"], data["curves"]["curvatures"]),
            "-parabolas": figures.loss_parabolas(data["parabolas"]),
        },
    ),
    "sections": Kind(_planes(101), lambda data: {"": figures.cross_sections(data["networks"])}),
    "surfaces": Kind(_planes(41), lambda data: {"": figures.loss_surfaces(data["networks"])}),
    "images": Kind(_images, lambda data: {"": figures.image_grid(data["networks"])}),
    "normal-sections": Kind(
        _normal_sections, lambda data: {"": figures.normal_sections(data["networks"])}
    ),
    "normals": Kind(
        _normals,
        lambda data: {
            "-spectra": figures.normal_spectra(data["spectra"]),
            "-curvature": figures.shared_curvatures(data["curvature"]),
        },
    ),
    "subspace": Kind(_subspace, lambda data: {"": figures.subspace_laws(data["networks"])}),
    "saliency": Kind(
        _saliency, lambda data: {"": figures.saliency_maps(data["images"], data["maps"])}
    ),
}
