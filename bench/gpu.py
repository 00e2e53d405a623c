"""Build, test and measure on an NVIDIA GPU, in one command of ten minutes at most.

Parts, in this order: `build` compiles the libraries in place; `tests` runs the tests on the GPU;
`sanitizer` runs compute-sanitizer's memcheck and racecheck, where it is installed; `ops` and
`steps` run the benchmarks. Each part's outcome and rows go into bench/results/<gpu>.json as soon as
it ends. `--only` runs a part again, after a build, and replaces what the file has of it alone. A
benchmark whose time is up leaves its last rows out; `--only steps --seconds 560` gets further.

No network is used. Needed: torch >= 2.10 with CUDA, pytest, pytest-benchmark, setuptools, a C++
compiler, nvcc (or CUDA_HOME), ninja if there is one. In a copy without its history
ROBUSTKERN_COMMIT says which commit it is. Exit status: 0 if all parts passed, 1 if one failed, 2
where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from results import PROVENANCE

ROOT = Path(__file__).resolve().parent.parent
# Seconds; together with the starts of Python not quite ten minutes.
BUDGETS = {"build": 70, "tests": 190, "sanitizer": 70, "ops": 100, "steps": 125}
# Seconds before a benchmark's budget ends in which no further group of methods begins.
LAST_GROUP = {"ops": 10, "steps": 50}
# The most important first: where the budget ends, the rest is left out.
OPS = (
    "covariance_product",
    "covariance_form",
    "perturb",
    "gradient_difference",
    "gradient_norm",
    "autocovariance",
)
Results = dict[str, Any]


def main() -> int:
    """Run the parts; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*BUDGETS][1:], help="this part, and the build before it")
    parser.add_argument(
        "--seconds", type=int, help="the budget of each part after the build, in place of its own"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR",
        help="where the results file goes (default: bench/results)",
    )  # fmt: skip
    arguments = parser.parse_args()
    if torch.version.cuda is None or not torch.cuda.is_available():
        print(
            f"bench/gpu.py: no NVIDIA GPU that torch {torch.__version__} can use; nothing was run",
            file=sys.stderr,
        )
        return 2
    path = arguments.results / f"{slug(torch.cuda.get_device_name())}.json"
    chosen = ["build", arguments.only] if arguments.only else list(BUDGETS)
    passed = True
    for part in chosen:
        budget = BUDGETS[part] if part == "build" else arguments.seconds or BUDGETS[part]
        print(f"\n== {part}: {budget} s at most", flush=True)
        rows_path = path.with_suffix(f".{part}.rows")  # stays if this command is stopped
        outcome, rows = PARTS[part](budget, rows_path)
        save(path, merge(load(path), part, outcome, rows, PROVENANCE))
        rows_path.unlink(missing_ok=True)
        passed = passed and outcome["status"] in ("passed", "absent")
        print(f"== {part}: {outcome['status']}, {outcome['seconds']:.0f} s; written: {path}")
        if part == "build" and outcome["status"] != "passed":
            break
    return 0 if passed else 1


def build(budget: float, rows_path: Path) -> tuple[Results, list[Results]]:
    """Compile both libraries into the package."""
    outcome = run([sys.executable, "setup.py", "build_ext", "--inplace"], budget)
    if outcome["status"] == "passed" and not (ROOT / "robustkern/librobustkern_cuda.so").exists():
        outcome |= {"status": "failed", "last": "no CUDA library: is nvcc on the PATH?"}
    return outcome, []


