"""Networks for the reduced recipes: the papers' kinds, narrow enough for a few minutes on a CPU."""

from torch import nn

from robustkern.training.models import ResNet, ResNeXt, Shape, WideResNet
from robustkern.training.models import cnn as full_cnn


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """Three stages of one block, 8 channels at first."""
    return ResNet(8, (1, 1, 1), shape[0], classes)


def wideresnet28x10(shape: Shape, classes: int) -> nn.Module:
    """WRN-10-1."""
    return WideResNet(10, 1, shape[0], classes)


def resnext34(shape: Shape, classes: int) -> nn.Module:
    """Three stages of one block, 4 channels at first."""
    return ResNeXt(4, (1, 1, 1), 2, shape[0], classes)


def carlini(shape: Shape, classes: int) -> nn.Module:
    """The small network of the command line, 16 channels at first."""
    return full_cnn(shape, classes, width=16)
