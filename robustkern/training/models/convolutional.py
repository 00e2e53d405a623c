"""Networks of convolutions and linear layers, without batch norm."""

from __future__ import annotations

import math

from torch import nn

Shape = tuple[int, int, int]


def cnn(shape: Shape, classes: int, width: int = 32) -> nn.Sequential:
    """Three 3x3 convolutions, the last two halving the image, and two linear layers; no batch norm.

    Args:
        shape: (C, H, W) of an image.
        classes: number of outputs.
        width: channels of the first convolution; the others have twice as many.

    Returns:
        A module that maps (N, C, H, W) to (N, classes).

    Example:
        >>> import torch
        >>> cnn((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    channels, height, width_in = shape
    features = 2 * width * math.ceil(height / 4) * math.ceil(width_in / 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, classes),
    )


def carlini(shape: Shape, classes: int) -> nn.Sequential:
    """Network of Carlini and Wagner 2017 for CIFAR-10, without its dropout, as SGR was tested on.

    Two 3x3 convolutions without padding and a maximum over 2x2 pixels, twice, with 64 and 128
    channels, and two linear layers of width 256.

    Args:
        shape: (C, H, W) of an image, at least 16x16.
        classes: number of outputs.

    Returns:
        A module that maps (N, C, H, W) to (N, classes).

    Raises:
        ValueError: images too small for it.

    Example:
        >>> import torch
        >>> carlini((3, 32, 32), 10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    channels, *size = shape
    if min(size) < 16:
        raise ValueError(f"carlini: images must be at least 16x16, got {size[0]}x{size[1]}")
    layers: list[nn.Module] = []
    for width in (64, 128):
        for inner in (channels, width):
            layers += [nn.Conv2d(inner, width, 3), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = width
    height, breadth = (((side - 4) // 2 - 4) // 2 for side in size)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(channels * height * breadth, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )
