"""Evaluation suites: every measure in one run, which can be interrupted."""

import copy
import json
import re
import sys

import pytest
import torch
from torch import nn

from robustkern.evaluation.report.verdict import strongest_attack
from robustkern.evaluation.suites.items import ITEMS
from robustkern.evaluation.suites.runner import SUITES, evaluate_networks
from robustkern.evaluation.suites.subject import Suite
from robustkern.training.data import load

STEPS = {"steps": 3}
SMALL = Suite(
    "small",
    tuple(ITEMS),
    attacks=("FGSM", "PGD-20", "APGD", "FAB", "Square", "SPSA"),
    distances=("DeepFool L2", "DeepFool Linf", "CW L2", "Boundary", "HopSkipJump"),
    samples={"SPSA": 16, "Boundary": 12, "HopSkipJump": 8},
    curve_samples=20,
    options={
        "APGD": STEPS,
        "FAB": STEPS,
        "Square": {"queries": 5},
        "SPSA": {"steps": 2, "directions": 4},
        "LRC": {"draws": 2},
        "CW L2": {"steps": 20, "searches": 2, "initial_const": 1.0},
        "Evasive CW": {"steps": 5, "searches": 1},
        "Boundary": STEPS,
        "HopSkipJump": {"steps": 1, "evaluations": 4},
    },
    libraries=("foolbox", "pyautoattack"),
    transfer=True,
)
SHORT = Suite("short", ("clean", "fgsm_curve", "attacks", "gradients"), attacks=("FGSM", "PGD-7"))


