"""How calls are timed: on the CPU one by one, on a GPU by events around several in a row."""

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Method = Callable[..., object]
Timer = Callable[[], float]

SPAN_S = 1e-3  # calls in a row on a GPU: events resolve half a microsecond
MOST_CALLS = 200


def cpu_timers(
    methods: dict[str, Method], inputs: Sequence[Tensor], cold: bool
) -> dict[str, Timer]:
    """Seconds of one call; `cold` drives the arrays out of the caches before it."""
    elsewhere = torch.zeros(2**24 if cold else 0)  # 64 MiB

    def timer(method: Method) -> Timer:
        def seconds() -> float:
            elsewhere.add_(1)
            start = time.perf_counter()
            method(*inputs)
            return time.perf_counter() - start

        return seconds

    return {name: timer(method) for name, method in methods.items()}


def gpu_timers(methods: dict[str, Method], copies: list[tuple[Tensor, ...]]) -> dict[str, Timer]:
    """Mean seconds of calls in a row, each on the next of the copies of the inputs."""

    def timer(method: Method) -> Timer:
        rotation = itertools.cycle(copies)

        def seconds(calls: int) -> float:
            return event_seconds(lambda: [method(*next(rotation)) for _ in range(calls)]) / calls

        seconds(1)
        calls = max(1, min(MOST_CALLS, int(SPAN_S / seconds(1))))
        return lambda: seconds(calls)

    return {name: timer(method) for name, method in methods.items()}


def graph_timers(methods: dict[str, Method], copies: list[tuple[Tensor, ...]]) -> dict[str, Timer]:
    """Mean seconds of a call in the replay of a CUDA graph of one call on each of the copies."""

    def timer(method: Method) -> Timer:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # All kept until the end: no call may write where the one before it did.
            outputs = [method(*inputs) for inputs in copies]
        del outputs
        return lambda: event_seconds(graph.replay) / len(copies)

    return {name: timer(method) for name, method in methods.items()}


def event_seconds(run: Callable[[], object]) -> float:
    """Seconds that the GPU takes for a piece of work, from idle to its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def rotated(inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Copies of the inputs, together four times the GPU's second-level cache."""
    size = sum(tensor.nbytes for tensor in inputs)
    if not size:
        return [tuple(inputs)]
    cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    count = math.ceil(4 * cache / size)
    return [tuple(inputs), *(tuple(t.clone() for t in inputs) for _ in range(count - 1))]


def peak_bytes(method: Method, inputs: Sequence[Tensor]) -> int:
    """The most GPU memory that a call takes above what was taken before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