def tests(budget: float, rows_path: Path) -> tuple[Results, list[Results]]:
    """All tests that have a device, what only a GPU can show first."""
    options = ["--device", "cuda", "-q", "--durations=5"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    return run(pytest("tests/test_cuda.py", "tests", *options), budget), []


def sanitizer(budget: float, rows_path: Path) -> tuple[Results, list[Results]]:
    """Memcheck and racecheck of one forward and backward call of each op, a row for each tool."""
    tool = find_sanitizer()
    if tool is None:
        return {"status": "absent", "seconds": 0.0, "last": "compute-sanitizer is not there"}, []
    probe = run([tool, sys.executable, "-c", "import torch; torch.ones(1).cuda()"], budget / 3)
    if probe["status"] != "passed":  # as in a virtual machine that keeps the debugger out
        reason = f"compute-sanitizer cannot work here: {probe['last']}"
        return {"status": "absent", "seconds": probe["seconds"], "last": reason}, []
    script = pytest("tests/test_cuda.py", "--device", "cuda", "-q", "-k", "agree and float32")
    rows = []
    # Memcheck would also count the errors that libraries provoke to find out what there is.
    for check, options in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        command = [tool, "--tool", check, *options, "--error-exitcode", "3", *script]
        # Without torch's cache a tensor's bounds are those of its allocation.
        outcome = run(command, budget / 3, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        rows.append({"check": check, **outcome})
    failed = [row for row in rows if row["status"] != "passed"]
    return {
        "status": failed[0]["status"] if failed else "passed",
        "seconds": sum(row["seconds"] for row in rows),
        "last": "; ".join(f"{row['check']}: {row['last']}" for row in rows),
    }, rows


def ops(budget: float, rows_path: Path) -> tuple[Results, list[Results]]:
    """The ops' benchmarks."""
    files = [f"bench/bench_{op}.py" for op in OPS]
    return benchmarks(budget, budget - LAST_GROUP["ops"], rows_path, *files)


def steps(budget: float, rows_path: Path) -> tuple[Results, list[Results]]:
    """The training steps' benchmark."""
    return benchmarks(budget, budget - LAST_GROUP["steps"], rows_path, "bench/bench_step.py")


PARTS = {"build": build, "tests": tests, "sanitizer": sanitizer, "ops": ops, "steps": steps}


def benchmarks(
    budget: float, begin: float, rows_path: Path, *files: str
) -> tuple[Results, list[Results]]:
    """Run benchmarks, none of which begins after `begin` seconds, and return the rows there are."""
    rows_path.parent.mkdir(parents=True, exist_ok=True)
    options = ["-v", "--device", "cuda", "--budget", str(begin), "--results", str(rows_path)]
    outcome = run(pytest(*files, *options), budget)
    rows = json.loads(rows_path.read_text())["rows"] if rows_path.exists() else []
    return outcome, rows


def pytest(*arguments: str) -> list[str]:
    """The command that runs pytest with this Python, leaving no cache in the tree."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def run(command: list[str], budget: float, **environment: str) -> Results:
    """Run a command to its end or the budget's, showing what it prints; how it went."""
    begin = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        # The whole group: what the command started must not go on to use the GPU.
        alarm = threading.Timer(budget, os.killpg, (process.pid, signal.SIGKILL))
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
            status = process.wait()
        finally:
            alarm.cancel()
            if process.poll() is None:  # interrupted
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - begin
    late = status == -signal.SIGKILL and seconds >= budget
    return {
        "status": "timed out" if late else "failed" if status else "passed",
        "seconds": seconds,
        "budget_s": budget,
        "last": last,
    }


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = os.pathsep.join(f"{home}/bin" for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=folders)


def slug(name: str) -> str:
    """The GPU's name as a file's: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(path: Path) -> Results:
    """A results file, or one without parts."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}, "rows": []}


def merge(
    old: Results, part: str, outcome: Results, rows: list[Results], provenance: Results
) -> Results:
    """The results with one part's outcome and rows in place of those it had."""
    outcome = {**outcome, "commit": provenance["commit"], "command": provenance["command"]}
    return {
        "provenance": provenance,
        "parts": {**old["parts"], part: outcome},
        "rows": [
            *(row for row in old["rows"] if row["part"] != part),
            *({"part": part, **row} for row in rows),
        ],
    }


def save(path: Path, results: Results) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
