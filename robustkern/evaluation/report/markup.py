"""Pieces of HTML that the report page is made of; every text is escaped unless it is `Html`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


class Html(str):
    """Text that is HTML already."""


@dataclass(frozen=True)
class Section:
    """A part of the page: where links find it, its heading, and what follows."""

    anchor: str
    title: str
    body: str


def escape(text: str) -> Html:
    """Make text safe to stand in an element or an attribute."""
    return text if isinstance(text, Html) else Html(html.escape(text))


def paragraph(text: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{escape(text)}</p>\n")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table in a box that scrolls sideways by itself where the page is narrower.

    Args:
        caption: stands above it.
        header: a title per column.
        rows: as many cells each; the first is the row's title.

    Returns:
        The table, or nothing without rows.
    """
    if not rows:
        return Html()
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    lines = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for first, *cells in rows
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table>\n'
        f"<caption><span>{escape(caption)}</span></caption>\n"
        f"<thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def panels(figures: Sequence[str]) -> Html:
    """Figures side by side, or one below the other where the page is narrow."""
    if not figures:
        return Html()
    each = "\n".join(f"<figure>{figure}</figure>" for figure in figures)
    return Html(f'<div class="panels">\n{each}\n</div>\n')


def shaded(text: str, share: float) -> Html:
    """A cell of a heat table: the fuller its colour, the nearer `share` is to 1."""
    return Html(
        f'<span class="heat" style="background:rgb(0 114 178 / {60 * share:.0f}%)">'
        f"{escape(text)}</span>"
    )


def strong(text: str) -> Html:
    """Text that stands out."""
    return Html(f"<strong>{escape(text)}</strong>")