def network(seed=0, noise=0.5):
    """The nearest class mean of the digits, somewhat off."""
    data = load("digits")
    means = torch.stack([data.x_train[data.y_train == label].mean(0) for label in range(10)])
    means = means.flatten(1)
    means = means + noise * 0.1 * torch.randn(
        means.shape, generator=torch.Generator().manual_seed(seed)
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data.copy_(means)
    model[1].bias.data.copy_(-means.square().sum(1) / 2)
    return model


def samples(count=24, start=0):
    data = load("digits")
    chosen = slice(start, start + count)
    return data.x_test[chosen], data.y_test[chosen]


def run(models=None, suite=SHORT, **options):
    models = {"a": network(), "b": network(1)} if models is None else models
    options = {"eps": [0.05, 0.2], "radius": 0.1, "calibration": samples(40, 100), **options}
    return evaluate_networks(models, *samples(), suite=suite, **options)


def without_time(results):
    if isinstance(results, dict):
        return {key: without_time(value) for key, value in results.items() if key != "seconds"}
    return results


@pytest.fixture(scope="module")
def found():
    return run({"a": network()}, SMALL, twins={"a": network(1)})


def test_every_measure_is_taken_and_plain(found):
    assert set(found["networks"]["a"]) == set(ITEMS) == set(SUITES["standard"].items)
    assert set(SUITES["quick"].items) <= set(ITEMS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for item, entry in found["networks"]["a"].items():
        assert entry["forward"] > 0, item
        assert entry["seconds"] > 0, item
    assert found["transfer"]["value"]["sources"] == ["a", "twin of a"]
    assert found["data"] == {"images": 24, "shape": [1, 8, 8], "classes": 10}


def test_the_worst_case_is_below_every_attack_on_all_samples(found):
    attacks = found["networks"]["a"]["attacks"]["value"]
    assert list(attacks["accuracy"]) == [*SMALL.attacks, "PGD-20 of the twin"]
    assert attacks["samples"]["SPSA"] == 16
    on_all = [a for name, a in attacks["accuracy"].items() if attacks["samples"][name] == 24]
    assert attacks["worst"]["accuracy"] <= min(on_all)
    assert found["networks"]["a"]["clean"]["value"]["accuracy"] > min(on_all)


def test_the_worst_case_is_not_better_than_the_strongest_attack():
    """Here the strongest is on few samples, but not beyond chance of the worst of all."""
    suite = Suite("few", ("attacks",), attacks=("FGSM", "PGD-100"), samples={"PGD-100": 40})
    found = evaluate_networks({"a": network()}, *samples(300), eps=[0.1], radius=0.1, suite=suite)
    attacks = found["networks"]["a"]["attacks"]["value"]
    strongest = strongest_attack(attacks)
    assert attacks["worst"]["accuracy"] <= attacks["accuracy"][strongest]
    assert attacks["worst"]["samples"] == attacks["samples"][strongest]


def test_an_attack_on_few_samples_that_breaks_them_is_not_hidden_among_the_others():
    class Stairs(nn.Module):  # whose gradients are zero
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, inputs):
            return self.network(inputs.detach().mul(4).round() / 4 + 0 * inputs)

    suite = Suite(
        "masked",
        ("attacks",),
        attacks=("PGD-20", "Square"),
        samples={"Square": 40},
        options={"Square": {"queries": 100}},
    )
    found = evaluate_networks(
        {"a": Stairs()}, *samples(300), eps=[0.1], radius=0.2, suite=suite, batch_size=512
    )
    attacks = found["networks"]["a"]["attacks"]["value"]
    assert attacks["accuracy"]["Square"] < 0.6 < 0.8 < attacks["accuracy"]["PGD-20"]
    assert attacks["worst"]["samples"] == attacks["samples"]["Square"] == 40
    assert attacks["worst"]["accuracy"] <= attacks["accuracy"]["Square"]


def test_curves_begin_clean_and_are_of_one_set_of_samples(found):
    for item in ("fgsm_curve", "pgd_curve", "lrc_curve", "pgd_l2_curve"):
        curve = found["networks"]["a"][item]["value"]
        assert curve["eps"][0] == 0
        assert curve["samples"] == 20
        assert curve["right"] == sorted(curve["right"], reverse=True)
    assert found["networks"]["a"]["pgd_l2_curve"]["value"]["eps"] == [0, 0.1, 0.4]


def test_images_and_segments_are_shown(found):
    images = found["networks"]["a"]["images"]["value"]
    assert set(images["adversarial"]) == {*SMALL.attacks, *SMALL.distances, "LRC"}
    assert len(images["clean"]) == len(images["predictions"]["FGSM"]) == 5
    change = torch.tensor(images["clean"]) - torch.tensor(images["adversarial"]["PGD-20"])
    assert 0 < change.abs().max() <= 26  # a tenth of 255
    segments = found["networks"]["a"]["segments"]["value"]["probabilities"]
    assert torch.tensor(segments).shape == (3, 21, 10)


def test_passes_are_those_of_the_attacks_used_and_the_measures_own():
    found = run({"a": network()})["networks"]["a"]
    cost = {item: (entry["forward"], entry["backward"]) for item, entry in found.items()}
    assert cost["clean"] == (1, 0)
    assert cost["fgsm_curve"] == (2 + 3, 2)  # two radii; three times classified
    assert cost["attacks"] == (1 + 7 + 3, 1 + 7)


def test_a_network_that_is_its_own_twin_is_counted_once():
    model, suite = network(), Suite("one", ("attacks",), attacks=("FGSM",))
    found = run({"a": model}, suite, twins={"a": model})["networks"]["a"]["attacks"]
    assert (found["forward"], found["backward"]) == (1 + 20 + 3, 1 + 20)


@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_killed_run_goes_on_to_the_same_end(done):
    class Killed(Exception):
        pass

    saved, begun = [], []

    def save(results):
        saved.append(json.dumps(results))
        if len(saved) == done:
            raise Killed

    with pytest.raises(Killed):
        run(save=save)
    partial = json.loads(saved[-1])
    before = copy.deepcopy(partial)
    resumed = run(partial_results=partial, progress=lambda *item: begun.append(item))
    assert len(begun) == 8 - done
    assert without_time(resumed) == without_time(run())
    assert partial == before


def test_the_standard_suite_survives_a_network_of_one_answer():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.arange(10.0))

        def forward(self, inputs):
            return self.bias + 0 * inputs.flatten(1).sum(1, keepdim=True)

    found = run({"constant": Constant()}, SMALL)
    assert found["networks"]["constant"]["failures"]["value"]["zero_gradients"]["raised"]
    assert found["networks"]["constant"]["distances"]["value"]["CW L2"]["median"] is None


