"""The memory bandwidth of this machine, which the benchmarks' percentages refer to."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from timing import event_seconds
from torch.utils import cpp_extension

COPIED_BYTES = 2**29  # ten times the largest cache of a GPU
COPIES = 4  # in a row, so that the first one's launch counts for little


@cache
def _module() -> ModuleType:
    return cpp_extension.load(
        "robustkern_stream",
        [str(Path(__file__).with_suffix(".cpp"))],
        extra_cflags=["-O3", "-march=native", "-fopenmp"],
        extra_ldflags=["-fopenmp"],
    )


def bandwidth(
    kind: Literal["copy", "dot", "triad"], nbytes: int, threads: int, repeats: int = 30
) -> float:
    """Bytes per second, read and written, of the fastest pass over arrays of `nbytes` each.

    `copy` is c = a, `dot` a sum of a * b, `triad` c = a + 3 b, in float32.
    """
    return float(_module().bandwidth(kind, nbytes, threads, repeats))


def limit(kind: Literal["copy", "dot"], nbytes: int, device: torch.device) -> Callable[[], float]:
    """Measures what arrays of `nbytes` can be moved with; on a GPU, a copy of a large one."""
    if device.type == "cpu":
        return lambda: bandwidth(kind, nbytes, torch.get_num_threads(), repeats=1)
    source, target = _arrays(device)
    moved = 2 * COPIES * COPIED_BYTES
    return lambda: moved / event_seconds(lambda: [target.copy_(source) for _ in range(COPIES)])


@cache
def _arrays(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Random: zeros may move faster than what people have.
    source = torch.randint(256, (COPIED_BYTES,), dtype=torch.uint8, device=device)
    return source, torch.zeros_like(source)
