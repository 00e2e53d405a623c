"""Models of universal perturbations: normals that agree, and directions that curve alike."""

import math
import re

import pytest
import torch

from robustkern.analysis import normal_spectrum, shared_curvature, subspace_law


def test_equal_normals_have_rank_one():
    lengths = torch.rand(9, 1, 1, 1, dtype=torch.float64) + 0.1
    spectrum = normal_spectrum(lengths * torch.randn(1, 3, 2, 2, dtype=torch.float64))
    expected = torch.zeros(9).double()
    expected[0] = 3.0
    torch.testing.assert_close(spectrum.normals, expected, atol=1e-7, rtol=0)
    assert spectrum.random.square().sum().item() == pytest.approx(9)
    assert spectrum.random[0] < 2


def test_random_normals_have_the_spectrum_of_random_vectors():
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    spectrum = normal_spectrum(torch.randn(200, 20, generator=generator))
    assert spectrum.samples == 200
    assert ((spectrum.normals / spectrum.random).log().abs() < 0.1).all()
    # Marchenko and Pastur's edges
    edges = [math.sqrt(200 / 20) + sign for sign in (1, -1)]
    assert [spectrum.random[0].item(), spectrum.random[-1].item()] == pytest.approx(edges, rel=0.1)


def test_normals_that_were_not_found_are_left_out_and_counted():
    normals = torch.eye(4)
    normals[1] = 0
    spectrum = normal_spectrum(normals)
    assert spectrum.samples == 3
    assert spectrum.excluded == 1
    assert spectrum.normals.tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match=r"must hold at least one that is not zero, got none$"):
        normal_spectrum(torch.zeros(2, 3))


def test_curvature_along_directions_is_the_rayleigh_quotient():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    h = torch.randn(6, 5, 5, generator=generator, dtype=torch.float64)
    h = h + h.mT
    directions = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    found = shared_curvature(lambda v: torch.einsum("nij,nj->ni", h, v), directions, 6)
    unit = directions / directions.norm(dim=1, keepdim=True)
    curvatures = torch.einsum("mi,nij,mj->mn", unit, h, unit)
    torch.testing.assert_close(found.mean, curvatures.mean(1))
    torch.testing.assert_close(found.error, curvatures.std(1) / 6**0.5)
    torch.testing.assert_close(found.upward, (curvatures > 0).double().mean(1))


def test_one_sample_has_no_error():
    found = shared_curvature(lambda v: 2 * v, torch.randn(2, 3, 4, 4), 1)
    torch.testing.assert_close(found.mean, torch.full((2,), 2.0))
    assert found.error.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("product", "directions", "message"),
    [
        (lambda v: v, torch.zeros(1, 3), "directions must not be zero, got one that is"),
        (lambda v: v / 0, torch.ones(1, 3), "product must return finite products"),
        (lambda v: v[:1], torch.ones(1, 3), "product must return the shape it is given, (4, 3)"),
    ],
)
def test_curvature_names_bad_input(product, directions, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'shared_curvature: {message}')}"):
        shared_curvature(product, directions, 4)


def test_law_of_a_hyperplane():
    """Within S it is as far as in the whole space, over the length of the normal's part in S."""
    size, dims = 400, [4, 25, 100]
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    distances = torch.rand(50, generator=generator, dtype=torch.float64) + 1
    measured = []
    for m in dims:
        spans = torch.randn(50, size, m, generator=generator, dtype=torch.float64)
        parts = torch.linalg.qr(spans).Q[:, 0].norm(dim=1)  # the normal is the first axis
        measured.append(distances / parts)
    law = subspace_law(size, dims, distances, torch.stack(measured))
    factors = torch.tensor([10.0, 4.0, 2.0]).double()
    torch.testing.assert_close(law.expected, factors * distances.sort().values[24:26].mean())
    assert ((law.measured / law.expected - 1).abs() < 0.2).all()
    assert (law.ratios[:, 0] < law.ratios[:, 1]).all()
    assert (law.ratios[1:, 1] - 1).abs().max() < 0.1


def test_what_was_not_found_is_at_infinity():
    distances = torch.tensor([1.0, 1.0, 1.0, 0.0, math.inf])
    measured = torch.tensor([[2.0, 3.0, math.inf, 0.0, 1.0], [2.0, math.inf, math.inf, 0.0, 1.0]])
    law = subspace_law(4, [1, 2], distances, measured)
    assert law.measured.tolist() == [3.0, math.inf]
    assert law.ratios[0].tolist() == [1.25, 1.5, math.inf]
    assert law.excluded == 2
    assert not law.ratios.isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": [0]}, "dims must lie from 1 to 9, got [0]"),
        ({"measured": torch.ones(1, 2)}, "distances must be (N,) and measured (2, N)"),
        ({"distances": -torch.ones(2)}, "distances must not be negative or NaN"),
        ({"distances": torch.zeros(2)}, "distances must hold one that is neither 0 nor infinite"),
    ],
)
def test_law_names_bad_input(change, message):
    given = {"size": 9, "dims": [1, 3], "distances": torch.ones(2), "measured": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=f"^{re.escape(f'subspace_law: {message}')}"):
        subspace_law(**{**given, **change})
