"""Each warning of the verdict shows where it must, and where it must not it does not."""

import pytest
from reports import results, share

from robustkern.evaluation.report.verdict import verdict


def judge(transfer=None, **items):
    """The verdict on a network of which these items were measured."""
    network = {name: {"value": value} for name, value in items.items()}
    [found] = verdict(
        {
            "format": 1,
            "networks": {"a": network},
            "transfer": None if transfer is None else {"value": transfer},
        }
    )
    return found


def attacks(accuracy, samples=1000, worst=0.1):
    counts = samples if isinstance(samples, dict) else dict.fromkeys(accuracy, samples)
    return {"accuracy": accuracy, "samples": counts, "worst": share(worst)}


def test_the_numbers_are_those_of_the_results():
    found = judge(
        clean=share(0.9),
        attacks=attacks({"FGSM": 0.5, "PGD-20": 0.3, "Square": 0.4}, worst=0.25),
    )
    assert (found.network, found.clean, found.worst, found.worst_samples) == ("a", 0.9, 0.25, 1000)
    assert (found.strongest, found.strongest_accuracy) == ("PGD-20", 0.3)
    assert found.worst_interval == (share(0.25)["low"], share(0.25)["high"])


def test_what_was_not_measured_is_none_and_no_check_is_claimed():
    found = judge()
    assert found.clean is found.strongest is found.worst is found.worst_interval is None
    assert found.warnings == found.checks == ()


def test_networks_that_hide_nothing_get_no_warning():
    for found in verdict(results()):
        assert found.warnings == ()
        assert len(found.checks) == 6


@pytest.mark.parametrize(
    "name", ["zero_gradients", "flat_loss", "black_box_stronger", "robust_at_large_eps"]
)
def test_a_raised_failure_indicator_warns(name):
    found = judge(failures={name: {"raised": True, "value": 0.25}})
    assert len(found.warnings) == 1
    assert "25.0%" in found.warnings[0]
    assert judge(failures={name: {"raised": False, "value": 0.25}}).warnings == ()


@pytest.mark.parametrize(
    "black", ["Square", "SPSA", "Boundary", "HopSkipJump", "PGD-20 of the twin"]
)
def test_an_attack_without_gradients_that_is_stronger_warns(black):
    [warning] = judge(attacks=attacks({"PGD-20": 0.4, "FAB": 0.3, black: 0.2})).warnings
    assert warning.startswith(black)
    assert "FAB (30.0%)" in warning
    assert judge(attacks=attacks({"PGD-20": 0.4, "FAB": 0.3, black: 0.35})).warnings == ()


def test_a_difference_within_a_point_is_put_down_to_chance():
    assert judge(attacks=attacks({"PGD-20": 0.3, "Square": 0.295})).warnings == ()


def test_on_fewer_images_the_intervals_must_differ():
    def found(spsa):
        return judge(attacks=attacks({"PGD-20": 0.3, "SPSA": spsa}, {"PGD-20": 1000, "SPSA": 100}))

    assert found(0.25).warnings == ()
    assert len(found(0.1).warnings) == 1


def test_chance_on_fewer_images_makes_no_attack_the_strongest():
    def strongest(fab):
        counts = {"PGD-20": 1000, "FAB": 100}
        return judge(attacks=attacks({"PGD-20": 0.3, "FAB": fab}, counts)).strongest

    assert strongest(0.28) == "PGD-20"
    assert strongest(0.1) == "FAB"


def test_autoattack_stands_on_neither_side():
    assert judge(attacks=attacks({"PGD-20": 0.4, "AutoAttack": 0.1})).checks == ()


def test_points_below_the_diagonal_warn():
    def found(below):
        return judge(masking={"white_box": [0.0] * 40, "black_box": [0.0] * 40, "below": below})

    [warning] = found(0.1).warnings
    assert "10.0% of 40 images" in warning
    assert found(0.05).warnings == ()


def test_a_transferred_attack_that_is_stronger_warns():
    def found(row, names=("a", "twin of a")):
        return judge(transfer={"evaluated": ["a"], "sources": list(names), "accuracy": [row]})

    [warning] = found([0.5, 0.2]).warnings
    assert "twin of a leave 20.0%" in warning
    assert "50.0%" in warning
    assert found([0.5, 0.6]).warnings == ()
    assert found([0.5], ["a"]).checks == (), "with no other network nothing is transferred"


def test_a_ladder_that_does_not_fall_warns():
    def found(*accuracy):
        rungs = dict(zip(("FGSM", "PGD-7", "PGD-20"), accuracy, strict=True))
        return judge(ladder={"accuracy": rungs, "gap": accuracy[0] - accuracy[-1]})

    [warning] = found(0.2, 0.5, 0.4).warnings
    assert "40.0%" in warning
    assert "FGSM (20.0%)" in warning
    assert found(0.5, 0.2, 0.2).warnings == ()


def test_label_leaking_warns():
    accuracy = {"clean": 0.9, "true_labels": 0.95, "predicted_labels": 0.4}
    [warning] = judge(label_leaking={**accuracy, "leaks": True}).warnings
    assert "95.0%" in warning
    assert judge(label_leaking={**accuracy, "leaks": False}).warnings == ()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([], TypeError, "verdict: results must be a mapping, got list"),
        ({"format": 2}, ValueError, "verdict: results must be of format 1, got 2"),
        ({"format": 1}, ValueError, "verdict: results must hold at least one network, got none"),
        ({"format": 1, "networks": {}}, ValueError, "at least one network, got none"),
    ],
)
def test_other_results_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        verdict(wrong)
