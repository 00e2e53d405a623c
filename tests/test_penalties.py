import copy
import re

import pytest
import torch
from networks import batch, smooth

from robustkern import (
    CURE,
    SGR,
    CovarianceFunction,
    FullCovariance,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    LocalLinearity,
    Penalty,
    Sum,
    functional,
)

G = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 1.0]]], [[[0.0, 0.0]]]])
SHIFTED = G + torch.tensor([[[[2.0, 1.0]]], [[[0.0, 0.0]]], [[[0.0, 2.0]]]])
INPUTS = torch.zeros_like(G)


def test_gradient_penalty_is_the_mean_power_of_the_norm():
    for p, power, values in [
        (2, 1, [5, 1, 0]),
        (1, 1, [7, 1, 0]),
        (torch.inf, 1, [4, 1, 0]),
        (2, 2, [25, 1, 0]),
        (1, 2, [49, 1, 0]),
    ]:
        found = GradientPenalty(0.5, p=p, power=power).value(G)
        assert found.item() == pytest.approx(0.5 * sum(values) / 3)


def test_lipschitz_penalty_is_the_largest_norm():
    assert LipschitzPenalty(2.0).value(G).item() == 10
    assert LipschitzPenalty(2.0, p=1).value(G).item() == 14


def test_cure_is_the_mean_squared_change_of_the_gradient():
    assert CURE(weight=3.0).value(G, SHIFTED).item() == pytest.approx(3 * (5 + 0 + 4) / 3)
    norm = CURE(weight=3.0, squared=False).value(G, SHIFTED).item()
    assert norm == pytest.approx(3 * (5**0.5 + 0 + 2) / 3)


def test_anchored_cure_has_cures_value_and_twice_its_gradient_at_the_shifted_point():
    held, moved = G.clone().requires_grad_(), SHIFTED.clone().requires_grad_()
    value = CURE(anchored=True).value(held, moved)
    assert torch.equal(value, CURE().value(G, SHIFTED))
    assert torch.autograd.grad(value, held, allow_unused=True, retain_graph=True) == (None,)
    (found,) = torch.autograd.grad(value, moved)
    (once,) = torch.autograd.grad(CURE().value(G, moved), moved)
    torch.testing.assert_close(found, 2 * once)


def test_cure_points_lie_at_distance_h():
    gradient = torch.randn(4, 3, 8, 8)
    inputs = torch.rand(4, 3, 8, 8)
    for direction in ("sign", "gradient", "gaussian"):
        (point,) = CURE(h=0.7, direction=direction).points(inputs, gradient)
        distance = (point - inputs).flatten(1).norm(dim=1)
        torch.testing.assert_close(distance, torch.full((4,), 0.7))
    draws = CURE(h=0.7, direction="gaussian", samples=3).points(inputs, gradient)
    assert len(draws) == 3
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(
        CURE(h=0.7).points(inputs, gradient)[0], functional.perturb(inputs, gradient, 0.7)
    )


def test_cure_averages_over_its_samples():
    penalty = CURE(direction="gaussian", samples=2)
    one, other = CURE().value(G, SHIFTED), CURE().value(G, G)
    torch.testing.assert_close(penalty.value(G, SHIFTED, G), (one + other) / 2)


def test_sgr_is_half_the_form_and_with_the_identity_gn():
    covariance = CovarianceFunction(1, 1, 2)
    covariance.values[..., 0, 1] = 1.0
    found = SGR(0.8, covariance, source=None).value(G)
    torch.testing.assert_close(found, GradientPenalty(0.4, p=2, power=2).value(G))
    covariance.values[..., 0, :] = 1.0
    form = (3.0 - 4.0) ** 2 + 1.0
    assert SGR(0.8, covariance, source=None).value(G).item() == pytest.approx(0.4 * form / 3)


def test_sgr_learns_from_its_source_in_training_mode_every_few_calls():
    calls = []

    def source(inputs, gradient):
        calls.append((inputs, gradient))
        return 3 * torch.ones_like(inputs)

    for chosen, variance in (("sign", 1.0), ("gradient", 2.0**2), (source, 9.0)):
        sgr = SGR(1.0, CovarianceFunction(1, 1, 2), source=chosen, update_every=2)
        gradient = torch.full((3, 1, 1, 2), 2.0)
        sgr.points(INPUTS, gradient)
        assert sgr.covariance.updates == 1
        assert sgr.covariance.values[0, 0, 0, 1].item() == pytest.approx(variance)
        sgr.points(INPUTS, gradient)
        assert sgr.covariance.updates == 1
        resumed = copy.deepcopy(sgr)
        resumed.load_state_dict(sgr.state_dict())
        resumed.points(INPUTS, gradient)
        assert resumed.covariance.updates == 2
        sgr.eval()
        sgr.points(INPUTS, gradient)
        assert sgr.covariance.updates == 1
    assert len(calls) == 2
    fixed = SGR(1.0, CovarianceFunction(1, 1, 2), source=None)
    fixed.points(INPUTS, G)
    assert fixed.covariance.updates == 0


def test_sgr_takes_a_full_covariance():
    full = FullCovariance(2)
    full.values.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    assert SGR(2.0, full, source=None).value(G).item() == pytest.approx((18 + 48 + 3) / 3)


