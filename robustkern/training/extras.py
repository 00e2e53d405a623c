"""Optional packages, imported where they are used: the library needs torch and numpy only."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, or say which extra of robustkern installs it.

    Args:
        module: dotted name of the module.
        extra: the extra that brings it: `train`, `plots`, `eval` or `data`.

    Returns:
        The module.

    Raises:
        ImportError: the module cannot be imported.

    Example:
        >>> require("math", "train").sqrt(4.0)
        2.0
        >>> require("no_such_module", "plots")
        Traceback (most recent call last):
        ImportError: no_such_module cannot be imported; install it with: pip install
            "robustkern[plots]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f'{module} cannot be imported; install it with: pip install "robustkern[{extra}]"'
        raise ImportError(message) from error
