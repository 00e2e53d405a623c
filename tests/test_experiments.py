"""bench/experiments.py, in small: every study goes all the way, and its page says what it found."""

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern.evaluation import evaluating, fgsm
from robustkern.training.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

experiments, experiments_page, experiments_why, frontier, methods, penalty_gradients, studies = map(
    importlib.import_module,
    ("experiments", "experiments_page", "experiments_why", "frontier", "frontier_methods",
     "penalty_gradients", "studies"),
)  # fmt: skip

PAGES = {
    "batch-statistics": experiments_why.batch_statistics,
    "cure": experiments_page.cure,
    "cure-cifar10": experiments_page.cure,
    "overfitting": experiments_page.overfitting,
    "combined": experiments_page.combined,
    "shift": experiments_page.shift,
    "kinks": experiments_page.kinks,
}


def images(channels, train=32, held=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(train + held, channels, 8, 8, generator=generator)
    y = torch.arange(train + held) % 10
    return Dataset("random", x[:train], y[:train], x[train:], y[train:])


def data_of(name):
    return images(1 if studies.STUDIES[name]().setting.set == "mnist" else 3)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_variant_is_trained_and_shown(name):
    laboratory = experiments.Laboratory(name, True, data_of(name))
    tasks = experiments.tasks(laboratory.study)
    # As JSON has it: rows must survive it.
    rows = json.loads(json.dumps([laboratory.trained(*task) for task in tasks]))
    assert not [row for row in rows if "failed" in row]
    trained = [row for row in rows if row["kind"] == "trained"]
    assert {row["method"] for row in trained} == {v.name for v in laboratory.study.variants}
    for row in trained:
        assert row["passes"]["forward"] >= 1
        shares = [row["figures"][-1]["clean"], *row["figures"][-1]["pgd"]]
        assert all(0 <= share <= 1 for share in shares)
    setting = json.loads(json.dumps(vars(laboratory.study.setting)))
    results = {"rows": rows, "setting": setting, "note": ""}
    shown = experiments_page.setting(results) + PAGES[name](results)
    for variant in laboratory.study.variants:
        assert variant.name in shown
    assert "nan" not in shown


def test_names_tell_variants_apart():
    for study in (make() for make in studies.STUDIES.values()):
        tasks = experiments.tasks(study)
        assert len(tasks) == len(set(tasks))
        assert study.setting.main_eps in study.setting.eps


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("eps", [0.15, 0.2])
def test_tv_with_a_shift_of_eps_is_fgsm_adversarial_training(clamped, eps):
    laboratory = experiments.Laboratory("shift", True, images(1))
    x, y = laboratory.data.x_train.double(), laboratory.data.y_train
    variant = laboratory.variants[f"TV, shift {eps:g}" + ", clamped" * clamped]
    run = laboratory.trainer(variant, eps / methods.MNIST.main_eps, 0)
    run.penalty.set_epoch(0)
    run.model.double()
    model = copy.deepcopy(run.model)
    run.backward(x, y)
    attacked = fgsm(model, x, y, eps) if clamped else x + eps * sign(model, x, y)
    F.cross_entropy(model(attacked), y).backward()
    torch.testing.assert_close(flat(run.model), flat(model), rtol=1e-5, atol=1e-9)


def sign(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0].sign()


def test_all_variants_see_the_same_batches():
    laboratory = experiments.Laboratory("overfitting", True, images(1))
    states = []
    for name in ("PGD-7", "FGSM", "FGSM-RS + GradAlign"):
        run = laboratory.trainer(laboratory.variants[name], 0.0, 0)
        run.run_epoch()
        states.append(run.batches.get_state())
    shift = experiments.Laboratory("shift", True, images(1))
    run = shift.trainer(shift.variants["no penalty"], 0.0, 0)
    run.run_epoch()
    assert all(torch.equal(state, run.batches.get_state()) for state in states)


def test_an_activation_takes_the_place_of_every_relu():
    relu = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(8, 4)
    expected = F.softplus(relu[0](x), beta=10)
    torch.testing.assert_close(studies.activated(relu, "softplus")(x), expected)
    laboratory = experiments.Laboratory("batch-statistics", True, images(3))
    targets = [node.target for node in laboratory.clean("GELU", 0).graph.nodes]
    assert targets.count(F.gelu) == 7
    assert F.relu not in targets


def test_double_backward_in_eval_mode_is_cure_in_eval_mode():
    data = images(3)
    network = experiments.Laboratory("batch-statistics", True, data).clean("ReLU", 0)
    setting = studies.batch_statistics().setting
    cure = methods.Method(
        "CURE", "naive", lambda weight: [{"name": "cure", "weight": str(weight), "h": "0.5"}],
        options=lambda weight: {"batch_norm": "eval"}, trainer=methods.ExactTrainer,
    )  # fmt: skip
    run = methods.trainer(cure, 0.5, copy.deepcopy(network), data, setting, 0)
    run.penalty.set_epoch(0)
    run.model.train()
    run.model.zero_grad()
    run.backward(data.x_train, data.y_train)
    model = network.train()
    model.zero_grad()
    F.cross_entropy(model(data.x_train), data.y_train).backward()
    with evaluating(model):
        run.penalty.penalty(model, data.x_train, data.y_train).backward()
    torch.testing.assert_close(flat(run.model), flat(model))
    assert all(module.training for module in run.model.modules())


def test_a_central_difference_agrees_with_double_backward_where_there_are_no_kinks():
    laboratory = experiments.Laboratory("kinks", True, images(1))
    x, y = laboratory.data.x_train.double(), laboratory.data.y_train
    found = []
    for way in ("double backward", "central, shift 0.001"):
        run = laboratory.trainer(laboratory.variants[f"softplus, {way}"], 10.0, 0)
        run.penalty.set_epoch(0)
        run.model.double().zero_grad()
        found.append((*run.backward(x, y), flat(run.model)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_the_usual_shift_is_that_of_training():
    data = images(3)
    model = experiments.Laboratory("batch-statistics", True, data).clean("ReLU", 0)
    step = robustkern.backward(model, data.x_train, data.y_train, robustkern.CURE(0.1, 0.5))
    assert 1 / 1.5 < step.shift.item() / penalty_gradients.USUAL < 1.5


def test_what_lies_along_the_weights():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    weight = model[0].weight.detach().double()
    across = torch.stack([-weight[:, 1], weight[:, 0]], 1)  # as long, and at a right angle
    shares = [
        penalty_gradients.along_weights(model, {"0.weight": along * weight + across})
        for along in (0.0, 1.0, -3.0)
    ]
    assert [f["share"] for f in shares] == pytest.approx([0, 1 / 2, 9 / 10])
    assert [f["by_chance"] for f in shares] == pytest.approx([1 / 2] * 3)
    assert [f["shrinking"] for f in shares[1:]] == [1, 0]


def write(path, data):
    arrays = {
        key: (255 * value.numpy()).astype(np.uint8) if key[0] == "x" else value.numpy()
        for key, value in vars(data).items()
        if key != "name"
    }
    np.savez(path, **arrays)
    return str(path)


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["experiments.py", *arguments])
    experiments.main()


def test_a_killed_run_repeats_nothing(tmp_path, monkeypatch, capsys):
    asked = []

    def trained(*task):
        asked.append(task)
        row = dict(zip(("kind", "method", "strength", "seed"), task, strict=True))
        return {"study": "cure", **row}

    monkeypatch.setattr(frontier, "_trained", trained)
    monkeypatch.setattr(experiments, "announce", lambda *_: None)
    monkeypatch.setattr(experiments, "processes", lambda n, *_: ThreadPoolExecutor(n))
    data, output = write(tmp_path / "images.npz", images(1, 96)), tmp_path / "results.json"
    arguments = ("cure", "--data", data, "--smoke", "--workers", "1", "--output", str(output))
    call(monkeypatch, *arguments)
    tasks = experiments.tasks(experiments.study_of("cure", small=True))
    assert asked == tasks
    content = json.loads(output.read_text())
    content["rows"] = [row for row in content["rows"] if row["method"] not in ("full", "every 8")]
    output.write_text(json.dumps(content))
    call(monkeypatch, *arguments)
    assert {task[1] for task in asked[len(tasks) :]} == {"full", "every 8"}
    assert len(asked) == len(tasks) + 2
    assert len(json.loads(output.read_text())["rows"]) == len(tasks)
    with pytest.raises(SystemExit):
        call(monkeypatch, "shift", *arguments[1:])
    assert (
        "results.json must be of shift to go on with, got cure; move it" in capsys.readouterr().err
    )


def test_after_an_error_nothing_more_is_trained(tmp_path, monkeypatch):
    begun = []

    def trained(*task):
        begun.append(task)
        time.sleep(0.01)
        raise RuntimeError("no memory")

    monkeypatch.setattr(frontier, "_trained", trained)
    tasks = experiments.tasks(experiments.study_of("cure", small=False))
    results = frontier.Results(tmp_path / "results.json", methods.MNIST, "")
    with pytest.raises(RuntimeError, match="no memory"), ThreadPoolExecutor(1) as pool:
        frontier.train(pool, tasks, results)
    assert len(begun) < len(tasks) / 2


def test_it_runs_from_the_command_line(tmp_path):
    output = tmp_path / "results.json"
    data = write(tmp_path / "images.npz", images(1, 96))
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "experiments.py"), "overfitting", "--smoke",
         "--workers", "1", "--data", data, "--output", str(output)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 trainings and the like left: about" in done.stdout
    assert len(json.loads(output.read_text())["rows"]) == 12


def test_only_training_images_are_seen(tmp_path):
    study, whole = experiments.study_of("cure", small=True), images(1, 96)
    data = experiments.load_held_out(write(tmp_path / "images.npz", whole), study)
    seen = torch.cat([data.x_train, data.x_test])
    assert len(seen) == 48
    torch.testing.assert_close(seen, whole.x_train[:48], atol=1 / 255, rtol=0)


def trainings(study, name, *pgd):
    variant = next(v for v in studies.STUDIES[study]().variants if v.name == name)
    strength = variant.method.grid[-1]
    figures = ({"clean": 0.9, "pgd": [share], "fgsm": [0.8]} for share in pgd)
    return [
        {"study": study, "kind": "trained", "method": name, "strength": strength, "seed": seed,
         "figures": [each], "passes": {"forward": 1, "backward": 1}}
        for seed, each in enumerate(figures)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pgd", "verdict"),
    [
        ((0.5, 0.7), "more robust every time. PGD accuracy at 0.1 +10.0 (+10.0 to +10.0)"),
        ((0.3, 0.5), "less robust every time"),
        ((0.3, 0.7), "not the same way every time"),
        ((0.4, 0.7), "not the same way every time"),
        ((0.4, 0.6), "equally robust every time. PGD accuracy at 0.1 +0.0 (+0.0 to +0.0)"),
        ((0.5,), "more robust once. PGD accuracy at 0.1 +10.0, clean accuracy +0.0 points, 1 trai"),
    ],
)
def test_the_verdict_is_over_all_seeds(pgd, verdict):
    setting = {"eps": [0.1], "main_eps": 0.1, "pgd_steps": 20, "epochs": 1}
    rows = trainings("cure", "anchored", *pgd) + trainings("cure", "full", 0.4, 0.6)
    assert f"anchored against full: {verdict}" in experiments_page.cure(
        {"setting": setting, "rows": rows}
    )


def test_a_seed_overfits_where_one_step_says_nothing():
    setting = {"eps": [0.1], "main_eps": 0.1, "pgd_steps": 20, "epochs": 1}
    rows = trainings("overfitting", "FGSM", 0.1, 0.3)
    for row in rows:
        row["strength"] = 0.0
    rows += trainings("overfitting", "FGSM + CURE", 0.3, 0.4)
    rows += trainings("overfitting", "FGSM + GradAlign", 0.3)  # its other seed failed
    shown = experiments_page.overfitting({"setting": setting, "rows": rows})
    assert (
        "FGSM alone overfits in 1 of 2 seeds; in no seed, and with this PGD accuracy in the end: "
        "FGSM + CURE, weight 1 (35.0% (30.0 to 40.0))." in shown
    )


def test_the_norm_is_not_judged_beside_its_square():
    setting = {"eps": [0.1], "main_eps": 0.1, "pgd_steps": 20, "epochs": 1}
    names = ("ReLU, first order, batch", "ReLU, first order, eval", "ReLU, authors' structure")
    rows = [row for name in names for row in trainings("batch-statistics", name, 0.5)]
    for row in rows:
        row["strength"] = 0.1
    shown = experiments_why.batch_statistics({"setting": setting, "rows": rows})
    assert "ReLU, eval mode against batch statistics: " in shown
    assert "authors' structure against" not in shown


@pytest.mark.parametrize(("norm", "penalty", "says"), [(0.9, 0.5, "Yes"), (1.1, 1.2, "No")])
def test_what_has_grown_is_not_said_to_shrink(norm, penalty, says):
    factors = {
        ("ReLU, first order, eval", 0.1): {"norm": norm, "eval": penalty, "batch": 2.0},
        ("ReLU, first order, batch", 0.1): {"norm": 1.2, "eval": 1.0, "batch": 1.0},
    }
    shown = experiments_why.hypothesis({}, factors)
    assert f"- {says}: training in eval mode shrinks the weights more" in shown
    assert f"- {says}: it lowers the penalty in eval mode more" in shown


def test_a_study_without_a_finished_training_is_not_measured_yet(monkeypatch):
    readme = importlib.import_module("readme")
    failed = {"study": "cure", "kind": "trained", "method": "full", "strength": 0.5, "seed": 0}
    content = {"rows": [{**failed, "failed": "nan"}], "setting": {}}
    monkeypatch.setattr(readme, "read", lambda name: content)
    assert readme.SECTIONS["experiments_cure"]() == readme.NOT_MEASURED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cure", "--data", "none.npz"),
            "or a name: digits, mnist, cifar10, svhn; cure is for mnist",
        ),
        (("cure", "--data", "{few}"), "check_enough: data must hold at least 6000 training"),
        (("cure-cifar10", "--data", "{few}"), "images of cifar10, of 3 channel(s), got 1"),
        (("cure", "--data", "{few}", "--workers", "0"), "--workers must be at least 1, got 0"),
        (("sure", "--data", "{few}"), "invalid choice: 'sure'"),
    ],
)
def test_errors_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    few = write(tmp_path / "few.npz", images(1))
    with pytest.raises(SystemExit):
        call(monkeypatch, *(each.format(few=few) for each in arguments))
    assert message in capsys.readouterr().err
