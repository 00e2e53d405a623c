"""Figures of planes through an input: class maps, loss surfaces, and sections of the boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from robustkern.analysis.figures.style import (
    COLORS,
    Array,
    Networks,
    array,
    check_networks,
    looks,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["cross_sections", "loss_surfaces", "normal_sections"]

_ALONG = "along the normal r (input units)"
_ACROSS = "along v (input units)"
_SMALL = 0.01  # of the square


def cross_sections(networks: Networks, *, sample: int = 0) -> Figure:
    """The decision boundary on a plane of its normal: Fig. 1 of Moosavi-Dezfooli et al. 2019.

    A region bears the number of its class, unless it is below a hundredth of the square.

    Args:
        networks: for each name the "offsets" (P,), "classes" (N, P, P) and "targets" (N,) that
            `plane_sections` gives.
        sample: which of the N.

    Returns:
        The figure, x in the middle.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, a key is missing, or there is no such sample.
    """
    networks = check_networks("cross_sections", networks, "offsets", "classes", "targets")
    _check_sample("cross_sections", networks, sample)
    figure, (row,) = panels("cross_sections", 1, len(networks), (3.5, 3.6))
    for axes, (name, data) in zip(row, networks.items(), strict=True):
        offsets, classes = array(data["offsets"]), array(data["classes"])[sample]
        half = (offsets[1] - offsets[0]) / 2
        ends = (offsets[0] - half, offsets[-1] + half)
        for label in np.unique(classes):
            inside = classes == label
            color = COLORS[int(label) % len(COLORS)]
            # A filled contour would cut the corners of the cells.
            axes.imshow(
                np.where(inside[..., None], _rgba(color, 0.45), 0.0), origin="lower",
                extent=(*ends, *ends), aspect="equal", interpolation="nearest",
            )  # fmt: skip
            if not inside.all():
                axes.contour(offsets, offsets, inside, [0.5], colors="black", linewidths=0.8)
            if inside.mean() < _SMALL:
                continue
            across, along = _middle(inside)
            axes.text(
                offsets[along], offsets[across], f"{int(label)}", ha="center", va="center",
                fontsize="large", fontweight="bold",
            )  # fmt: skip
        axes.plot(0, 0, marker="+", color="black", markersize=9)
        axes.set_title(f"{name} (label {int(data['targets'][sample])})", fontsize="medium")
        axes.set_xlabel(_ALONG)
        axes.set_ylabel(_ACROSS)
    return figure


def loss_surfaces(networks: Networks, *, sample: int = 0) -> Figure:
    """The loss, downward, on that plane: Figs. 3, 8 and 13 of Moosavi-Dezfooli et al. 2019.

    Args:
        networks: for each name the "offsets" (P,), "losses" (N, P, P) and "targets" (N,) that
            `plane_sections` gives.
        sample: which of the N.

    Returns:
        The figure, with one scale of height and colour for all networks.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, a key is missing, or there is no such sample.
    """
    networks = check_networks("loss_surfaces", networks, "offsets", "losses", "targets")
    _check_sample("loss_surfaces", networks, sample)
    figure, (row,) = panels("loss_surfaces", 1, len(networks), (4, 3.5), projection="3d")
    heights = {name: -array(data["losses"])[sample] for name, data in networks.items()}
    low = min(float(each.min()) for each in heights.values())
    low = min(
        low, max(float(each.max()) for each in heights.values()) - 1e-6
    )  # a scale of no width
    high = max(float(each.max()) for each in heights.values())
    for axes, (name, data) in zip(row, networks.items(), strict=True):
        along, across = np.meshgrid(array(data["offsets"]), array(data["offsets"]))
        axes.plot_surface(
            along, across, heights[name], cmap="cividis", vmin=low, vmax=high, rcount=60, ccount=60,
            linewidth=0.2, edgecolor=(0, 0, 0, 0.3),
        )  # fmt: skip
        axes.set_zlim(low, high)
        axes.set_title(f"{name} (label {int(data['targets'][sample])})", fontsize="medium")
        axes.set_xlabel("r (input units)")
        axes.set_ylabel("v (input units)")
        axes.set_zlabel("-cross-entropy")
        axes.set_box_aspect(None, zoom=0.9)
    return figure


def normal_sections(networks: Networks) -> Figure:
    """The boundary near several inputs over one direction, after the talk's normal sections.

    Curves that bend down together come nearer to their inputs in both senses of v: there the
    direction is shared, and curved (Moosavi-Dezfooli et al. 2018, Robustness of classifiers to
    universal perturbations).

    Args:
        networks: for each name the "offsets" (P,) and "heights" (N, P) that `normal_sections`
            gives.

    Returns:
        The figure: heights less that at the offset nearest 0. An input that has none there is
        counted in the title as not drawn.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    networks = check_networks("normal_sections", networks, "offsets", "heights")
    figure, (row,) = panels("normal_sections", 1, len(networks), (3.6, 3.4))
    for axes, (name, data) in zip(row, networks.items(), strict=True):
        offsets, heights = array(data["offsets"]), array(data["heights"])
        heights = np.where(np.isfinite(heights), heights, np.nan)
        heights = heights - heights[:, [np.abs(offsets).argmin()]]
        drawn = heights[np.isfinite(heights).any(1)]
        if axes is not row[0]:
            axes.sharey(row[0])
        for curve, look in zip(drawn, looks(len(drawn)), strict=True):
            axes.plot(offsets, curve, markevery=max(1, len(offsets) // 6), **look)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_title(f"{name}: {len(drawn)} of {len(heights)} inputs", fontsize="medium")
        axes.set_xlabel(_ACROSS)
        axes.set_ylabel("boundary above its tangent\n(input units)")
    return figure


def _check_sample(caller: str, networks: Networks, sample: int) -> None:
    for name, data in networks.items():
        if not 0 <= sample < len(data["targets"]):
            raise ValueError(
                f"{caller}: sample must be from 0 to {len(data['targets']) - 1} for {name!r}, "
                f"got {sample}"
            )


def _rgba(color: str, alpha: float) -> Array:
    return array([*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), alpha])


def _middle(inside: Any) -> tuple[int, int]:
    """A cell of the region that is far from its edge: where it is eroded to at last."""
    left = np.pad(inside, 1)
    while True:
        smaller = left.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                smaller &= np.roll(left, step, axis)
        if not smaller.any():
            break
        left = smaller
    cells = np.argwhere(left[1:-1, 1:-1])
    across, along = cells[len(cells) // 2]
    return int(across), int(along)