def test_sum_shares_equal_points_and_adds_values():
    penalty = CURE(1.0, h=0.5) + GradientPenalty(2.0) + CURE(3.0, h=0.5, anchored=True) + CURE(h=1)
    assert len(penalty.terms) == 4
    points = penalty.points(INPUTS, G)
    assert len(points) == 2
    value = penalty.value(G, SHIFTED, G)
    expected = CURE(4.0).value(G, SHIFTED) + GradientPenalty(2.0).value(G)
    torch.testing.assert_close(value, expected)
    gaussian = CURE(direction="gaussian") + CURE(direction="gaussian")
    assert len(gaussian.points(INPUTS, G)) == 2


def test_sum_keeps_the_points_of_a_subclass_apart():
    class Far(CURE):
        def points(self, inputs, gradient):
            return [point + 1 for point in super().points(inputs, gradient)]

    assert len((CURE() + Far()).points(INPUTS, G)) == 2


def test_sum_saves_and_loads_what_its_terms_hold():
    def make():
        return Sum(SGR(1.0, CovarianceFunction(1, 1, 2)), Lazy(CURE(), every=3))

    penalty = make()
    penalty.points(INPUTS, G)
    penalty.due()
    other = make()
    other.load_state_dict(penalty.state_dict())
    assert torch.equal(other.terms[0].covariance.values, penalty.terms[0].covariance.values)
    assert other.terms[1].calls == 1


def test_options_show_in_repr():
    assert "weight=4.0, h=1.5, direction='sign'" in repr(CURE())
    assert "p=1" in repr(GradientPenalty(1.0, p=1))


BAD = [
    (lambda: CURE(weight="4"), TypeError, "CURE: weight must be a number, got str"),
    (
        lambda: CURE(weight=-1.0),
        ValueError,
        "CURE: weight must be finite and not negative, got -1.0",
    ),
    (lambda: CURE(h=torch.inf), ValueError, "CURE: h must be finite and not negative, got inf"),
    (
        lambda: CURE(direction="up"),
        ValueError,
        "CURE: direction must be one of ('sign', 'gradient', 'gaussian'), got 'up'",
    ),
    (
        lambda: CURE(samples=0, direction="gaussian"),
        ValueError,
        "CURE: samples must be at least 1, got 0",
    ),
    (lambda: CURE(samples=1.5), TypeError, "CURE: samples must be an int, got float"),
    (
        lambda: CURE(samples=2),
        ValueError,
        "CURE: samples must be 1 for direction 'sign', which is not random, got 2",
    ),
    (
        lambda: GradientPenalty(True),
        TypeError,
        "GradientPenalty: weight must be a number, got bool",
    ),
    (
        lambda: GradientPenalty(1.0, p=3),
        ValueError,
        "GradientPenalty: p must be 1, 2 or inf, got 3",
    ),
    (
        lambda: GradientPenalty(1.0, power=3),
        ValueError,
        "GradientPenalty: power must be 1 or 2, got 3",
    ),
    (
        lambda: LipschitzPenalty(torch.nan),
        ValueError,
        "LipschitzPenalty: weight must be finite and not negative, got nan",
    ),
    (
        lambda: LipschitzPenalty(1.0, p="2"),
        ValueError,
        "LipschitzPenalty: p must be 1, 2 or inf, got '2'",
    ),
    (
        lambda: LocalLinearity(1.0, 1.0, eps=-0.1),
        ValueError,
        "LocalLinearity: eps must be finite and not negative, got -0.1",
    ),
    (
        lambda: LocalLinearity(1.0, None, eps=0.1),
        TypeError,
        "LocalLinearity: mu must be a number, got NoneType",
    ),
    (
        lambda: LocalLinearity(1.0, 1.0, eps=0.1, steps=0),
        ValueError,
        "LocalLinearity: steps must be at least 1, got 0",
    ),
    (
        lambda: LocalLinearity(1.0, 1.0, eps=0.1, step_size=torch.inf),
        ValueError,
        "LocalLinearity: step_size must be finite and not negative, got inf",
    ),
    (
        lambda: SGR(1.0, torch.eye(3)),
        TypeError,
        "SGR: covariance must be a CovarianceFunction or FullCovariance, got Tensor",
    ),
    (
        lambda: SGR(1.0, FullCovariance(2), source="fgsm"),
        ValueError,
        "SGR: source must be one of ('sign', 'gradient'), a callable or None, got 'fgsm'",
    ),
    (
        lambda: SGR(1.0, FullCovariance(2), update_every=0),
        ValueError,
        "SGR: update_every must be at least 1, got 0",
    ),
    (lambda: Sum(), ValueError, "Sum: terms must be at least one, got none"),
    (lambda: Sum(CURE(), 3), TypeError, "Sum: terms must be penalties, got int"),
    (lambda: CURE() + 3, TypeError, "Sum: terms must be penalties, got int"),
    (lambda: Lazy(3, every=2), TypeError, "Lazy: penalty must be a Penalty, got int"),
    (lambda: Lazy(CURE(), every=0), ValueError, "Lazy: every must be at least 1, got 0"),
    (lambda: Lazy(CURE(), every=2.0), TypeError, "Lazy: every must be an int, got float"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_options_are_named(make, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


def test_a_penalty_must_define_value():
    with pytest.raises(TypeError, match="abstract"):
        Penalty()


def test_covariance_learns_while_training_and_not_from_a_perturbation_of_another_shape():
    model, (inputs, targets) = smooth(), batch()
    sgr = SGR(1.0, CovarianceFunction(3, 8, 8), source=lambda x, g: g[:, :, :4])
    message = (
        "CovarianceFunction.update: perturbation must be (N, C, H, W) with (C, H, W) = (3, 8, 8), "
        "got (6, 3, 4, 8)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sgr(model, inputs, targets)
    assert sgr.covariance.updates == 0
