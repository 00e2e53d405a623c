"""Theorem 1 of CURE: bounds of the distance at which a quadratic passes a threshold."""

import math
import re

import pytest
import torch
from networks import linear, pixels, random_state
from torch import nn
from torch.nn import functional as F

from robustkern.analysis import (
    bounds_against_curvature,
    loss_gap,
    losses_along_line,
    margin_loss,
    robustness_bounds,
)


def quadratics(samples=40, shift=0.0):
    """Random g and H in the plane, and c."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    g = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    h = torch.randn(samples, 2, 2, generator=generator, dtype=torch.float64)
    h = h + h.mT - shift * torch.eye(2, dtype=torch.float64)
    c = torch.rand(samples, generator=generator, dtype=torch.float64)
    return c, g, h


def shortest(c, g, h):
    """The length of r* by trying directions: on each the first root of the parabola."""
    angle = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    d = torch.stack([angle.cos(), angle.sin()], dim=1)
    a, nu = g @ d.T, torch.einsum("di,nij,dj->nd", d, h, d)
    under = a**2 + 2 * nu * c[:, None]
    root = 2 * c[:, None] / (a + under.clamp(min=0).sqrt())
    return torch.where((under >= 0) & (root >= 0), root, math.inf).amin(1)


def of_quadratics(c, g, h):
    eigenvalues, vectors = torch.linalg.eigh(h)
    along = (g * vectors[:, :, -1]).sum(1).abs()
    return robustness_bounds(c, g.norm(dim=1), eigenvalues[:, -1], along)


@pytest.mark.parametrize("shift", [0.0, 3.0])  # the latter makes most quadratics concave
def test_the_shortest_step_over_a_quadratic_lies_between_the_bounds(shift):
    c, g, h = quadratics(shift=shift)
    true, bounds = shortest(c, g, h), of_quadratics(c, g, h)
    assert bounds.included.all()
    assert (bounds.lower <= true * (1 + 1e-9)).all()
    assert (true <= bounds.upper * (1 + 1e-6)).all()  # the directions tried are finitely many
    if shift:
        assert bounds.lower.isinf().any()
    else:
        assert ((bounds.upper / bounds.lower)[true.isfinite()] < 1.01).any()


def test_simplified_bounds_are_ordered_as_theory_says():
    bounds = of_quadratics(*quadratics())
    assert (bounds.simple_lower <= bounds.tighter_lower).all()
    assert (bounds.tighter_lower <= bounds.lower).all()
    convex = torch.linalg.eigvalsh(quadratics()[2])[:, -1] > 0
    assert (bounds.upper <= bounds.simple_upper)[convex].all()
    c, a, nu = torch.tensor([[0.1], [1.0], [0.5]], dtype=torch.float64)
    bounds = robustness_bounds(c, a, nu, a / 2)
    assert bounds.simple_lower.item() == pytest.approx(0.1 - 2 * 0.5 * 0.01)
    assert bounds.tighter_lower.item() == pytest.approx(0.1 - 0.5 * 0.01 / 2)
    assert bounds.simple_upper.item() == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_curvature_does_not_cancel(dtype):
    c, a, nu = torch.tensor([[0.5], [1.0], [1e-9]], dtype=dtype)
    bounds = robustness_bounds(c, a, nu, a)
    assert bounds.lower.item() == bounds.upper.item() == pytest.approx(0.5)
    assert bounds.lower.dtype == dtype


def test_zeros_have_limits_in_place_of_nan():
    inf = math.inf
    rows = [  # c, norm, nu, projection: lower, upper, simple_lower, tighter_lower, simple_upper
        ((0.5, 1.0, 4.0, 0.0), (1 / (1 + 5**0.5), 0.5, 0.0, 0.0, inf)),
        ((0.5, 1.0, 0.0, 0.0), (0.5, inf, 0.5, 0.5, inf)),
        ((0.5, 0.0, 4.0, 0.0), (0.5, 0.5, 0.0, 0.0, inf)),
        ((0.5, 0.0, 0.0, 0.0), (inf, inf, 0.0, 0.0, inf)),
        ((0.5, 0.0, -1.0, 0.0), (inf, inf, 0.0, 0.0, inf)),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0)),
        ((0.0, 1.0, -1.0, 1.0), (0.0, 0.0, 0.0, 0.0, 0.0)),
        ((1e-30, 1e-30, 1e-30, 0.0), (3**0.5 - 1, 2**0.5, 0.0, 0.5, inf)),
        ((1e30, 1e30, 1e30, 1e30), (3**0.5 - 1, 3**0.5 - 1, 0.0, 0.5, 1.0)),
    ]
    bounds = robustness_bounds(*torch.tensor([given for given, _ in rows]).T)
    found = torch.stack(
        [
            bounds.lower, bounds.upper, bounds.simple_lower, bounds.tighter_lower,
            bounds.simple_upper,
        ], dim=1,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([expected for _, expected in rows]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_whole_range_of_a_type_gives_what_float64_does(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([0, 2 * limits.eps, 1, limits.max], dtype=dtype)
    given = torch.cartesian_prod(values, values, torch.cat([values, -values]), values)
    found, exact = (vars(robustness_bounds(*g.T)) for g in (given, given.double()))
    for name in found:
        torch.testing.assert_close(found[name], exact[name].to(found[name].dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extremes_give_neither_nan_nor_negative_lengths(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([0, limits.tiny, limits.eps, 1, limits.max], dtype=dtype)
    given = torch.cartesian_prod(values, values, torch.cat([values, -values]), values)
    found = vars(robustness_bounds(*given.T))
    assert all((found[name] >= 0).all() for name in found if name != "included")


def test_samples_beyond_the_threshold_are_left_out_and_counted():
    c = torch.tensor([0.5, -0.1, 1.0])
    bounds = robustness_bounds(c, torch.ones(3), torch.zeros(3), torch.ones(3))
    assert bounds.included.tolist() == [True, False, True]
    assert bounds.excluded == 1
    assert bounds.lower.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": -torch.ones(2)}, "projection must not be negative, got -1"),
        ({"gradient_norm": torch.ones(3)}, "gradient_norm must be (N,) of gap's length and dtype"),
        ({"curvature": torch.tensor([math.nan, 1])}, "curvature must be finite"),
    ],
)
def test_bounds_name_bad_input(change, message):
    given = dict.fromkeys(("gap", "gradient_norm", "curvature", "projection"), torch.ones(2))
    with pytest.raises(ValueError, match=f"^{re.escape(f'robustness_bounds: {message}')}"):
        robustness_bounds(**{**given, **change})


def test_margin_loss_is_zero_on_the_boundary_and_negative_inside():
    outputs = torch.tensor([[2.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    losses = margin_loss(outputs, torch.tensor([0, 0, 0]), reduction="none")
    assert losses[0] == 0
    assert losses[1] < 0 < losses[2]
    assert margin_loss(outputs, torch.tensor([0, 0, 0])) == losses.mean()


def test_of_two_others_alike_margin_loss_has_the_gradient_of_one():
    """Else c / ||g|| were more than the distance to the boundary of either."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    x = torch.tensor([[0.01, 0.0]], dtype=torch.float64)
    c, g = loss_gap(linear(weight), x, torch.tensor([0]), loss="margin")
    distance = 0.01 / 2**0.5
    torch.testing.assert_close(
        c / g.norm(dim=1), torch.tensor([distance]).double(), rtol=0.01, atol=0
    )


