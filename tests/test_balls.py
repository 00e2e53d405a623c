"""Steps, projections and draws of the norms' balls."""

import math

import pytest
import torch

from robustkern.evaluation.balls import distances, draw, project, rounded, steepest

NORMS = [1, 2, math.inf]


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def length(x, p):
    return torch.linalg.vector_norm(x.flatten(1), p, dim=1)


@pytest.mark.parametrize("p", NORMS)
def test_a_step_has_length_one_and_rises_as_much_as_any(p):
    gradient = noise(5, 2, 3)
    gradient[2] = 0
    step = steepest(gradient, p)
    expected = torch.ones(5, dtype=torch.float64)
    expected[2] = 0
    torch.testing.assert_close(length(step, p), expected)
    dual = {1: math.inf, 2: 2, math.inf: 1}[p]
    rise = (step * gradient).flatten(1).sum(1)
    torch.testing.assert_close(rise, length(gradient, dual))


def test_an_l1_step_moves_the_largest_percent():
    step = steepest(noise(4, 10, 20), 1).flatten(1)
    assert ((step != 0).sum(1) == 2).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.3, 2.0, 100.0])
def test_a_projection_is_the_nearest_point_of_the_ball(p, eps):
    centers, points = noise(6, 2, 5), noise(6, 2, 5, seed=1)
    points[0] = centers[0]
    found = project(points, centers, eps, p)
    assert (length(found - centers, p) <= eps + 1e-12).all()
    inside = length(points - centers, p) <= eps
    torch.testing.assert_close(found[inside], points[inside])
    # Of a convex set: no point of it lies further along the way out.
    out = (points - found).flatten(1)
    for seed in range(20):
        other = project(noise(6, 2, 5, seed=seed + 2), centers, eps, p)
        assert ((other - found).flatten(1) * out).sum(1).max() <= 1e-9


@pytest.mark.parametrize("p", NORMS)
def test_draws_fill_the_ball_evenly(p):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    like = torch.zeros(20000, 1, 3)
    found = draw(like, 2.0, p, generator)
    assert found.shape == like.shape
    assert found.dtype == like.dtype
    radius = length(found, p)
    assert radius.max() <= 2 + 1e-6
    # A uniform point's radius is below r with probability (r / 2)^3.
    share = (radius <= 1.0).float().mean().item()
    assert share == pytest.approx(1 / 8, abs=0.01)
    assert found.mean(0).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", NORMS)
def test_low_precision_is_summed_in_float32(p, dtype):
    gradient = torch.full((1, 4096), 100.0, dtype=dtype)
    assert steepest(gradient, p).isfinite().all()
    found = rounded(project(gradient, gradient * 0, 1.0, p), gradient * 0, 1.0, p)
    assert found.dtype == dtype
    assert length(found.double(), p).item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", NORMS)
def test_rounding_does_not_leave_the_ball(p, dtype):
    centers = noise(8, 300).sigmoid().to(dtype)
    for eps in (0.3, 1.0):
        points = project(centers + noise(8, 300, seed=1).float(), centers, eps, p)
        assert distances(points.to(dtype), centers, p).max() > eps
        found = rounded(points, centers, eps, p)
        assert distances(found, centers, p).max() <= eps
        assert ((found - points).abs() <= 2 * torch.finfo(dtype).eps * points.abs()).all()
    near = centers + 0.001 * noise(8, 300, seed=1).float()
    assert torch.equal(rounded(near, centers, 1e3, p), near.to(dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("p", NORMS)
def test_a_step_has_length_one_whatever_the_gradient_s(p, scale):
    step = steepest(scale * noise(3, 8, dtype=torch.float32), p)
    torch.testing.assert_close(length(step, p), torch.ones(3))


@pytest.mark.parametrize("p", NORMS)
def test_a_gradient_that_is_not_finite_moves_no_sample_out_of_the_ball(p):
    gradient = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [torch.nan, torch.nan]])
    assert (length(steepest(gradient, p), p) <= 1).all()
