"""Networks, the normalization in front of them and factories by name."""

import re
import sys
import types

import pytest
import torch
from torch import nn

from robustkern.training.models import (
    Normalize,
    PerImageStandardization,
    ResNet,
    ResNeXt,
    WideResNet,
    build,
    carlini,
    cnn,
    pixel_statistics,
    resnet18,
    resnext34,
    wideresnet28x10,
)


@pytest.mark.parametrize("size", [8, 15, 28, 32])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_networks_take_any_size(size, channels):
    inputs = torch.rand(2, channels, size, size)
    for network in (
        cnn((channels, size, size), 7, width=4),
        ResNet(4, (1, 1, 1, 1), channels, 7),
        WideResNet(10, 1, channels, 7),
        ResNeXt(4, (1, 1, 1), 2, channels, 7),
    ):
        assert network(inputs).shape == (2, 7)


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 16)])
def test_carlinis_network_takes_images_from_16_pixels(size):
    assert carlini((1, *size), 7)(torch.rand(2, 1, *size)).shape == (2, 7)


def test_branches_of_resnext_are_averaged():
    torch.manual_seed(0)
    block = ResNeXt(4, (1,), 2).body[3].eval()
    inputs = torch.rand(2, 4, 8, 8)
    hidden = torch.relu(block.norm1(block.conv1(inputs))).chunk(2, dim=1)
    weights = block.conv2.weight.chunk(2)
    outputs = [
        torch.nn.functional.conv2d(part, weight, padding=1)
        for part, weight in zip(hidden, weights, strict=True)
    ]
    scale = (1 + block.norm2.eps) ** -0.5
    expected = torch.relu(inputs + scale * (outputs[0] + outputs[1]) / 2)
    torch.testing.assert_close(block(inputs), expected)


def test_sizes_are_those_of_the_papers():
    def parameters(network):
        return sum(parameter.numel() for parameter in network.parameters())

    with torch.device("meta"):
        assert parameters(resnet18((3, 32, 32), 10)) == 11_173_962
        assert parameters(wideresnet28x10((3, 32, 32), 10)) == 36_479_194
        assert parameters(carlini((3, 32, 32), 10)) == 1_147_978
        resnext = resnext34((3, 32, 32), 10)
        assert parameters(resnext) == 3_892_522
        layers = [m for m in resnext.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == 34


@pytest.mark.parametrize("network", [ResNet(4, (2, 1)), WideResNet(16, 1), ResNeXt(4, (1, 1), 2)])
def test_every_parameter_gets_a_gradient(network):
    network(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_normalize_standardizes_each_channel_and_keeps_pixels_outside():
    images = torch.rand(50, 3, 8, 8) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    normalized = Normalize(*pixel_statistics(images))(images)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        normalized.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0
    )


def test_each_image_is_standardized_by_itself():
    images = torch.rand(5, 3, 8, 8) * torch.linspace(0.4, 1, 5).view(5, 1, 1, 1)
    std, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
    standardize = build("cnn", (3, 8, 8), 4, [0.5] * 3, [1.0] * 3, per_image=True)[0]
    torch.testing.assert_close(standardize(images), (images - mean) / std)
    assert standardize(images[:0]).shape == (0, 3, 8, 8)


def test_an_image_of_one_colour_has_a_finite_gradient():
    image = torch.full((1, 3, 8, 8), 0.3, requires_grad=True)
    outputs = PerImageStandardization()(image)
    (gradient,) = torch.autograd.grad(outputs[0, 0, 0, 0], image)
    assert outputs.abs().max() < 1e-5
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 192**0.5  # 1 / the least deviation


def test_normalize_travels_with_the_network():
    network = build("cnn", (1, 8, 8), 3, [0.25], [0.5])
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(network[1:](network[:1](images)), network(images))
    assert {"0.mean", "0.std"} <= set(network.state_dict())
    assert not any(p is network[0].mean for p in network.parameters())


def test_a_constant_channel_is_not_divided_by_zero():
    assert pixel_statistics(torch.ones(2, 1, 3, 3)) == ([1.0], [1.0])


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("factories")
    module.linear = lambda shape, classes: nn.Sequential(
        nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes)
    )
    module.text = lambda shape, classes: "no module"
    module.number = 3
    monkeypatch.setitem(sys.modules, "factories", module)


@pytest.mark.usefixtures("factories")
def test_a_factory_of_the_users():
    network = build("factories:linear", (2, 5, 3), 4, [0.5] * 2, [1.0] * 2)
    assert network(torch.rand(6, 2, 5, 3)).shape == (6, 4)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "alexnet",
            ValueError,
            "build: model must be one of cnn, carlini, resnet18, wideresnet28x10, resnext34 or "
            "module:factory, got alexnet",
        ),
        (
            "nowhere_at_all:make",
            ValueError,
            "build: model nowhere_at_all:make must name an importable factory, "
            "got No module named 'nowhere_at_all'",
        ),
        (
            "factories:none",
            ValueError,
            "build: model factories:none must name an importable factory, "
            "got module 'factories' has no attribute 'none'",
        ),
        (
            ":make",
            ValueError,
            "build: model :make must name an importable factory, got Empty module name",
        ),
        ("factories:number", TypeError, "build: model factories:number must be callable, got int"),
        (
            "factories:text",
            TypeError,
            "build: model factories:text must return a torch.nn.Module, got str",
        ),
    ],
)
def test_a_bad_factory_is_named(name, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        build(name, (1, 8, 8), 10, [0.5], [1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Normalize([0.0, 0.0], [1.0]),
            "Normalize: std must hold one positive number per channel, "
            "got mean [0.0, 0.0] and std [1.0]",
        ),
        (
            lambda: Normalize([0.0], [0.0]),
            "Normalize: std must hold one positive number per channel, "
            "got mean [0.0] and std [0.0]",
        ),
        (
            lambda: carlini((3, 32, 15), 10),
            "carlini: images must be at least 16x16, got 32x15",
        ),
        (lambda: WideResNet(12, 1), "WideResNet: depth must be 6 n + 4 with n at least 1, got 12"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
