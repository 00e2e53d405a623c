"""Figures of Theorem 1: bounds from gradient and curvature, a local quadratic estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from robustkern.analysis.figures.style import Networks, array, check_networks, looks, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bound_curves", "loss_parabolas", "network_bounds"]

_ESTIMATE = "local quadratic estimate, not a certificate"


def bound_curves(bounds: Mapping[str, Any], curvatures: Any) -> Figure:
    """Bounds of the distance against curvature: Fig. 4 of Moosavi-Dezfooli et al. 2019.

    Args:
        bounds: "lower", "upper", "simple_lower", "tighter_lower" and "simple_upper", one number of
            each for each curvature, as `bounds_against_curvature` gives them.
        curvatures: nu, rising.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a key is missing.
    """
    names = {
        "upper": "upper bound",
        "simple_upper": r"$c/|g^T u|$",
        "lower": "lower bound",
        "tighter_lower": r"$c/\|g\| - \nu c^2/(2\|g\|^3)$",
        "simple_lower": r"$c/\|g\| - 2\nu c^2/\|g\|^3$",
    }
    check_networks("bound_curves", {"bounds": bounds}, *names)
    figure, ((axes,),) = panels("bound_curves", 1, 1, (5, 3.5))
    nu = array(curvatures)
    for (key, label), look in zip(names.items(), looks(len(names)), strict=True):
        axes.plot(nu, array(bounds[key]), label=label, markevery=max(1, len(nu) // 8), **look)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(r"curvature $\nu$ (loss per squared input unit)")
    axes.set_ylabel(r"$\|r^*\|_2$ (input units)")
    axes.set_title(_ESTIMATE, fontsize="medium")
    axes.legend()
    return figure


def loss_parabolas(lines: Mapping[str, Any]) -> Figure:
    """Losses of one slope and several curvatures: Fig. 5 of Moosavi-Dezfooli et al. 2019.

    Args:
        lines: what `losses_along_line` returns.

    Returns:
        The figure, with a mark where each parabola passes the threshold.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a key is missing.
    """
    keys = ("curvatures", "offsets", "losses", "crossings", "threshold")
    check_networks("loss_parabolas", {"lines": lines}, *keys)
    figure, ((axes,),) = panels("loss_parabolas", 1, 1, (5, 3.5))
    offsets, threshold = array(lines["offsets"]), lines["threshold"]
    curves = list(zip(lines["curvatures"], lines["losses"], array(lines["crossings"]), strict=True))
    bottom = array(lines["losses"]).min()
    for (nu, losses, crossing), look in zip(curves, looks(len(curves)), strict=True):
        look["marker"], marker = None, look["marker"]
        axes.plot(offsets, array(losses), label=rf"$\nu = {nu:g}$", **look)
        if crossing <= offsets[-1]:
            axes.plot(crossing, threshold, marker=marker, color=look["color"], markersize=8)
            axes.vlines(crossing, bottom, threshold, color=look["color"], linewidth=0.7)
    axes.axhline(threshold, color="black", linewidth=1, label="threshold")
    axes.set_xlim(offsets[0], offsets[-1])
    axes.set_ylim(bottom=bottom)
    axes.set_xlabel("distance from x (input units)")
    axes.set_ylabel("loss")
    axes.legend()
    return figure


def network_bounds(networks: Networks) -> Figure:
    """Theorem 1 (Moosavi-Dezfooli et al. 2019) on a network, beside distances that were measured.

    The loss is no quadratic, so distances may lie outside the bounds.

    Args:
        networks: for each name "included", (N,), and "lower" and "upper" bounds of the M that are,
            as `robustness_bounds` gives them, and of the same M the "distances" of adversarial
            inputs, such as DeepFool's, in input units.

    Returns:
        The figure: above, bounds against distance; below, the shares of samples that each of the
        three has below a length.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    names = {"lower": "lower bound", "distances": "distance found", "upper": "upper bound"}
    networks = check_networks("network_bounds", networks, *names, "included")
    figure, rows = panels("network_bounds", 2, len(networks), (4, 3.5))
    for (name, data), above, below in zip(networks.items(), *rows, strict=True):
        values = {key: array(data[key]) for key in names}
        for (key, label), look in zip(names.items(), looks(3), strict=True):
            finite = np.sort(values[key][np.isfinite(values[key])])
            shares = np.arange(1, len(finite) + 1) / max(1, len(values[key]))
            below.step(
                finite, 100 * shares, where="post", label=label, markevery=max(1, len(finite) // 6),
                **look,
            )  # fmt: skip
            if key != "distances":
                del look["linestyle"]
                above.plot(
                    values["distances"], values[key], label=label, linestyle="none",
                    fillstyle="none", **look,
                )  # fmt: skip
        shown = np.concatenate(list(values.values()))
        shown = shown[np.isfinite(shown) & (shown > 0)]
        if len(shown):
            ends = [shown.min(), shown.max()]
            above.plot(ends, ends, color="black", linewidth=1)
            for axes in (above, below):
                axes.set_xscale("log")
            above.set_yscale("log")
        excluded = len(data["included"]) - sum(data["included"])
        missing = sum(int((~np.isfinite(each)).sum()) for each in values.values())
        title = f"{name}: {len(values['lower'])} samples,\n{excluded} beyond the threshold"
        above.set_title(
            f"{title},\n{missing} numbers not finite" if missing else title, fontsize="medium"
        )
        above.set_xlabel("distance found (input units)")
        above.set_ylabel("bound (input units)")
        below.set_xlabel("length (input units)")
        below.set_ylabel("samples below (%)")
    rows[0][0].legend()
    rows[1][0].legend()
    figure.suptitle(_ESTIMATE, fontsize="medium")
    return figure
