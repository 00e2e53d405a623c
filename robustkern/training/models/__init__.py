"""Networks for small images, and the normalization that goes with them.

A factory takes `shape`, the (C, H, W) of an image, and the number of classes, and returns a module
that maps (N, C, H, W) to (N, classes).
"""

from robustkern.training.models.convolutional import Shape, carlini, cnn
from robustkern.training.models.factories import (
    MODELS,
    Classifier,
    Factory,
    build,
    find,
    resnet18,
    resnext34,
    wideresnet28x10,
)
from robustkern.training.models.normalization import (
    Normalize,
    PerImageStandardization,
    pixel_statistics,
)
from robustkern.training.models.residual import ResNet, ResNeXt, WideResNet

__all__ = [
    "MODELS",
    "Classifier",
    "Factory",
    "Normalize",
    "PerImageStandardization",
    "ResNeXt",
    "ResNet",
    "Shape",
    "WideResNet",
    "build",
    "carlini",
    "cnn",
    "find",
    "pixel_statistics",
    "resnet18",
    "resnext34",
    "wideresnet28x10",
]
