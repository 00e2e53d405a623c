"""What every reference shares: the accumulation dtype, and arithmetic one sample at a time."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """The tensor in the dtype sums are taken in: float64 stays, all others become float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, ..., 1), to broadcast against `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def sample_sum(tensor: Tensor) -> Tensor:
    """Sum over everything but the batch: (N, *D) to (N,)."""
    return tensor.flatten(1).sum(1)
