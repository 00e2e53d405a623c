"""What data-parallel ranks tell one another, so that N of them give the gradient of one.

Ranks are those of torch.distributed's default process group. Every exchange begins with the same
small all-gather: a rank that fails answers whichever exchange the others wait in, and they fail
too instead of waiting for ever.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Agreement", "agreement", "gather", "maximum", "replicas", "shards", "share_buffers", "size",
    "total", "unreduced",
]  # fmt: skip

_SLOTS = 8  # numbers in one exchange, the first of them 1 unless the rank has failed


class OtherRankError(RuntimeError):
    """Another rank has failed."""


def size() -> int:
    """How many ranks there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def gather(device: torch.device, *values: Tensor | float) -> Tensor:
    """The numbers of all ranks.

    Args:
        device: where the exchange is made.
        *values: 0-dimensional, fewer than 8.

    Returns:
        (ranks, len(values)), float64.

    Raises:
        OtherRankError: if another rank has failed; seen on the CPU only, for there it costs no
            wait.
    """
    slots = torch.zeros(_SLOTS, dtype=torch.float64, device=device)
    for slot, value in enumerate(values, start=1):
        slots[slot] = value
    if size() == 1:
        return slots[None, 1 : 1 + len(values)]
    slots[0] = 1
    found = _all_gather(slots)
    if device.type == "cpu" and not found[:, 0].all():
        failed = (found[:, 0] == 0).nonzero().flatten().tolist()
        raise OtherRankError(f"robustkern: rank {', '.join(map(str, failed))} has failed")
    return found[:, 1 : 1 + len(values)]


def total(values: Tensor) -> Tensor:
    """The sum over ranks of a tensor that has the same shape on all."""
    if size() == 1:
        return values
    gather(values.device)
    values = values.clone()
    distributed.all_reduce(values)
    return values


def maximum(value: Tensor, samples: int) -> Tensor:
    """The largest of all ranks' values, each of so many samples; differentiable.

    Ranks average their parameter gradients, each weighted by its samples. So the one rank whose
    value is the largest gives it all the weight, and the others give none.

    Args:
        value: 0-dimensional.
        samples: of this rank.

    Returns:
        The largest, 0-dimensional.
    """
    if size() == 1:
        return value
    values, counts = gather(value.device, value.detach(), samples).to(value.dtype).unbind(1)
    holds_it = values.argmax() == distributed.get_rank()
    weight = torch.where(holds_it, counts.sum() / samples, 0)
    return values.max() + weight * (value - value.detach())


class Agreement:
    """Whether the ranks still have exchanges before them in this call."""

    def __init__(self) -> None:
        self.open = size() > 1

    def close(self) -> None:
        """There are no further exchanges."""
        self.open = False


@contextmanager
def agreement(device: torch.device, sharded: bool) -> Iterator[Agreement]:
    """If this rank fails inside, the others fail at the exchange that they wait in.

    Args:
        device: where exchanges are made.
        sharded: whether FSDP shards parameters: then they may wait in an exchange of its own, and
            are not answered.

    Yields:
        What knows whether there are exchanges to come.

    Raises:
        OtherRankError: what was raised inside.
    """
    found = Agreement()
    try:
        yield found
    except OtherRankError:
        raise
    except Exception:
        if found.open and not sharded:
            _all_gather(torch.zeros(_SLOTS, dtype=torch.float64, device=device))
        raise


def replicas(caller: str, modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """The modules whose parameter gradients DDP reduces."""
    found = [m for m in modules if isinstance(m, DistributedDataParallel)]
    if found and not distributed.is_initialized():
        raise ValueError(f"{caller}: DistributedDataParallel must have a process group, got none")
    if any(m.static_graph for m in found):
        raise ValueError(
            f"{caller}: DistributedDataParallel must not have a static graph, for it cannot leave "
            "passes unreduced, got static_graph=True"
        )
    return found


def shards(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules whose parameters FSDP2 shards; it reduces their gradients in every pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in modules if isinstance(m, fsdp.FSDPModule)]


def reshard(modules: Iterable[nn.Module], failed: bool = False) -> None:
    """Make the modules' parameters the sharded ones, which a forward without backward hides."""
    found = shards(modules)
    for module in found:
        module.reshard()  # type: ignore[operator]
    whole = any(not hasattr(p, "to_local") for module in found for p in module.parameters())
    for module in found if failed or whole else []:
        _end_failed_forward(module)


def _end_failed_forward(module: nn.Module) -> None:
    """FSDP does it by the root alone, since torch 2.13."""
    if hasattr(module, "reset_iter_state") and module._get_fsdp_state()._is_root:  # type: ignore[operator]
        module.reset_iter_state()  # type: ignore[operator]


def check_wrappers(caller: str, modules: Iterable[nn.Module]) -> None:
    """Refuse what runs passes in a way that the engine cannot follow."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in modules:
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                f"{caller}: model must not be DataParallel over several devices, whose random "
                "numbers cannot be shared by passes; use DistributedDataParallel, one process a "
                f"device, got device_ids={module.device_ids}"
            )
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"{caller}: model must not be FullyShardedDataParallel; use fully_shard (FSDP2)"
            )


@contextmanager
def unreduced(models: Iterable[DistributedDataParallel]) -> Iterator[None]:
    """Passes inside leave the gradients of this rank's samples in `.grad`."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model.no_sync())
        yield


def share_buffers(models: Iterable[DistributedDataParallel]) -> None:
    """What DDP does before the next pass, done before the buffers are noted down."""
    for model in models:
        if model.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            model._sync_buffers()  # type: ignore[no-untyped-call]
            model.require_forward_param_sync = False  # they are shared


def _all_gather(slots: Tensor) -> Tensor:
    found = [torch.empty_like(slots) for _ in range(size())]
    distributed.all_gather(found, slots)
    return torch.stack(found)
