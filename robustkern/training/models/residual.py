"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class _BranchBlock(nn.Module):
    """Branches of two 3x3 convolutions with batch norm, their mean, and a shortcut."""

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        inner = channels * branches
        self.conv1 = nn.Conv2d(channels, inner, 3, 1, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, 1, 1, groups=branches, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        return F.relu(inputs + torch.unflatten(hidden, 1, (self.branches, -1)).mean(1))


class ResNeXt(nn.Module):
    """Residual network of branches, as in the code of Finlay, Oberman and Abbasi 2018.

    It is simpler than that of Xie et al. 2017: the branches of a block are averaged. Between two
    stages a 1x1 convolution doubles the channels and a mean over 2x2 pixels halves the image.

    Args:
        width: channels of the first stage and of each of its branches; further stages double them.
        blocks: number of blocks in each stage.
        branches: of each block. `ResNeXt(32, (5, 5, 5), 2)` is ResNeXt-34 (2x32).
        channels: channels of the inputs.
        classes: number of outputs.

    Example:
        >>> ResNeXt(4, (1, 1), 2, channels=3, classes=10)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        width: int,
        blocks: Sequence[int],
        branches: int,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        layers = _convolution(channels, width, 3)
        for stage, count in enumerate(blocks):
            if stage:
                layers += [*_convolution(width, 2 * width, 1), nn.AvgPool2d(2)]
                width *= 2
            layers += [_BranchBlock(width, branches) for _ in range(count)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, classes)."""
        hidden: Tensor = self.body(inputs)
        outputs: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return outputs


def _convolution(inner: int, outer: int, size: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inner, outer, size, 1, size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outer), nn.ReLU()]
