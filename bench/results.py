"""Where figures go: JSON files that name the machine, the versions, the commit and the command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """What a figure needs beside it to be made again."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.strip() + (" and changes" if changed else ""),
        "command": shlex.join(["python", *_relative(sys.orig_argv[1:], root)]),
    }


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with their provenance, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"provenance": PROVENANCE, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    print(f"written: {path}")


def _relative(arguments: list[str], root: Path) -> list[str]:
    """The command line as seen from the repository, without the folders of this machine."""
    found = []
    for argument in arguments:
        path = Path(argument).resolve()
        inside = argument and path.exists() and path.is_relative_to(root)
        outside = argument.startswith("/") or argument.startswith("..")
        found.append(str(path.relative_to(root)) if inside else path.name if outside else argument)
    return found


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# Taken when the work begins: the files may change before its results are written.
PROVENANCE = provenance()
