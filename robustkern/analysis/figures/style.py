"""What the figures have in common: checks, a canvas, and looks that do not rest on colour alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "Array", "Networks", "array", "check_networks", "looks", "panels", "printed"]

Array = npt.NDArray[np.float64]
Networks = Mapping[str, Mapping[str, Any]]

# Okabe and Ito's without their yellow, which white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "osD^vPX"


def panels(
    caller: str,
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    projection: str | None = None,
) -> tuple[Figure, npt.NDArray[np.object_]]:
    """A figure, and its axes in an array of rows and columns; `size` is that of one, in inches."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"{caller}: matplotlib cannot be imported; install it with: "
            'pip install "robustkern[plots]"'
        ) from error
    figure: Figure = figures.Figure(
        figsize=(max(3.5, columns * size[0]), rows * size[1]), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": projection})
    return figure, axes


def looks(count: int) -> Iterator[dict[str, Any]]:
    """For each of so many lines its colour, line style and marker; the first 49 all differ."""
    for index in range(count):
        turn, place = divmod(index, len(COLORS))
        yield {
            "color": COLORS[place],
            "linestyle": _LINES[(place + turn) % len(_LINES)],
            "marker": _MARKERS[(place + 2 * turn) % len(_MARKERS)],
            "markersize": 4,
        }


def check_networks(caller: str, networks: Networks, *keys: str) -> Networks:
    """Refuse no networks, or one that lacks a key; return them by their `printed` names."""
    if not isinstance(networks, Mapping):
        raise TypeError(f"{caller}: networks must be a mapping, got {type(networks).__name__}")
    if not networks:
        raise ValueError(f"{caller}: networks must hold at least one, got none")
    for name, data in networks.items():
        missing = [key for key in keys if key not in data]
        if missing:
            raise ValueError(
                f"{caller}: networks[{name!r}] must hold {', '.join(keys)}, "
                f"got none of the name {', '.join(missing)}"
            )
    return {printed(name): data for name, data in networks.items()}


def printed(name: str) -> str:
    """The name for matplotlib, which reads $ as a formula and leaves _name out of legends."""
    text = name.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def array(data: Any) -> Array:
    """Numbers as an array; None, which is infinite or NaN in JSON, becomes NaN."""
    return np.asarray(data, dtype=np.float64)
