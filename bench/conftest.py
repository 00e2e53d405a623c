"""Fixtures of the benchmarks: methods timed in turn, side by side, in one run."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from results import write_results

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser):
    group = parser.getgroup("robustkern")
    group.addoption("--smoke", action="store_true", help="one round each: do they still run?")
    group.addoption("--results", type=Path, help="write the rows to this JSON file")


@pytest.fixture
def compare(benchmark, request):
    """Time methods in turn, round after round, and report each one's median and ratios."""

    def run(
        group: str,
        methods: dict[str, Callable[[], object]],
        baseline: str,
        rounds: int = 20,
        warmup: int = 3,
        limit: Callable[[], float] | None = None,
        cold: bool = False,
        **facts: Any,
    ) -> dict[str, float]:
        """Median seconds by method.

        Each method's `ratio` is the median over rounds of its time over the baseline's in the same
        round, so that a machine whose speed drifts does not favour one of them. `limit` measures
        this machine's bandwidth in bytes per second, in every round too; with `bytes_min` among
        the facts each row says which share of it the method reaches. `cold` drives the arrays out
        of the caches before every call, for sizes that do not stay there anyway.
        """
        if request.config.getoption("--smoke"):
            rounds, warmup = 1, 0
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        limits: list[float] = []
        elsewhere = torch.zeros(2**24 if cold else 0)  # 64 MiB

        def one_round() -> None:
            if limit:
                limits.append(limit())
            for name, method in methods.items():
                elsewhere.add_(1)
                start = time.perf_counter()
                method()
                seconds[name].append(time.perf_counter() - start)

        benchmark.group = group
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup)
        medians = {}
        for name, times in seconds.items():
            times = times[warmup:]
            base = seconds[baseline][warmup:]
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
            medians[name] = statistics.median(times)
            row = {
                "group": group,
                "method": name,
                "median_s": medians[name],
                "iqr_s": quartiles[2] - quartiles[0],
                "baseline": baseline,
                "ratio": statistics.median(t / b for t, b in zip(times, base, strict=True)),
                "rounds": rounds,
                **facts,
            }
            if limit:
                row["limit_bytes_per_s"] = statistics.median(limits[warmup:])
                row["share_of_limit"] = statistics.median(
                    facts["bytes_min"] / t / b for t, b in zip(times, limits[warmup:], strict=True)
                )
            benchmark.extra_info[name] = row
            ROWS.append(row)
        return medians

    return run


def pytest_terminal_summary(terminalreporter, config):
    """One table for each group, and the results file if one was asked for."""
    for group in dict.fromkeys(row["group"] for row in ROWS):
        rows = [row for row in ROWS if row["group"] == group]
        terminalreporter.section(group)
        terminalreporter.line(f"{'method':<28}{'median ms':>12}{'IQR ms':>10}{'ratio':>9}")
        for row in rows:
            terminalreporter.line(
                f"{row['method']:<28}{row['median_s'] * 1e3:>12.3f}{row['iqr_s'] * 1e3:>10.3f}"
                f"{row['ratio']:>9.3f}"
            )
        terminalreporter.line(f"ratio: to {rows[0]['baseline']}, round by round")
    path = config.getoption("--results")
    if path and ROWS:
        write_results(path, ROWS)
