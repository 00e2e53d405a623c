"""Where figures go: JSON files that name the machine, the versions, the commit and the command."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import robustkern


def provenance() -> dict[str, Any]:
    """What a figure needs beside it to be made again."""
    root = Path(__file__).resolve().parent.parent
    facts = {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "robustkern": robustkern.__version__,
        "commit": _commit(root),
        "command": shlex.join(["python", *_relative(sys.orig_argv[1:], root)]),
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        }
    return facts


def _commit(root: Path) -> str:
    """What ROBUSTKERN_COMMIT says, for a copy without its history, or what git says."""
    if "ROBUSTKERN_COMMIT" in os.environ:
        return os.environ["ROBUSTKERN_COMMIT"]
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    # Results that are moved away or made anew change nothing of what is run.
    code = ("--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    changed = _output("git", "-C", str(root), "status", *code)
    return (commit or "unknown") + (" and changes" if changed else "")


def _output(*command: str) -> str:
    """The first line that a program prints; nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return printed.strip().partition("\n")[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


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
