"""Planes through inputs: class maps, losses and boundary sections of classifiers that are known."""

import re

import pytest
import torch
from networks import linear, pixels, random_state
from torch import nn
from torch.nn import functional as F

from robustkern.analysis import normal_sections, plane_axes, plane_sections

NORMAL = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
HALF_SPACES = linear(torch.stack([NORMAL, -NORMAL]), torch.tensor([-2.0, 2.0]).double())


class Bowl(nn.Module):
    """Class 1 where x_1 > 1 + x_0^2 / 2."""

    def forward(self, inputs):
        height = inputs[:, 1] - 1 - inputs[:, 0].square() / 2
        return torch.stack([torch.zeros_like(height), height], dim=1)


def samples(count=3):
    inputs = pixels(count, 4)
    return inputs, HALF_SPACES(inputs).argmax(1)


def test_axes_are_orthonormal_and_the_random_one_is_shared():
    normals = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    r, v = plane_axes(normals)
    for axis in (r, v):
        torch.testing.assert_close(axis.flatten(1).norm(dim=1), torch.ones(5).double())
    assert (r * v).flatten(1).sum(1).abs().max() < 1e-14
    torch.testing.assert_close(r, normals / normals.flatten(1).norm(dim=1).view(5, 1, 1, 1))
    assert torch.equal(v, plane_axes(2 * normals)[1])
    assert not torch.equal(
        v,
        plane_axes(normals, generator=torch.Generator(torch.get_default_device()).manual_seed(1))[
            1
        ],
    )
    # Each v is the same direction but for its part along the sample's own normal.
    differences = (v[0] - v[1]).flatten()
    plane = torch.stack([r[0].flatten(), r[1].flatten(), v[0].flatten()])
    rest = differences - torch.linalg.lstsq(plane.T, differences).solution @ plane
    assert rest.norm() < 1e-12


def test_class_map_of_a_linear_classifier_is_a_half_plane():
    inputs, targets = samples()
    normals = -HALF_SPACES(inputs)[:, :1] * NORMAL  # to the boundary
    found = plane_sections(HALF_SPACES, inputs, targets, normals, radius=0.5, points=21)
    distances = HALF_SPACES(inputs)[:, 0].abs() / 5
    beyond = (found.offsets > distances[:, None]).unsqueeze(1).expand(3, 21, 21)
    assert torch.equal(found.classes != targets.view(3, 1, 1), beyond)
    assert beyond.any()
    assert not beyond.all()


def test_losses_are_those_at_the_points_of_the_plane():
    inputs, targets = samples()
    normals, direction = torch.randn(2, 3, 4, dtype=torch.float64)[0], NORMAL
    found = plane_sections(
        HALF_SPACES, inputs, targets, normals, radius=2.0, points=5, directions=direction,
        batch_size=7,
    )  # fmt: skip
    r, v = plane_axes(normals, direction)
    assert found.offsets.tolist() == [-2, -1, 0, 1, 2]
    at = inputs + 2.0 * r - 1.0 * v
    expected = F.cross_entropy(HALF_SPACES(at), targets, reduction="none").detach()
    torch.testing.assert_close(found.losses[:, 1, 4], expected)


def test_boundary_of_a_linear_classifier_is_level():
    inputs, _ = samples()
    normals = -HALF_SPACES(inputs)[:, :1] * NORMAL
    found = normal_sections(
        HALF_SPACES, inputs, normals, torch.ones(4).double(), radius=1.0, points=9
    )
    distances = (HALF_SPACES(inputs)[:, :1].abs() / 5).expand(3, 9)
    torch.testing.assert_close(found.heights, distances, atol=1 / 8 / 2**12, rtol=0)


def test_boundary_that_curves_is_found_where_it_is():
    inputs = torch.zeros(1, 2, dtype=torch.float64)
    up, across = torch.tensor([[0.0, 7.0]]).double(), torch.tensor([2.0, 1.0]).double()
    found = normal_sections(Bowl(), inputs, up, across, radius=1.2, points=5)
    expected = 1 + found.offsets**2 / 2
    expected[expected > 1.2] = torch.inf
    torch.testing.assert_close(found.heights[0], expected, atol=1e-4, rtol=0)
    assert found.heights.isinf().sum() == 2


def test_boundary_below_an_input_has_a_negative_height():
    """The direction leads out of the class, so the boundary comes down to the line and below it."""
    inputs = torch.tensor([[0.0, 0.75]], dtype=torch.float64)
    normals, direction = torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 0.0])
    mirrored = nn.Sequential(linear(torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double()), Bowl())
    # Class 1 is now where -x_1 > 1 + x_0^2 / 2: shift it above the input.
    mirrored[0].bias.data[1] = 2.0
    found = normal_sections(
        mirrored, inputs, normals.double(), direction.double(), radius=1.0, points=5
    )
    expected = 0.25 - found.offsets**2 / 2
    torch.testing.assert_close(found.heights[0], expected, atol=1e-4, rtol=0)
    assert (found.heights < 0).any()


def test_networks_are_left_as_they_were():
    model = nn.Sequential(HALF_SPACES, nn.Dropout()).train()
    inputs, targets = samples()
    before = random_state()
    plane_sections(model, inputs, targets, inputs + 1, radius=1.0, points=3)
    normal_sections(model, inputs, inputs + 1, NORMAL, radius=1.0, points=3)
    assert model[1].training
    assert torch.equal(random_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normals": torch.zeros(3, 4).double()}, "plane_axes: normals must not be zero, got 3"),
        ({"directions": torch.ones(3)}, "plane_axes: directions must have the shape of one sample"),
        (
            {"normals": torch.ones(3, 4).double(), "directions": torch.ones(4)},
            "plane_axes: directions must not be parallel to a normal, nor zero",
        ),
        ({"radius": 0.0}, "plane_sections: radius must be positive and finite, got 0.0"),
        ({"points": 1}, "plane_sections: points must be at least 2, got 1"),
        ({"batch_size": 0}, "plane_sections: batch_size must be at least 1, got 0"),
        ({"targets": torch.tensor([0, 1, 2])}, "plane_sections: targets must lie in [0, 2)"),
        ({"inputs": torch.full((3, 4), torch.nan)}, "plane_sections: inputs must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs, targets = samples()
    given = {"inputs": inputs, "targets": targets, "normals": inputs, "radius": 1.0} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        plane_sections(HALF_SPACES, **given)