@pytest.mark.parametrize(
    ("outputs", "targets", "error", "message"),
    [
        ([[0.0, 1.0]], torch.tensor([0]), TypeError, "outputs must be a tensor, got list"),
        (torch.eye(2), torch.zeros(2), TypeError, "targets must be an int64 tensor"),
        (torch.eye(2), torch.tensor([0]), ValueError, r"targets must be \(2,\)"),
        (torch.eye(2), torch.tensor([0, 2]), ValueError, r"targets must lie in \[0, 2\)"),
        (torch.ones(0, 2), torch.tensor([]).long(), ValueError, ".*at least one sample"),
    ],
)
def test_margin_loss_names_bad_input(outputs, targets, error, message):
    with pytest.raises(error, match=f"^margin_loss: {message}"):
        margin_loss(outputs, targets)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_gap_and_gradient_are_the_losses(loss):
    model = nn.Sequential(linear(torch.randn(3, 4, dtype=torch.float64)), nn.Dropout()).train()
    inputs, targets = pixels(7, 4), torch.arange(7) % 3
    before = random_state()
    c, g = loss_gap(model, inputs, targets, loss=loss, batch_size=3)
    assert model[1].training
    assert torch.equal(random_state(), before)
    assert model[0].weight.grad is None
    leaf = inputs.clone().requires_grad_()
    logits = model[0](leaf)
    if loss == "margin":
        losses, t = margin_loss(logits, targets, reduction="none"), 0.0
    else:
        losses, t = F.cross_entropy(logits, targets, reduction="none"), math.log(2)
    torch.testing.assert_close(c, (t - losses).detach())
    torch.testing.assert_close(g, torch.autograd.grad(losses.sum(), leaf)[0])


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_a_confident_float32_network_keeps_its_gradient(loss):
    weight, x = torch.tensor([[20.0, 1.0], [0.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.3]])
    label = torch.tensor([0])
    c, g = loss_gap(linear(weight), x, label, loss=loss)
    _, expected = loss_gap(linear(weight.double()), x.double(), label, loss=loss)
    assert c.dtype == g.dtype == torch.float32
    torch.testing.assert_close(g, expected.float(), rtol=1e-4, atol=0)


