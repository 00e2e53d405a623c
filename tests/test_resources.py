"""The GPU kernels as compiled: nothing spills, and the committed table is of what is shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "resources.json"


def variants(rows):
    """By kind of compiler: which kernels there are, without the figures."""
    found = {}
    for row in rows:
        key = row["kernel"], row["variant"], row["arch"]
        found.setdefault(row["compiler"], set()).add(key)
    return found


def test_no_kernel_spills_and_the_table_is_complete(tmp_path):
    path = tmp_path / "resources.json"
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "resources.py"), "--output", str(path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    committed = variants(json.loads(TABLE.read_text())["rows"])
    for compiler, rows in variants(json.loads(path.read_text())["rows"]).items():
        kind = compiler.split()[0]
        tables = [table for name, table in committed.items() if name.split()[0] == kind]
        assert tables
        for table in tables:  # every version of a compiler gets the same kernels
            assert table == rows
