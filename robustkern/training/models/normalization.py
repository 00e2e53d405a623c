"""What stands in front of a network, so that penalties and attacks see pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel, in the network, so that penalties and attacks see pixels.

    Args:
        mean: one number per channel.
        std: one number per channel, positive.

    Raises:
        ValueError: `mean` and `std` of different lengths, or a `std` that is not positive.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(
                "Normalize: std must hold one positive number per channel, "
                f"got mean {mean} and std {std}"
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        return (inputs - self.mean) / self.std


class PerImageStandardization(nn.Module):
    """(x - mean) / std of each image, over its channels and pixels, as in Roth et al. 2018.

    The deviation is at least 1 / sqrt(C H W), so that an image of one colour becomes zero, with a
    finite gradient.

    Example:
        >>> images = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]], [[[0.5, 0.5, 0.5, 0.5]]]])
        >>> PerImageStandardization()(images).flatten(1)
        tensor([[-1., -1.,  1.,  1.],
                [ 0.,  0.,  0.,  0.]])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Standardize (N, C, H, W)."""
        centred = inputs - inputs.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        # Clamped before the root, whose gradient at zero is infinite.
        return centred / variance.clamp(min=1 / inputs.shape[1:].numel()).sqrt()


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel; the latter is 1 for a constant channel.

    Args:
        images: (N, C, H, W) floating point.

    Returns:
        Two lists of C numbers.

    Example:
        >>> pixel_statistics(torch.tensor([[[[0.0, 1.0]]]]))
        ([0.5], [0.5])
    """
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    return mean.tolist(), torch.where(std > 0, std, 1).tolist()
