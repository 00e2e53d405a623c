"""The memory bandwidth of this machine, which the benchmarks' percentages refer to."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from torch.utils import cpp_extension


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