def test_another_loss_is_refused():
    message = 'loss_gap: loss must be "cross_entropy" or "margin", got \'hinge\''
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss_gap(linear(torch.eye(2)), torch.eye(2), torch.arange(2), loss="hinge")
    message = 'margin_loss: reduction must be "mean" or "none", got \'sum\''
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        margin_loss(torch.eye(2), torch.arange(2), reduction="sum")


def test_lower_bound_of_a_linear_network_is_below_the_true_distance():
    """Two classes, where cross-entropy's threshold is the boundary."""
    w = torch.tensor([3.0, -4.0], dtype=torch.float64)
    model = linear(torch.stack([w, -w]))
    inputs = pixels(50, 2)
    targets = (inputs @ w < 0).long()
    c, g = loss_gap(model, inputs, targets)
    # Along g the loss is log(1 + exp(-z)); its curvature at most 1/4 of the logit gap's slope^2.
    nu = torch.full_like(c, 100 / 4)
    bounds = robustness_bounds(c, g.norm(dim=1), nu, torch.zeros_like(c))
    assert (bounds.lower <= (inputs @ w).abs() / 5).all()


def test_curves_of_the_papers_illustrations():
    bounds = bounds_against_curvature([0.0, 1.0, 4.0])
    assert bounds.lower.tolist() == pytest.approx([1, 3**0.5 - 1, 0.5])
    assert bounds.upper.tolist() == pytest.approx([2, 1.0, (8.25**0.5 - 0.5) / 4])
    lines = losses_along_line([0.0, 1.0, -1.0], points=4, radius=3.0)
    assert lines["losses"][1] == [0, 1.5, 4, 7.5]
    assert lines["crossings"] == [1.0, pytest.approx(3**0.5 - 1), math.inf]


def test_illustrations_name_bad_input():
    with pytest.raises(ValueError, match=r"^losses_along_line: threshold must be at least loss"):
        losses_along_line([1.0], loss=2.0)
    with pytest.raises(ValueError, match=r"slope and radius positive and finite, got .* and inf"):
        losses_along_line([1.0], radius=math.inf)
    with pytest.raises(ValueError, match="gap must not be negative, got -1"):
        bounds_against_curvature([1.0], gap=-1)
