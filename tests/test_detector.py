"""Detection of adversarial inputs by the norm of their input gradient."""

import re

import pytest
import torch
from networks import linear, pixels

from robustkern.evaluation import Detector, detection_table, gradient_norms, pgd, roc_curve

# Two classes with the boundary at x_0 = 1/2, the steeper the nearer.
WEIGHT, BIAS = [[-6.0, 0.0], [6.0, 0.0]], [6.0, 0.0]


def model():
    return linear(WEIGHT, BIAS)


def clean(samples, seed=0):
    """Inputs at some distance from the boundary, and their classes."""
    inputs = pixels(samples, 2, torch.float32, seed)
    targets = (inputs[:, 0] > 0.5).long()
    inputs[:, 0] = torch.where(targets == 1, 0.8, 0.0) + 0.4 * (inputs[:, 0] % 0.5)
    return inputs, targets


@pytest.mark.parametrize("p", [1, 2, torch.inf])
@pytest.mark.parametrize(("rate", "above"), [(0.05, 1), (0.1, 3), (0.5, 19)])
def test_fit_leaves_the_rate_for_one_more_sample(p, rate, above):
    inputs, _ = clean(39)
    detector = Detector.fit(model(), inputs, rate, p=p)
    # Of 40 samples, the new one among them, `above` + 1 may be the largest.
    assert detector.flag(model(), inputs).sum() == above
    assert detector.threshold in gradient_norms(model(), inputs, p=p)


def test_the_false_positive_rate_holds_on_held_out_samples():
    inputs, _ = clean(20000)
    scores = gradient_norms(model(), inputs)
    thresholds = [Detector.fit(model(), each, 0.1).threshold for each in inputs[:5700].split(19)]
    rates = [(scores[5700:] > threshold).double().mean() for threshold in thresholds]
    assert sum(rates) / len(rates) == pytest.approx(0.1, abs=0.012)  # three standard errors


def test_scores_and_flags_agree():
    inputs, _ = clean(50)
    slanted = linear([[-6.0, 1.0], [6.0, -4.0]], BIAS)
    detector = Detector.fit(slanted, inputs, p=1)
    scores = detector.score(slanted, inputs, batch_size=7)
    torch.testing.assert_close(scores, gradient_norms(slanted, inputs, p=1))
    assert torch.equal(detector.flag(slanted, inputs), scores > detector.threshold)
    assert 0 < detector.flag(slanted, inputs).sum() < 50


@pytest.mark.parametrize(
    ("rate", "samples", "message"),
    [
        (
            0.05,
            18,
            "inputs must hold at least 19 samples for a false_positive_rate of 0.05, got 18",
        ),
        (0.0, 18, "false_positive_rate must lie in (0, 1), got 0.0"),
        (1.0, 18, "false_positive_rate must lie in (0, 1), got 1.0"),
    ],
)
def test_fit_names_bad_input(rate, samples, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'Detector.fit: {message}')}$"):
        Detector.fit(model(), clean(samples)[0], rate)


def test_roc_is_the_share_above_each_threshold_and_its_area_compares_pairs():
    scores = (8 * pixels(40, 2, seed=3)).round() / 8  # ties
    ordinary, attacked = scores[:25, 0], scores[:, 1] + 0.25
    curve = roc_curve(ordinary, attacked)
    for threshold, false, true in zip(
        curve.thresholds, curve.false_positive_rate, curve.true_positive_rate, strict=True
    ):
        assert false == (ordinary > threshold).double().mean()
        assert true == (attacked > threshold).double().mean()
    assert curve.false_positive_rate[0] == curve.true_positive_rate[0] == 0
    assert curve.false_positive_rate[-1] == curve.true_positive_rate[-1] == 1
    pairs = attacked[:, None] - ordinary
    assert curve.auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean().item())


@pytest.mark.parametrize(
    ("scores", "kind", "message"),
    [
        (torch.tensor([1]), TypeError, "must be a floating-point tensor, got torch.int64"),
        ([0.5], TypeError, "must be a floating-point tensor, got list"),
        (
            torch.tensor([1.0, torch.nan]),
            ValueError,
            "must be (N,) finite scores, at least one, got (2,), 1 of them finite",
        ),
        (
            torch.zeros(0),
            ValueError,
            "must be (N,) finite scores, at least one, got (0,), 0 of them finite",
        ),
    ],
)
def test_roc_names_bad_scores(scores, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(f'roc_curve: clean {message}')}$"):
        roc_curve(scores, torch.ones(1))
    with pytest.raises(kind, match=f"^{re.escape(f'roc_curve: adversarial {message}')}$"):
        roc_curve(torch.ones(1), scores)


def test_table_counts_those_that_fool():
    inputs, targets = clean(100)
    detector = Detector.fit(model(), clean(199, seed=5)[0])
    targets[0] = 1 - targets[0]  # misclassified from the start
    boundary = inputs.clone()
    boundary[:, 0] = 1 - targets.float() * 0.02 - 0.49  # just beyond: 0.49 for 1, 0.51 for 0
    boundary[1:11] = inputs[1:11]  # ten fail
    found = detection_table(
        detector, model(), inputs, targets, {"boundary": boundary, "nothing": inputs}
    )
    assert found.samples == 100
    flagged = detector.flag(model(), inputs).double().mean().item()
    assert found.false_positive_rate == flagged
    row = found.attacks["boundary"]
    assert row.fooled == 89
    assert row.flagged == row.auc == 1
    distances = (boundary - inputs)[11:].norm(dim=1).sort().values
    assert row.median_distance == pytest.approx(distances[44].item())
    nothing = found.attacks["nothing"]
    assert (nothing.fooled, nothing.flagged, nothing.auc, nothing.median_distance) == (
        0,
        *[None] * 3,
    )


def test_attacks_that_go_far_beyond_the_boundary_are_not_flagged():
    inputs, targets = clean(100)
    detector = Detector.fit(model(), inputs)
    far = pgd(model(), inputs, targets, eps=1.0)
    found = detection_table(detector, model(), inputs, targets, {"far": far})
    assert found.attacks["far"].fooled == 100
    assert found.attacks["far"].flagged == 0
    assert found.attacks["far"].auc < 0.1
