"""Results as JSON holds them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from torch import Tensor

__all__ = ["plain"]


def plain(result: Any) -> Any:
    """A result of this room for `json` and for `robustkern.analysis.figures`.

    Args:
        result: a tensor, or a dataclass of tensors and numbers.

    Returns:
        A tensor as nested lists of numbers, a dataclass as the dict of its fields. Infinite numbers
        and NaN, which JSON has not, are None.

    Raises:
        TypeError: `result` is neither.

    Example:
        >>> from robustkern.analysis import bounds_against_curvature
        >>> plain(bounds_against_curvature([0.0], projection=0.0))["upper"]
        [None]
    """
    if isinstance(result, Tensor):
        return _plain(result)
    try:
        names = [field.name for field in fields(result)]
    except TypeError as error:
        raise TypeError(
            f"plain: result must be a tensor or a dataclass, got {type(result).__name__}"
        ) from error
    return {name: _plain(getattr(result, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
