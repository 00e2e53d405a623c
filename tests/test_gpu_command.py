"""`bench/gpu.py` where there is no GPU, and the benchmarks that it would run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = sorted(
    path.name for path in (ROOT / "bench").glob("bench_*.py") if path.stem != "bench_step"
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu

    return gpu


def command(*arguments):
    return subprocess.run(
        [sys.executable, "bench/gpu.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = command("--results", str(tmp_path))
    assert done.returncode == 2
    assert "no NVIDIA GPU that torch" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_part_and_option(gpu):
    done = command("--help")
    assert done.returncode == 0
    for part in gpu.BUDGETS:
        assert f"`{part}`" in done.stdout
    for option in ("--only", "--seconds", "--results", "ROBUSTKERN_COMMIT"):
        assert option in done.stdout


def test_budgets_are_ten_minutes_together(gpu):
    assert sum(gpu.BUDGETS.values()) <= 600
    assert set(gpu.PARTS) == set(gpu.BUDGETS)


def test_a_part_replaces_its_own_rows_and_keeps_the_others(gpu, tmp_path):
    path = tmp_path / "results" / "a-gpu.json"
    now = {"commit": "abc", "command": "python bench/gpu.py"}
    passed, failed = {"status": "passed", "seconds": 1.0}, {"status": "failed", "seconds": 2.0}
    gpu.save(path, gpu.merge(gpu.load(path), "ops", passed, [{"x": 1}, {"x": 2}], now))
    gpu.save(path, gpu.merge(gpu.load(path), "steps", passed, [{"x": 3}], now))
    later = {"commit": "def", "command": "python bench/gpu.py --only ops"}
    gpu.save(path, gpu.merge(gpu.load(path), "ops", failed, [{"x": 4}], later))
    results = json.loads(path.read_text())
    assert results["provenance"] == later
    assert results["rows"] == [{"part": "steps", "x": 3}, {"part": "ops", "x": 4}]
    assert results["parts"] == {"ops": failed | later, "steps": passed | now}
    assert list(path.parent.iterdir()) == [path]


def test_a_command_is_stopped_when_its_budget_ends(gpu, capsys):
    begin = time.monotonic()
    script = "print('begun', flush=True); import time; time.sleep(60)"
    outcome = gpu.run([sys.executable, "-c", script], 2.0)
    assert time.monotonic() - begin < 30
    assert outcome["status"] == "timed out"
    assert outcome["last"] == "begun"
    assert capsys.readouterr().out == "begun\n"
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30)["status"] == "failed"
    assert gpu.run([sys.executable, "-c", "print('fine')"], 30)["status"] == "passed"


def test_the_file_is_named_after_the_gpu(gpu):
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu.slug("NVIDIA A100-SXM4-80GB (MIG)") == "nvidia-a100-sxm4-80gb-mig"


def test_what_it_measures_exists(gpu):
    assert {f"bench_{op}.py" for op in gpu.OPS} <= set(BENCHMARKS)


def test_benchmarks_still_run(tmp_path):
    """The smallest, in a process of its own, as the others are run by `pytest bench --smoke`."""
    written = tmp_path / "rows.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--smoke"),
            *("bench/bench_autocovariance.py", "-k", "256", "--results", str(written)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    rows = json.loads(written.read_text())["rows"]
    assert [row["method"] for row in rows] == ["robustkern", "torch.fft"]
    assert all(row["group"] == "autocovariance|fwd|(256, 1, 8, 8)|float32|cpu" for row in rows)
