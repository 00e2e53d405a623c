"""Networks by name: those of the papers, and the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from robustkern.training.models.convolutional import Shape, carlini, cnn
from robustkern.training.models.normalization import Normalize, PerImageStandardization
from robustkern.training.models.residual import ResNet, ResNeXt, WideResNet

Factory = Callable[[Shape, int], nn.Module]


class Classifier(nn.Sequential):
    """What normalizes images, and a network.

    It has a forward of its own because `Classifier.compile` would do nothing without one: the
    compiler leaves out torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) in [0, 1] to (N, classes)."""
        for module in self:  # a slice has one of the two
            input = module(input)
        return input


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


def resnext34(shape: Shape, classes: int) -> ResNeXt:
    """ResNeXt-34 (2x32): `ResNeXt(32, (5, 5, 5), 2)`.

    Args:
        shape: (C, H, W) of an image.
        classes: number of outputs.

    Returns:
        The network.
    """
    return ResNeXt(32, (5, 5, 5), 2, shape[0], classes)


MODELS: dict[str, Factory] = {
    "cnn": cnn,
    "carlini": carlini,
    "resnet18": resnet18,
    "wideresnet28x10": wideresnet28x10,
    "resnext34": resnext34,
}


def build(
    name: str,
    shape: Shape,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    per_image: bool = False,
) -> Classifier:
    """Make the network `name`, behind what normalizes its images.

    Args:
        name: one of `MODELS`, or `module:factory`, a function `factory(shape, classes)` of the
            user's in an importable module.
        shape: (C, H, W) of an image.
        classes: number of classes.
        mean: of the pixels, per channel.
        std: of the pixels, per channel.
        per_image: standardize each image by itself, in place of mean and std.

    Returns:
        `Classifier(Normalize or PerImageStandardization, network)`.

    Raises:
        ValueError: an unknown name, or a factory that cannot be imported.
        TypeError: a factory that is not callable, or returns no module.
    """
    network = find(name)(shape, classes)
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"build: model {name} must return a torch.nn.Module, got {type(network).__name__}"
        )
    front = PerImageStandardization() if per_image else Normalize(mean, std)
    return Classifier(front, network)


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
