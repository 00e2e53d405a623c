"""Figures of universal perturbations' two models, and of the law of random subspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from robustkern.analysis.figures.style import Networks, array, check_networks, looks, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["normal_spectra", "shared_curvatures", "subspace_laws"]


def normal_spectra(networks: Networks) -> Figure:
    """Singular values of stacked boundary normals, beside those of random vectors.

    The figure of the flat model in Moosavi-Dezfooli et al. 2017, Universal adversarial
    perturbations.

    Args:
        networks: for each name "normals", "random" and "samples", as `normal_spectrum` gives them.

    Returns:
        The figure; random vectors, grey, once for each number of samples.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    networks = check_networks("normal_spectra", networks, "normals", "random", "samples")
    figure, ((axes,),) = panels("normal_spectra", 1, 1, (5, 3.5))
    for (name, data), look in zip(networks.items(), looks(len(networks)), strict=True):
        values = array(data["normals"])
        ranks = np.arange(1, len(values) + 1)
        label = f"{name} ({data['samples']} normals)"
        axes.plot(ranks, values, label=label, markevery=0.1, **look)
    label = "random vectors, as many"
    for random in {data["samples"]: data["random"] for data in networks.values()}.values():
        ranks = np.arange(1, len(random) + 1)
        axes.plot(ranks, array(random), color="grey", linewidth=3, alpha=0.6, label=label)
        label = "_nolegend_"
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("singular value, by rank")
    axes.set_ylabel("singular value (unit normals)")
    axes.legend()
    return figure


def shared_curvatures(directions: Networks) -> Figure:
    """Curvature along directions, mean over inputs: the curved model of universal perturbations.

    After Moosavi-Dezfooli et al. 2018, Robustness of classifiers to universal perturbations.

    Args:
        directions: for each kind of directions, such as "shared" and "random", or for each network,
            "mean" and "error" along M of them, as `shared_curvature` gives them of a boundary: with
            the Hessian of the logits' difference over its gradient's length.

    Returns:
        The figure; in each kind the most curved direction first.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `directions` is no mapping.
        ValueError: none, or a key is missing.
    """
    directions = check_networks("shared_curvatures", directions, "mean", "error")
    figure, ((axes,),) = panels("shared_curvatures", 1, 1, (5, 4.5))
    for (name, data), look in zip(directions.items(), looks(len(directions)), strict=True):
        mean, error = array(data["mean"]), array(data["error"])
        order = np.argsort(-mean)
        ranks = np.arange(1, len(mean) + 1)
        axes.errorbar(ranks, mean[order], error[order], label=name, capsize=2, **look)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel("direction, most curved first")
    axes.set_ylabel("mean $v^T H v$ of the boundary\nand standard error (per input unit)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def subspace_laws(networks: Networks) -> Figure:
    """Distances within random subspaces against the law of flat boundaries.

    After Fawzi et al. 2016, Robustness of classifiers: from adversarial to random noise.

    Args:
        networks: for each name "dims", "expected", "measured" and "ratios", as `subspace_law` gives
            them.

    Returns:
        The figure: to the left median distances; to the right medians and quartiles of the ratio of
        measured distance and law.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `networks` is no mapping.
        ValueError: no networks, or a key is missing.
    """
    networks = check_networks("subspace_laws", networks, "dims", "expected", "measured", "ratios")
    figure, ((left, right),) = panels("subspace_laws", 1, 2, (4, 3.5))
    for (name, data), look in zip(networks.items(), looks(len(networks)), strict=True):
        dims, ratios = array(data["dims"]), array(data["ratios"])
        left.plot(dims, array(data["expected"]), **{**look, "marker": None})
        left.plot(dims, array(data["measured"]), **{**look, "linestyle": "none"})
        low, middle, high = ratios.T
        right.errorbar(dims, middle, [middle - low, high - middle], label=name, capsize=2, **look)
    right.axhline(1, color="black", linewidth=0.5)
    left.plot([], [], color="black", label=r"law, $\sqrt{d/m}\,\|r^*\|$")
    left.plot([], [], color="black", linestyle="none", marker="o", label="measured")
    ticks = sorted({dim for data in networks.values() for dim in data["dims"]})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(dim) for dim in ticks])
        axes.minorticks_off()
        axes.set_xlabel("dimensions m of the subspace")
        axes.legend()
    left.set_yscale("log")
    left.set_ylabel("median distance (input units)")
    right.set_ylabel("distance over that of the law")
    return figure
