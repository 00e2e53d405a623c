"""Networks for images of any size from 8x8, and the normalization that goes with them.

A factory takes `shape`, the (C, H, W) of an image, and the number of classes, and returns a module
that maps (N, C, H, W) to (N, classes).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]
Factory = Callable[[Shape, int], nn.Module]


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


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; batch norm and ReLU come `before` or after them."""

    def __init__(self, inner: int, outer: int, stride: int, *, before: bool) -> None:
        super().__init__()
        self.before = before
        self.norm1 = nn.BatchNorm2d(inner if before else outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            project = nn.Conv2d(inner, outer, 1, stride, bias=False)
            self.shortcut = project if before else nn.Sequential(project, nn.BatchNorm2d(outer))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.before:
            active = F.relu(self.norm1(inputs))
            # A projection takes the activated inputs; an identity passes on the inputs themselves.
            shortcut = inputs if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
            residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
            return residual + shortcut
        hidden: Tensor = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        return F.relu(hidden + self.shortcut(inputs))


def _stages(
    width: int, widths: Sequence[int], blocks: Sequence[int], *, before: bool
) -> nn.Sequential:
    """Stages of blocks; every stage but the first halves the image."""
    layers = []
    for stage, (outer, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            layers.append(_Block(width, outer, 2 if stage and not index else 1, before=before))
            width = outer
    return nn.Sequential(*layers)


class ResNet(nn.Module):
    """Residual network for small images (He et al. 2016): 3x3 stem, basic blocks, global mean.

    Args:
        width: channels of the first stage; every further stage doubles them.
        blocks: number of blocks in each stage. `ResNet(64, (2, 2, 2, 2))` is ResNet-18.
        channels: channels of the inputs.
        classes: number of outputs.

    Example:
        >>> ResNet(8, (1, 1), channels=3, classes=10)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, width: int, blocks: Sequence[int], channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(blocks))]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = _stages(width, widths, blocks, before=False)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, classes)."""
        hidden: Tensor = self.stages(self.stem(inputs))
        outputs: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return outputs


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko and Komodakis 2016), three stages of pre-activation blocks.

    Args:
        depth: number of convolutions, 6 n + 4.
        widen: factor on the widths 16, 32, 64.
        channels: channels of the inputs.
        classes: number of outputs.

    Raises:
        ValueError: `depth` is not 6 n + 4 with n at least 1.

    Example:
        >>> WideResNet(10, 1, channels=1, classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widen: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"WideResNet: depth must be 6 n + 4 with n at least 1, got {depth}")
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stages = _stages(16, widths, [(depth - 4) // 6] * 3, before=True)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, classes)."""
        hidden = F.relu(self.norm(self.stages(self.stem(inputs))))
        outputs: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return outputs


def cnn(shape: Shape, classes: int, width: int = 32) -> nn.Sequential:
    """Three 3x3 convolutions, the last two halving the image, and two linear layers; no batch norm.

    Args:
        shape: (C, H, W) of an image.
        classes: number of outputs.
        width: channels of the first convolution; the others have twice as many.

    Returns:
        A module that maps (N, C, H, W) to (N, classes).

    Example:
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


def resnet18(shape: Shape, classes: int) -> ResNet:
    """ResNet-18 for small images: `ResNet(64, (2, 2, 2, 2))`.

    Args:
        shape: (C, H, W) of an image.
        classes: number of outputs.

    Returns:
        The network.
    """
    return ResNet(64, (2, 2, 2, 2), shape[0], classes)


def wideresnet28x10(shape: Shape, classes: int) -> WideResNet:
    """WRN-28-10: `WideResNet(28, 10)`, 36 million parameters.

    Args:
        shape: (C, H, W) of an image.
        classes: number of outputs.

    Returns:
        The network.
    """
    return WideResNet(28, 10, shape[0], classes)


MODELS: dict[str, Factory] = {"cnn": cnn, "resnet18": resnet18, "wideresnet28x10": wideresnet28x10}


def build(
    name: str, shape: Shape, classes: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Sequential:
    """Make the network `name`, behind a `Normalize` layer.

    Args:
        name: `cnn`, `resnet18`, `wideresnet28x10`, or `module:factory`, a function `factory(shape,
            classes)` of the user's in an importable module.
        shape: (C, H, W) of an image.
        classes: number of classes.
        mean: of the pixels, per channel.
        std: of the pixels, per channel.

    Returns:
        `Sequential(Normalize, network)`.

    Raises:
        ValueError: an unknown name, or a factory that cannot be imported.
        TypeError: a factory that is not callable, or returns no module.
    """
    network = find(name)(shape, classes)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"build: model {name} must return a torch.nn.Module, got {type(network).__name__}"
        )
    return nn.Sequential(Normalize(mean, std), network)


def find(name: str) -> Factory:
    """Find the factory that `name` stands for; see `build`.

    Args:
        name: as for `build`.

    Returns:
        The factory.

    Raises:
        ValueError: an unknown name, or a factory that cannot be imported.
        TypeError: a factory that is not callable.
    """
    if name in MODELS:
        return MODELS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"build: model must be one of {', '.join(MODELS)} or module:factory, got {name}"
        )
    try:
        factory: Factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"build: model {name} must name an importable factory, got {error}"
        ) from error
    if not callable(factory):
        raise TypeError(f"build: model {name} must be callable, got {type(factory).__name__}")
    return factory


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
