"""Saliency maps and perturbed images."""

import re

import pytest
import torch
from networks import linear, pixels, random_state
from torch import nn

from robustkern.analysis import perturbed_images, plain, saliency

WEIGHT = pixels(3, 2 * 4 * 4) - 0.5
LINEAR = nn.Sequential(nn.Flatten(), linear(WEIGHT))


def images(samples=5):
    return pixels(samples, 2 * 4 * 4, seed=1).view(samples, 2, 4, 4), torch.arange(samples) % 3


def test_saliency_of_a_linear_model_is_its_weights():
    inputs, targets = images()
    maps = saliency(LINEAR, inputs, targets, of="logit", batch_size=2)
    torch.testing.assert_close(maps, WEIGHT.view(3, 2, 4, 4).abs().amax(1)[targets])


def test_saliency_of_the_loss_is_its_gradient():
    inputs, targets = images()
    p = LINEAR(inputs).softmax(1).detach()
    gradient = (p - nn.functional.one_hot(targets, 3)) @ WEIGHT
    expected = gradient.view(5, 2, 4, 4).abs().amax(1)
    torch.testing.assert_close(saliency(LINEAR, inputs, targets), expected)


def test_a_confident_float32_network_keeps_its_map():
    weight = torch.tensor([[20.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    x, label = torch.tensor([1.0, 0.3]).view(1, 1, 1, 2), torch.tensor([0])
    found = saliency(nn.Sequential(nn.Flatten(), linear(weight)), x, label)
    exact = nn.Sequential(nn.Flatten(), linear(weight.double()))
    expected = saliency(exact, x.double(), label)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)


def test_saliency_of_a_constant_is_zero():
    constant = nn.Sequential(nn.Flatten(), linear(torch.zeros(2, 32)))
    inputs, _ = images()
    maps = saliency(constant, inputs, torch.zeros(5, dtype=torch.int64))
    assert maps.shape == (5, 4, 4)
    assert not maps.any()


def test_networks_are_left_as_they_were():
    model = nn.Sequential(LINEAR, nn.Dropout()).train()
    inputs, targets = images()
    before = random_state()
    saliency(model, inputs, targets)
    assert model[1].training
    assert LINEAR[1].weight.grad is None
    assert not inputs.requires_grad
    assert torch.equal(random_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "margin"}, 'of must be "loss" or "logit", got \'margin\''),
        ({"inputs": torch.ones(5, 32)}, "inputs must be (N, C, H, W), got (5, 32)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must be (5,), one for each"),
        ({"targets": torch.full((5,), 3)}, "targets must lie in [0, 3), the model's classes"),
    ],
)
def test_saliency_names_bad_input(change, message):
    inputs, targets = images()
    with pytest.raises(ValueError, match=f"^{re.escape(f'saliency: {message}')}"):
        saliency(LINEAR, **{"inputs": inputs, "targets": targets, **change})


def test_perturbed_images_hold_what_each_network_says():
    inputs, _ = images()
    moved = {"one": inputs.flip(3), "other": inputs}
    found = perturbed_images({"one": LINEAR, "other": LINEAR}, inputs, moved, batch_size=2)
    torch.testing.assert_close(
        found["one"].distances, (inputs.flip(3) - inputs).flatten(1).norm(dim=1)
    )
    assert torch.equal(found["one"].predicted_adversarial, LINEAR(inputs.flip(3)).argmax(1))
    assert torch.equal(found["other"].predicted, found["other"].predicted_adversarial)
    assert not found["other"].distances.any()


def test_perturbed_images_need_the_same_names():
    inputs, _ = images()
    message = r"^perturbed_images: adversarial must have the names of models, at least one, got \["
    with pytest.raises(ValueError, match=message):
        perturbed_images({"one": LINEAR}, inputs, {"other": inputs})


def test_plain_refuses_what_is_no_result():
    with pytest.raises(
        TypeError, match=r"^plain: result must be a tensor or a dataclass, got int$"
    ):
        plain(3)
