"""Distances to adversarial inputs, against those of a linear classifier."""

import math
import re

import pytest
import torch
from networks import linear, pixels

from robustkern.evaluation import (
    AdversarialDistances,
    accuracy_curve,
    adversarial_distances,
    deepfool_robustness,
    fgsm,
)

NORMAL = torch.tensor([0.6, -0.8], dtype=torch.float64)
MODEL = linear(torch.stack([NORMAL, -NORMAL]))


def data(samples=60):
    """Inputs whose way to the boundary stays in [0, 1], targets, L2 distances to it, and beyond."""
    inputs = 0.3 + 0.4 * pixels(samples, 2)
    signed = inputs @ NORMAL
    beyond = inputs - 1.001 * signed[:, None] * NORMAL
    return inputs, (signed < 0).long(), signed.abs(), beyond


@pytest.mark.parametrize(("p", "length"), [(1, 1.4), (2, 1.0), (math.inf, 0.8)])
def test_distances_of_a_linear_classifier(p, length):
    inputs, targets, distances, beyond = data()
    found = adversarial_distances(MODEL, inputs, targets, beyond, p=p, batch_size=7)
    expected = (1.001 * length * distances).sort().values
    torch.testing.assert_close(torch.tensor(found.distances, dtype=torch.float64), expected)
    assert found.median == pytest.approx(expected.quantile(0.5).item())
    assert found.mean == pytest.approx(expected.mean().item())
    assert found.misclassified == found.standing == 0


def test_distances_of_half_precision_are_not_rounded():
    inputs, _, _, beyond = data()
    inputs, beyond = inputs.bfloat16(), beyond.bfloat16()
    targets = (inputs @ NORMAL.bfloat16() < 0).long()
    expected = (beyond.double() - inputs.double()).norm(dim=1).sort().values
    model = linear(MODEL.weight.detach().bfloat16())
    found = adversarial_distances(model, inputs, targets, beyond)
    assert len(found.distances) > 30
    for distance in found.distances:
        assert (expected - distance).abs().min() < 1e-6
    rho = deepfool_robustness(model, inputs, beyond).rho
    changed = model(inputs).argmax(1) != model(beyond).argmax(1)
    ratios = (beyond.double() - inputs.double()).norm(dim=1) / inputs.double().norm(dim=1)
    assert rho == pytest.approx(ratios[changed].mean().item(), rel=1e-6)


def test_misclassified_samples_have_no_distance_and_standing_ones_an_infinite_one():
    inputs, targets, distances, beyond = data()
    targets[:10] = 1 - targets[:10]
    beyond[:5] = inputs[:5]  # as attacks do that skip what is misclassified
    beyond[10:15] = inputs[10:15]
    found = adversarial_distances(MODEL, inputs, targets, beyond)
    assert (found.misclassified, found.standing, len(found.distances)) == (10, 5, 45)
    assert found.mean == pytest.approx(1.001 * distances[15:].mean().item())
    assert found.median == pytest.approx(1.001 * distances[15:].sort().values[24:26].mean().item())


def test_median_and_mean_when_attacks_fail():
    assert AdversarialDistances((0.1,), misclassified=3, standing=2).median == math.inf
    assert AdversarialDistances((0.1, 0.2), misclassified=0, standing=2).median == math.inf
    assert AdversarialDistances((), misclassified=0, standing=2).mean is None
    assert AdversarialDistances((), misclassified=3, standing=0).median is None


def test_curve_of_distances_is_that_of_the_attack():
    inputs, targets, _, beyond = data()
    targets[0] = 1 - targets[0]
    eps = [0.0, 0.03, 0.1]

    def towards(model, batch, labels, radius):
        way = 1.001 * (batch @ NORMAL).abs()
        reached = torch.where(way <= radius, way, 0) * (1 - 2 * labels)
        return batch - reached[:, None] * NORMAL

    expected = accuracy_curve(MODEL, inputs, targets, towards, eps)
    found = adversarial_distances(MODEL, inputs, targets, beyond).curve(eps)
    assert found == expected
    assert found.right[0] == 59
    with pytest.raises(ValueError, match=r"^AdversarialDistances.curve: eps must rise strictly"):
        AdversarialDistances((0.1,), 0, 0).curve([0.2, 0.1])


def test_deepfool_robustness_of_a_linear_classifier():
    inputs, _, distances, beyond = data()
    found = deepfool_robustness(MODEL, inputs, beyond, batch_size=7)
    assert found.rho == pytest.approx(1.001 * (distances / inputs.norm(dim=1)).mean().item())
    assert (found.changed, found.unchanged) == (60, 0)


def test_deepfool_robustness_leaves_out_predictions_that_stay():
    inputs, _, distances, beyond = data()
    beyond[:50] = inputs[:50]
    found = deepfool_robustness(MODEL, inputs, beyond)
    assert found.rho == pytest.approx(1.001 * (distances / inputs.norm(dim=1))[50:].mean().item())
    assert (found.changed, found.unchanged) == (10, 50)
    assert deepfool_robustness(MODEL, inputs, inputs).rho is None


def test_distances_name_bad_input():
    inputs, targets, _, beyond = data()
    with pytest.raises(ValueError, match=r"^adversarial_distances: p must be 1, 2 or inf, got 3$"):
        adversarial_distances(MODEL, inputs, targets, beyond, p=3)
    inputs[3] = 0
    message = "deepfool_robustness: inputs must not be all zero, got 1 such samples"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        deepfool_robustness(MODEL, inputs, beyond)


def test_distances_of_a_minimal_attack_agree_with_an_attack_of_fixed_size():
    inputs, targets, distances, _ = data()
    linf = distances / NORMAL.abs().sum()
    curve = accuracy_curve(MODEL, inputs, targets, fgsm, [0.01, 0.05])
    assert curve.right == tuple(int((linf > eps).sum()) for eps in (0.01, 0.05))
