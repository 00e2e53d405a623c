"""Writing results: whole files or none, into a folder that was tried before the work began."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path; what is written there takes the place of `path` when all went well.

    Args:
        path: the file to write or replace.

    Yields:
        The temporary path, in the same folder and with the same suffix. After an error it is
        removed and `path` is as it was.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("1 2 3")
        >>> target.read_text()
        '1 2 3'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, *, indent: int | None = 2) -> None:
    """Write `content` (plain data) to `path` as JSON, atomically; None for one line."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def read_results(path: Path, what: str, made_with: Mapping[str, Any], key: str) -> Any:
    """Read results that an earlier run wrote, if they are what this run would write.

    Args:
        path: the file.
        what: they are part of, named in the messages.
        made_with: all that decides the results; the file has it under the same name.
        key: of the results in the file.

    Returns:
        The results; None if there is no file.

    Raises:
        ValueError: the file is damaged, or was made with something else, which is named.
    """
    if not path.exists():
        return None
    what_to_do = "remove it, or choose another --output"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, results = dict(content["made_with"]), content[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold results of an {what}, got {error!r}; {what_to_do}"
        ) from error
    # As text, for the order of what they name matters too.
    different = [
        key for key, value in made_with.items() if json.dumps(before.get(key)) != json.dumps(value)
    ]
    if different:
        raise ValueError(
            f"{path} must be of the same {what} to go on with, "
            f"got another {' and '.join(different)}; {what_to_do}"
        )
    return results


def fingerprint(content: bytes) -> str:
    """Tell contents apart: their SHA-256."""
    return hashlib.sha256(content).hexdigest()


def output_folder(path: str | Path, command: str) -> Path:
    """Make the folder `path` and see that files can be written there.

    Args:
        path: the folder; parents are made too.
        command: named in the message.

    Returns:
        The folder.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{command}: output folder {folder} must be writable, got {error.strerror}"
        ) from error
    return folder
