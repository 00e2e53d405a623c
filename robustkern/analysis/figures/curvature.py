"""Figures of the input Hessian: its eigenvalues, their course in training, and their direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from robustkern.analysis.figures.style import Networks, array, check_networks, looks, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["alignments", "evolution", "profile"]

_LARGEST = 20  # eigenvalues


def profile(networks: Networks) -> Figure:
    """Sorted eigenvalues of the input Hessian: Figs. 2, 9 and 12 of Moosavi-Dezfooli et al. 2019.

    Args:
        networks: for each name the "mean" over samples of each eigenvalue, falling, (d,), and ends
            "low" and "high" of its intervals, (d,).

    Returns:
        The figure: to the left all but those of zero at the end, to the right the largest, on a
        linear scale.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    networks = check_networks("profile", networks, "mean", "low", "high")
    figure, ((whole, largest),) = panels("profile", 1, 2, (4.2, 3.5))
    means = [array(data["mean"]) for data in networks.values()]
    shown = max(2, *(int(np.max(np.nonzero(mean), initial=0)) + 1 for mean in means))
    for (name, data), look in zip(networks.items(), looks(len(networks)), strict=True):
        mean, low, high = (array(data[key])[:shown] for key in ("mean", "low", "high"))
        ranks = np.arange(1, len(mean) + 1)
        for axes, end in ((whole, len(mean)), (largest, _LARGEST)):
            axes.plot(ranks[:end], mean[:end], label=name, markevery=max(1, end // 10), **look)
            axes.fill_between(
                ranks[:end], low[:end], high[:end], color=look["color"], alpha=0.2, linewidth=0
            )
    # The many small ones would be a line at zero.
    top = max(float(np.abs(mean).max()) for mean in means)
    thousandth = 10.0 ** np.ceil(np.log10(top / 1000)) if top else 1.0
    whole.set_yscale("symlog", linthresh=thousandth)
    largest.set_xlim(left=0)
    zeros = max(map(len, means)) - shown
    whole.set_title(f"all but {zeros}, which are zero" if zeros > 0 else "all", fontsize="medium")
    largest.set_title("the largest", fontsize="medium")
    for axes in (whole, largest):
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xlabel("eigenvalue, by rank")
        axes.xaxis.get_major_locator().set_params(integer=True)
    whole.set_ylabel("mean eigenvalue\n(loss per squared input unit)")
    largest.legend()
    return figure


def evolution(networks: Networks) -> Figure:
    """Curvature and accuracy along training: Figs. 10 and 14 of Moosavi-Dezfooli et al. 2019.

    Args:
        networks: for each name the "epochs" and, at each of them, the means over samples of
            "frobenius_squared", the squared Frobenius norm of the Hessian H, and of
            "sign_curvature", the norm of H z, z along the gradient's sign; and the adversarial
            "accuracy", in [0, 1].

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    titles = {
        "frobenius_squared": "mean $\\|H\\|_F^2$\n(loss² per input unit⁴)",
        "sign_curvature": "mean $\\|Hz\\|_2$\n(loss per squared input unit)",
        "accuracy": "adversarial accuracy (%)",
    }
    networks = check_networks("evolution", networks, "epochs", *titles)
    figure, (row,) = panels("evolution", 1, len(titles), (3.6, 3.2))
    for axes, (key, title) in zip(row, titles.items(), strict=True):
        for (name, data), look in zip(networks.items(), looks(len(networks)), strict=True):
            values = array(data[key])
            axes.plot(
                array(data["epochs"]), 100 * values if key == "accuracy" else values,
                label=name, **look,
            )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    row[0].legend()
    return figure


def alignments(networks: Networks, *, size: int | None = None) -> Figure:
    """Cosines between gradient and most curved direction: sec. 3.1 of Moosavi-Dezfooli et al. 2019.

    Args:
        networks: for each name its samples' "cosines", from 0 to 1, and how many are "undefined".
        size: number of an input's elements; its random baseline is drawn then.

    Returns:
        The figure: for each network a histogram and its mean.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    networks = check_networks("alignments", networks, "cosines", "undefined")
    figure, ((axes,),) = panels("alignments", 1, 1, (5, 3.5))
    edges = np.linspace(0, 1, 21)
    for (name, data), look in zip(networks.items(), looks(len(networks)), strict=True):
        cosines = array(data["cosines"])
        if not len(cosines):
            axes.plot([], [], label=f"{name}: none is defined", **look)
            continue
        shares = np.histogram(cosines, edges)[0] / len(cosines)
        label = f"{name}: mean {cosines.mean():.2f}"
        if data["undefined"]:
            label += f", {data['undefined']} undefined"
        axes.plot((edges[1:] + edges[:-1]) / 2, 100 * shares, label=label, **look)
        axes.axvline(cosines.mean(), color=look["color"], linestyle=look["linestyle"], linewidth=1)
    if size is not None:
        axes.axvline(
            size**-0.5, color="grey", linewidth=3, alpha=0.5, label=r"random: $1/\sqrt{d}$"
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(r"$|g^T u| / \|g\|_2$")
    axes.set_ylabel("samples (%)")
    axes.legend()
    return figure
