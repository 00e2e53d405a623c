"""Fixtures of the benchmarks: methods timed in turn, side by side, in one run."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from results import write_results
from timing import cpu_timers, gpu_timers, graph_timers, peak_bytes, rotated
from torch import Tensor

collect_ignore = ["gpu.py", "resources.py"]  # commands
ROWS: list[dict[str, Any]] = []
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
BEGIN = time.monotonic()


def pytest_addoption(parser):
    group = parser.getgroup("robustkern")
    group.addoption("--smoke", action="store_true", help="one round each: do they still run?")
    group.addoption("--results", type=Path, help="write the rows to this JSON file")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--budget", type=float, help="seconds after which no further test begins")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # rivals of equal accuracy
        # A figure is not worth less for a warning; the tests are where one is an error.
        config.addinivalue_line("filterwarnings", "default")


def pytest_generate_tests(metafunc):
    """Shapes, a dictionary in the module, and dtypes are those of the device."""
    kind = metafunc.config.getoption("--device")
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = {
        name
        for mark in marks
        for name in ([mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0])
    }
    if "shape" in metafunc.fixturenames and "shape" not in chosen:
        metafunc.parametrize("shape", metafunc.module.SHAPES[kind], ids=str)
    if "dtype" in metafunc.fixturenames and "dtype" not in chosen:
        metafunc.parametrize("dtype", DTYPES[kind], ids=str)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def budget(request):
    seconds = request.config.getoption("--budget")
    if seconds is not None and time.monotonic() - BEGIN > seconds:
        pytest.skip(f"the {seconds:.0f} seconds are used up")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def compare(benchmark, request, device):
    """Time methods in turn, round after round, and report each one's median and ratios."""

    def run(
        group: str,
        methods: dict[str, Callable[..., object]],
        baseline: str,
        inputs: Sequence[Tensor] = (),
        rounds: int = 20,
        warmup: int = 3,
        limit: Callable[[], float] | None = None,
        cold: bool = False,
        graphs: bool = False,
        limits: dict[str, float] | None = None,
        **facts: Any,
    ) -> dict[str, float]:
        """Median seconds by method; each is called with the inputs.

        Each method's `ratio` is the median over rounds of its time over the baseline's in the same
        round, so that a machine whose speed drifts does not favour one of them. `limit` measures
        this machine's bandwidth in bytes per second, in every round too; with `bytes_min` among
        the facts each row says which share of it the method reaches. `cold` drives the arrays out
        of the CPU's caches before every call, for sizes that do not stay there anyway. On a GPU
        the calls go through copies of the inputs that no cache holds together, and each row has the
        peak memory of a call; `graphs` times them once more by the replay of a CUDA graph, without
        the launches that bound small sizes. A ratio above its method's among the `limits` fails,
        once all is written.
        """
        if request.config.getoption("--smoke"):
            rounds, warmup = 1, 0
        memory: dict[str, dict[str, int]] = {}
        if device.type == "cpu":
            timers = {group: cpu_timers(methods, inputs, cold)}
        else:
            memory = {name: {"peak_bytes": peak_bytes(m, inputs)} for name, m in methods.items()}
            copies = rotated(inputs)
            timers = {group: gpu_timers(methods, copies)}
            if graphs:
                timers[f"{group}|graph replay"] = graph_timers(methods, copies)
        seconds: dict[tuple[str, str], list[float]] = {
            (title, name): [] for title, group_timers in timers.items() for name in group_timers
        }
        bandwidths: list[float] = []

        def one_round() -> None:
            if limit:
                bandwidths.append(limit())
            for title, name in seconds:
                seconds[title, name].append(timers[title][name]())

        benchmark.group = group
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
        medians = {}
        for (title, name), times in seconds.items():
            times = times[warmup:]
            base = seconds[title, baseline][warmup:]
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
            row = {
                "group": title,
                "method": name,
                "median_s": statistics.median(times),
                "iqr_s": quartiles[2] - quartiles[0],
                "baseline": baseline,
                "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
                "rounds": rounds,
                **facts,
                **memory.get(name, {}),
            }
            if "bytes_min" in facts:
                row["bytes_per_s"] = facts["bytes_min"] / row["median_s"]
            if limit:
                row["limit_bytes_per_s"] = statistics.median(bandwidths[warmup:])
                row["share_of_limit"] = statistics.median(
                    facts["bytes_min"] / t / b
                    for t, b in zip(times, bandwidths[warmup:], strict=True)
                )
            if title == group:
                medians[name] = row["median_s"]
                benchmark.extra_info[name] = row
            ROWS.append(row)
        _save(request.config)
        if not request.config.getoption("--smoke"):
            ratios = {name: benchmark.extra_info[name]["ratio"] for name in limits or {}}
            assert all(ratios[name] <= limit for name, limit in (limits or {}).items()), ratios
        return medians

    return run


@pytest.fixture
def note(request):
    """Add a row without figures, such as that of a method which failed."""

    def add(**row: Any) -> None:
        ROWS.append(row)
        _save(request.config)

    return add


def _save(config):
    # After every group: a run that is stopped keeps what it has.
    path = config.getoption("--results")
    if path:
        write_results(path, ROWS)


def pytest_terminal_summary(terminalreporter, config):
    """One table for each group."""
    for group in dict.fromkeys(row["group"] for row in ROWS):
        rows = [row for row in ROWS if row["group"] == group and "median_s" in row]
        terminalreporter.section(group)
        terminalreporter.line(f"{'method':<28}{'median ms':>12}{'IQR ms':>10}{'ratio':>9}")
        for row in rows:
            terminalreporter.line(
                f"{row['method']:<28}{row['median_s'] * 1e3:>12.3f}{row['iqr_s'] * 1e3:>10.3f}"
                f"{row['ratio']:>9.3f}"
            )
        if rows:
            terminalreporter.line(f"ratio: to {rows[0]['baseline']}, round by round")
    path = config.getoption("--results")
    if path and ROWS:
        terminalreporter.line(f"written: {path}")
