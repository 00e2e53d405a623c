"""Plots of the report page, as SVG inside it: the same text for the same data."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from robustkern.evaluation.report.markup import Html, escape

# Okabe and Ito's, which the colour-blind tell apart, less the yellow that white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_SETTINGS = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "robustkern",
    "text.parse_math": False,  # a network's name may hold a dollar sign
}


def svg(
    key: str, alt: str, draw: Callable[[Any], None], *, width: float = 4.8, height: float = 3.6
) -> Html:
    """Draw one plot.

    Args:
        key: no other plot of the page has it.
        alt: what the plot shows, for those who do not see it.
        draw: called with matplotlib's axes; labelled lines stand in a legend below.
        width: in inches.
        height: in inches.

    Returns:
        An `<svg>` element.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib = _matplotlib()
    with matplotlib.style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # Of names in other scripts: the browser has glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10
            )
        buffer = io.StringIO()
        undated: Any = dict.fromkeys(("Format", "Type", "Creator", "Date"))
        figure.savefig(buffer, format="svg", metadata=undated, dpi=120)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Every figure of matplotlib has the same ids, and in a page they must differ.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    # A hundredth of a point is finer than any eye; texts between the tags stay as they are.
    text = re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    return Html(text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the network or attack at this place, everywhere the same."""
    turn, place = divmod(index, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "marker": _MARKERS[place],
        "linestyle": ("-", "--", ":", "-.")[turn % 4],
        "markersize": 4.5,
    }


def label(name: str) -> str:
    """A name that fits into a legend."""
    name = " ".join(name.split())
    name = name if len(name) <= 24 else name[:23] + "…"
    return f" {name}" if name.startswith("_") else name  # which matplotlib would leave out


def png(pixels: Sequence[Any], alt: str) -> Html:
    """A small image, (C, H, W), its pixels from 0 to 255; grey, their mean, unless C is 3."""
    _matplotlib()
    from PIL import Image  # which matplotlib brings

    array = np.asarray(pixels, dtype=np.uint8)
    array = np.moveaxis(array, 0, -1) if len(array) == 3 else array.mean(0).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Html(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">')


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "report_page: matplotlib cannot be imported; "
            'install it with: pip install "robustkern[plots]"'
        ) from error
    return matplotlib
