"""What a person at the terminal sees: progress bars and tables."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import robustkern
from robustkern.evaluation.report.verdict import percent as percent
from robustkern.training.extras import require


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = "image") -> Any:
    """Start a tqdm bar on stderr: a terminal sees it move, a log gets a line every 10 s.

    Args:
        total: number of samples, or of what `unit` names.
        description: stands before the bar.
        initial: how many of them are done.
        unit: what is counted.

    Returns:
        The bar, a context manager with `update(samples)`.

    Raises:
        ImportError: tqdm is missing.
    """
    interval = 0.2 if sys.stderr.isatty() else 10
    tqdm = require("tqdm", "train").tqdm
    return tqdm(
        total=total,
        desc=description,
        initial=initial,
        leave=False,
        unit=unit,
        mininterval=interval,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns, as Markdown: the first column to the left, the others to the right.

    Args:
        header: a title per column.
        rows: as many cells each.

    Returns:
        Lines, without a final newline.

    Example:
        >>> print(table(["eps", "PGD"], [["0.1", "58.0%"]]))
        | eps |   PGD |
        |:----|------:|
        | 0.1 | 58.0% |
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rules = [":" + "-" * (widths[0] + 1)] + ["-" * (width + 1) + ":" for width in widths[1:]]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join(rules) + "|", *lines[1:]])


def versions() -> dict[str, str]:
    """Say what a result was made with.

    Returns:
        Versions of robustkern, torch, numpy and Python, the machine and the number of threads.
    """
    threads = torch.get_num_threads()
    return {
        "robustkern": robustkern.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, "
        f"{threads} thread{'s' if threads > 1 else ''}",
    }
