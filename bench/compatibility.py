"""Runs the tests of settings and writes docs/compatibility.md from their outcomes.

On a machine with a GPU, `--device cuda` fills its column. `--check` runs nothing and says whether
the page is what the results give.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
from readme import RESULTS, made, read, table

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
TEXT = """\
# Where it works

Each row is a test: `robustkern.backward` leaves the gradient of double backward there, or, where
there is no double backward, of the same network in a form that has it. What is refused raises an
error, and the note says why or what to do instead.

"""


def main() -> int:
    """Run the tests and write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the tests")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it differs")
    arguments = parser.parse_args()
    if arguments.check:
        return int(PAGE.read_text() != page())
    # It takes the time to look the machine up.
    from results import write_results

    sys.path.insert(0, str(ROOT))  # the package of this tree
    outcomes = Outcomes()
    options = ["-q", "-m", "setting", "--device", arguments.device, str(ROOT / "tests")]
    status = pytest.main(options, plugins=[outcomes])
    write_results(RESULTS / f"settings-{arguments.device}.json", list(outcomes.rows.values()))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return int(status)


class Outcomes:
    """Collects what became of each setting: passed, failed, or not run for want of a device."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    @pytest.hookimpl(tryfirst=True)  # before tests for another device are left out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A row for each setting."""
        for item in items:
            for marker in item.iter_markers("setting"):
                row = {"setting": marker.args[0], **marker.kwargs, "outcome": "not run"}
                self.rows.setdefault(marker.args[0], row)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        """A setting has passed if all its tests have."""
        report = yield
        for marker in item.iter_markers("setting"):
            row = self.rows[marker.args[0]]
            if report.failed:
                row["outcome"] = "failed"
            elif report.when == "call" and report.passed and row["outcome"] != "failed":
                row["outcome"] = "passed"
        return report


def page() -> str:
    """The page that the results give."""
    cpu, gpu = read("settings-cpu"), read("settings-cuda")
    assert cpu is not None
    of_gpu = {row["setting"]: row for row in gpu["rows"]} if gpu else {}
    groups: dict[str, list[list[str]]] = {}
    for row in cpu["rows"]:
        name = row["setting"]
        note = row.get("refused", row.get("note", ""))
        cells = [name, cell(row, "GPUs only"), cell(of_gpu.get(name), "not measured yet"), note]
        groups.setdefault(row["group"], []).append(cells)
    text = TEXT
    for group, rows in groups.items():
        text += f"## {group.capitalize()}\n" + table(["setting", "CPU", "GPU", "note"], rows)
    text += f"CPU: {made(cpu)}"
    if gpu:
        text += f"\nGPU: {gpu['provenance']['gpu']}; {made(gpu)}"
    return text


def cell(row: dict[str, str] | None, otherwise: str) -> str:
    """What a column says of a setting."""
    if row is None or row["outcome"] == "not run":
        return otherwise
    if row["outcome"] == "failed":
        return "**fails**"
    return "refused" if "refused" in row else "works"


if __name__ == "__main__":
    sys.exit(main())
