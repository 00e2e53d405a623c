"""Accuracy against the strength of an attack."""

import re

import pytest
import torch
from networks import linear, pixels

from robustkern.evaluation import (
    AccuracyCurve,
    AttackLadder,
    accuracy_curve,
    attack_ladder,
    fgsm,
    pgd,
    wilson_interval,
)

# The boundary is at x_0 = x_1; in L-infinity a sample is |x_0 - x_1| / 2 away from it.
DIFFERENCE = linear([[1.0, -1.0], [-1.0, 1.0]])


def data(samples=200):
    inputs = pixels(samples, 2, torch.float32)
    return inputs, (inputs[:, 1] > inputs[:, 0]).long()


@pytest.mark.parametrize(
    ("right", "samples", "ends"),
    [
        (45, 50, (0.786, 0.957)),
        (0, 10, (0.0, 0.278)),
        (10, 10, (0.722, 1.0)),
        (1, 2, (0.095, 0.905)),
    ],
)
def test_wilson_interval_has_its_published_values(right, samples, ends):
    assert wilson_interval(right, samples) == pytest.approx(ends, abs=5e-4)


def test_wilson_interval_ends_where_the_share_is_just_rejected():
    for share in wilson_interval(30, 80, 0.9):
        error = (share * (1 - share) / 80) ** 0.5
        assert abs(30 / 80 - share) / error == pytest.approx(1.6448536)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 0), "right must lie in [0, samples] and samples be at least 1, got 3 and 0"),
        ((3, 2), "right must lie in [0, samples] and samples be at least 1, got 3 and 2"),
        ((1, 2, 1.0), "confidence must lie in (0, 1), got 1.0"),
    ],
)
def test_wilson_interval_names_bad_input(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'wilson_interval: {message}')}$"):
        wilson_interval(*arguments)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_curve_of_a_linear_classifier(attack):
    inputs, targets = data()
    eps = [0.0, 0.1, 0.25]
    curve = accuracy_curve(DIFFERENCE, inputs, targets, attack, eps, batch_size=64)
    distances = (inputs[:, 0] - inputs[:, 1]).abs() / 2
    assert curve.right == tuple(int((distances > each).sum()) for each in eps)
    assert curve.accuracy == tuple(right / 200 for right in curve.right)
    assert curve.intervals(0.9)[1] == wilson_interval(curve.right[1], 200, 0.9)


def test_area_is_the_mean_over_the_range_of_eps():
    assert AccuracyCurve((0.0, 0.5, 2.0), (8, 4, 0), 8).area == pytest.approx(
        (0.5 * 0.75 + 1.5 * 0.25) / 2
    )
    assert AccuracyCurve((1.0, 3.0), (6, 6), 8).area == 0.75
    assert AccuracyCurve((0.1,), (6,), 8).area == 0.75


@pytest.mark.parametrize("eps", [[], [0.1, 0.1], [0.2, 0.1], [-0.1, 0.1], [0.1, torch.inf]])
def test_curve_names_a_bad_range(eps):
    message = f"eps must rise strictly from 0 or above and be finite, got {eps}"
    with pytest.raises(ValueError, match=f"^{re.escape(f'accuracy_curve: {message}')}$"):
        accuracy_curve(DIFFERENCE, *data(), fgsm, eps)


def test_ladder_keeps_the_order_of_the_attacks():
    inputs, targets = data()
    moved = {str(eps): fgsm(DIFFERENCE, inputs, targets, eps) for eps in (0.3, 0.05)}
    ladder = attack_ladder(DIFFERENCE, inputs, targets, moved, batch_size=64)
    assert list(ladder.accuracy) == ["0.3", "0.05"]
    distances = (inputs[:, 0] - inputs[:, 1]).abs() / 2
    assert ladder.accuracy["0.05"] == pytest.approx((distances > 0.05).double().mean().item())
    assert ladder.gap < 0


def test_gap_is_that_of_table_1():
    names = ("FGSM", "DeepFool", "PGD(7)", "PGD(20)")
    for accuracies, gap in (((38.0, 11.0, 0.5, 0.2), 37.8), ((61.0, 57.5, 57.2, 56.9), 4.1)):
        assert AttackLadder(dict(zip(names, accuracies, strict=True))).gap == pytest.approx(gap)


def test_ladder_needs_an_attack():
    message = "attack_ladder: adversarial must hold at least one attack, got none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        attack_ladder(DIFFERENCE, *data(), {})
