"""What the benchmarks of ops on samples share: their sizes, their numbers, the compiled rival."""

from collections.abc import Callable

import torch
from torch import Tensor

# On a GPU: one size bound by the launch, two that no cache holds.
SHAPES = {
    "cpu": [(64, 3, 224, 224), (256, 3, 32, 32)],
    "cuda": [(256, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)],
}


def random(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def compiled(
    naive: Callable[..., object], device: torch.device
) -> dict[str, Callable[..., object]]:
    """torch.compile of the naive method, for this one shape; on the GPU only."""
    if device.type == "cpu":
        return {}
    torch.compiler.reset()
    return {"compiled": torch.compile(naive, dynamic=False)}


def differentiate_twice(function: Callable[[Tensor], Tensor], v: Tensor) -> Callable[..., Tensor]:
    """Value, gradient, and the gradient of <v, gradient>: what a penalty's loss term runs."""

    def run(gradient: Tensor) -> Tensor:
        leaf = gradient.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first, leaf, v.to(first.dtype))[0]

    return run
