"""Figures that show images: what an attack made of them, and where a network looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from robustkern.analysis.figures.style import (
    Array,
    Networks,
    array,
    check_networks,
    panels,
    printed,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["image_grid", "saliency_maps"]


def image_grid(networks: Networks) -> Figure:
    """Images, what an attack made of them, and the change: Fig. 11 of Moosavi-Dezfooli et al. 2019.

    Args:
        networks: for each name "images" and "adversarial" (N, C, H, W), "predicted" and
            "predicted_adversarial" (N,) and "distances" (N,), as `perturbed_images` gives them.

    Returns:
        The figure: a row for each image; for each network the adversarial one with its class, and
        the change, scaled to its own largest value. Above an image is the class that the network
        sees and the L2 length of the change.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, a key is missing, or networks have other images.
    """
    keys = ("images", "adversarial", "predicted", "predicted_adversarial", "distances")
    networks = check_networks("image_grid", networks, *keys)
    images = array(next(iter(networks.values()))["images"])
    if any(not np.array_equal(images, array(data["images"])) for data in networks.values()):
        raise ValueError("image_grid: networks must have the same images, got others")
    figure, rows = panels("image_grid", len(images), 1 + 2 * len(networks), (1.5, 1.75))
    for sample, (row, image) in enumerate(zip(rows, images, strict=True)):
        _show(row[0], image)
        row[0].set_title("image", fontsize="small")
        for place, (name, data) in enumerate(networks.items()):
            moved = array(data["adversarial"])[sample]
            before, after = (int(data[key][sample]) for key in keys[2:4])
            shown, change = row[1 + 2 * place : 3 + 2 * place]
            _show(shown, moved)
            shown.set_title(f"{name}: {before} → {after}", fontsize="small")
            _show_change(change, moved - image)
            change.set_title(rf"$\|r\|$ = {data['distances'][sample]:.2g}", fontsize="small")
    return figure


def saliency_maps(images: Any, maps: Mapping[str, Any]) -> Figure:
    """Saliency maps of several networks beside their images, normal and robust ones in the talk.

    Args:
        images: (N, C, H, W), in [0, 1].
        maps: for each network's name (N, H, W), as `saliency` gives them.

    Returns:
        The figure: a row for each image; each map is scaled to its own largest value, which stands
        above it.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no maps, or not as many as images.
    """
    shown = array(images)
    if not maps or any(len(each) != len(shown) for each in maps.values()):
        raise ValueError(
            f"saliency_maps: maps must hold at least one network, with a map for each of "
            f"{len(shown)} images, got { ({name: len(each) for name, each in maps.items()}) }"
        )
    figure, rows = panels("saliency_maps", len(shown), 1 + len(maps), (1.6, 1.8))
    for sample, (row, image) in enumerate(zip(rows, shown, strict=True)):
        _show(row[0], image)
        for axes, (name, each) in zip(row[1:], maps.items(), strict=True):
            values = array(each)[sample]
            axes.imshow(values, cmap="cividis", vmin=0, vmax=values.max() or 1)
            axes.set_axis_off()
            axes.set_title(f"{printed(name)}\nup to {values.max():.2g}", fontsize="small")
    return figure


def _show(axes: Axes, image: Array) -> None:
    """An image of one channel in grey, of three in colour, of others its first."""
    axes.set_axis_off()
    if len(image) == 3:
        axes.imshow(image.transpose(1, 2, 0).clip(0, 1))
    else:
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)


def _show_change(axes: Axes, change: Array) -> None:
    largest = np.abs(change).max() or 1.0
    axes.set_axis_off()
    if len(change) == 3:
        axes.imshow((0.5 + change / (2 * largest)).transpose(1, 2, 0))
    else:
        axes.imshow(change[0], cmap="PuOr", vmin=-largest, vmax=largest)
