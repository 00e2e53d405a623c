"""Checkpoints: all that a run needs to go on as if it had never stopped; tensors and plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from robustkern.training.files import atomic_path
from robustkern.training.models import Classifier, build

# Raised with the layout below, so that an older file is refused by name.
FORMAT = 1
_KEYS = ("options", "model", "trainer", "log")


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a crash leaves the old file.

    Args:
        path: the file.
        content: `options` (of the run), `model` (the arguments of `models.build`), `trainer` (its
            `state_dict`) and `log` (a record per epoch): tensors and plain data only.

    Raises:
        ValueError: content without one of these.
    """
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(
            f"save_checkpoint: content must hold {', '.join(_KEYS)}, {', '.join(missing)} missing"
        )
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; no code in the file is run.

    Args:
        path: the file.

    Returns:
        The content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no robustkern checkpoint of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        reason = type(error).__name__
        raise ValueError(
            f"load_checkpoint: checkpoint {path} cannot be read, got {reason}"
        ) from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or any(k not in content for k in _KEYS)
    ):
        raise ValueError(
            f"load_checkpoint: {path} must be a robustkern checkpoint of format {FORMAT}"
        )
    return content


def restore_model(content: dict[str, Any]) -> Classifier:
    """Build the network of a checkpoint, with its weights, in eval mode.

    Args:
        content: what `load_checkpoint` gave.

    Returns:
        What `models.build` returns, on the CPU, in the dtype of the weights.

    Raises:
        ValueError: the weights do not fit the network, as when a user's factory has changed.
    """
    arguments, state = content["model"], content["trainer"]["model"]
    model = build(**arguments)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"restore_model: the weights must fit the model {arguments['name']}, got {error}"
        ) from error
    floating = next(value.dtype for value in state.values() if value.is_floating_point())
    return model.to(floating).eval()


def checkpoint_names(checkpoints: Sequence[str | Path]) -> list[str]:
    """Name checkpoints after their folders, with a number where two have one name.

    Args:
        checkpoints: their files.

    Returns:
        As many names, all different.

    Example:
        >>> checkpoint_names(["runs/cure/checkpoint.pt", "other/cure/checkpoint.pt"])
        ['cure', 'cure-2']
    """
    names: list[str] = []
    for path in checkpoints:
        folder = Path(path).resolve().parent.name
        base = folder.encode(errors="replace").decode()  # it need not be text
        same = [base, *(f"{base}-{number}" for number in range(2, len(checkpoints) + 1))]
        names.append(next(name for name in same if name not in names))
    return names