def test_autoattack_is_for_four_classes_and_more():
    suite = Suite("two", ("attacks",), attacks=("FGSM", "AutoAttack"))
    model = nn.Sequential(network(), nn.Linear(10, 2))
    found = evaluate_networks(
        {"a": model},
        x,
        y % 2,
        eps=[0.1],
        radius=0.1,
        suite=suite,
    )
    assert list(found["networks"]["a"]["attacks"]["value"]["accuracy"]) == ["FGSM"]
    assert "AutoAttack" in SUITES["full"].attacks


def test_networks_and_random_state_are_left_alone():
    model = network().train()
    model.add_module("dropout", nn.Dropout(0.5))
    state = torch.get_rng_state()
    run({"a": model}, SMALL)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model._forward_hooks


class Images(nn.Module):
    def forward(self, inputs):
        return inputs


x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 10
LAST = int(torch.randperm(24, generator=torch.Generator().manual_seed(0))[-1])  # with seed 0


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((x + 1, y), {}, "inputs must lie in [0, 1], got values from 1"),
        ((x[:0], y[:0]), {}, "inputs must be (N, *D) with at least one sample, got (0, 1, 8, 8)"),
        ((x.flatten(1), y), {}, "inputs must be (N, C, H, W), got (24, 64)"),
        ((x, y + 5), {}, "targets must lie in [0, 10), the model's classes, got values from 5 to"),
        ((x, 0 * y), {}, "targets must hold at least two classes, got 0 only"),
        ((x, y), {"eps": [-0.1]}, "eps must rise strictly from 0 or above and be finite"),
        (
            (x, y),
            {"radius": -0.1},
            "radius must lie in (0, 1] and eps in [0, 1], got -0.1 and [0.1]",
        ),
        ((x, y), {"radius": 8}, "radius must lie in (0, 1] and eps in [0, 1], got 8 and [0.1]"),
        (
            (x, y),
            {"eps": [1, 2]},
            "radius must lie in (0, 1] and eps in [0, 1], got 0.1 and [1, 2]",
        ),
        ((x, y), {"suite": "slow"}, "suite must be one of quick, standard, full, got slow"),
        ((x, y), {"suite": SMALL}, "calibration must hold at least 19 samples for small, got 0"),
        (
            (x, y),
            {"suite": SMALL, "calibration": (x + 1, y)},
            "inputs must lie in [0, 1], got values from 1",
        ),
        ((x, y), {"twins": {"c": network()}}, "twins must be of models, got one of c"),
        (
            (x, y),
            {"models": {"a": network(), "twin of a": network()}, "twins": {"a": network()}},
            "models must not be named as a twin, got twin of a",
        ),
        (
            (x, (torch.arange(24) == LAST).long()),
            {"suite": Suite("few", ("clean",), samples={"SPSA": 5})},
            "targets must hold two classes among the 5 samples that slow attacks are made on, "
            "drawn with seed 0, got 0 only",
        ),
        ((x, y), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((x, y), {"models": {}}, "models must hold at least one network, got none"),
        (
            (x, y),
            {"models": {"a": network(), "b": Images()}},
            "model must return (N, classes) of at least two classes, got (1, 1, 8, 8)",
        ),
    ],
)
def test_bad_input_is_named_before_any_measure(given, options, message):
    options = {"models": {"a": network()}, "eps": [0.1], "radius": 0.1, "suite": SHORT, **options}
    models, begun = options.pop("models"), []
    with pytest.raises(ValueError, match=f"^evaluate_networks: {re.escape(message)}"):
        evaluate_networks(models, *given, progress=lambda *item: begun.append(item), **options)
    assert not begun


def test_a_missing_library_names_its_extra_before_any_measure(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    begun = []
    message = (
        "evaluate_networks: foolbox cannot be imported; "
        'install it with: pip install "robustkern[eval]"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        run(suite="standard", progress=lambda *item: begun.append(item))
    assert not begun


def test_partial_results_of_other_arguments_are_refused():
    before = run()
    with pytest.raises(ValueError, match=r"^evaluate_networks: partial_results must be of the same "
                       r"seed, 1, got 0$"):  # fmt: skip
        run(seed=1, partial_results=before)
    with pytest.raises(ValueError, match=r"the same networks, \['a'\], got \['a', 'b'\]$"):
        run({"a": network()}, partial_results=before)
