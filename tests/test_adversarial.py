"""Adversarial training, TRADES and training with noise, alone and with penalties."""

import copy
import dataclasses
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern.cli import main
from robustkern.evaluation import accuracy, deepfool_source, fgsm, pgd
from robustkern.training import Options, Trainer, load, train
from robustkern.training.adversarial import (
    DEFAULTS,
    adversarial_training,
    deepfool_augmentation,
    divergence,
    fgsm_rs_augmentation,
    lrc_augmentation,
    pgd_augmentation,
    trades_augmentation,
    uniform_augmentation,
)
from robustkern.training.checkpoint import load_checkpoint
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.schedules import Schedule

SPECS = {
    "fgsm-rs": {"eps": 0.1},
    "pgd": {"eps": 0.1, "steps": 3},
    "deepfool": {"steps": 3},
    "trades": {"eps": 0.1, "steps": 3},
    "uniform": {"eps": 0.5},
    "lrc": {"eps": 0.3},
}
GN = robustkern.GradientPenalty(0.1, p=2, power=2)


@pytest.fixture(scope="module")
def digits():
    return load("digits").first(1000, 400)


@pytest.fixture
def small(digits):
    return digits.first(96, 20)


def spec(name):
    if name == "deepfool":
        pytest.importorskip("foolbox", exc_type=ImportError)
    return {"name": name, **SPECS[name]}


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    )


def trainer(data, name=None, model=None, penalties=(), **options):
    if name is not None:
        augmentation, beta = adversarial_training(spec(name), data.shape)
        options |= {"augmentation": augmentation, "trades_beta": beta}
    model = network() if model is None else model
    return Trainer(model, data, ScheduledPenalty(penalties, data.shape), **options)


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def fine_tuned(digits):
    torch.manual_seed(0)
    clean = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def fit(model, epochs, name=None):
        run = trainer(digits, name, model, lr=Schedule.parse("lr", "0.003"))
        for _ in range(epochs):
            run.run_epoch()
        attack = functools.partial(pgd, eps=0.1, steps=10)
        return accuracy(model, digits.x_test, digits.y_test, attack=attack)

    fit(clean, 10)
    return functools.cache(lambda name: fit(copy.deepcopy(clean), 5, name))


@pytest.mark.parametrize("name", SPECS)
def test_pgd_succeeds_less_often(fine_tuned, name):
    gain = 0.02 if name in ("uniform", "lrc") else 0.12
    assert fine_tuned(name) > fine_tuned(None) + gain


def test_one_step_of_pgd_without_random_start_is_fgsm(small):
    model, x, y = network(), small.x_train, small.y_train
    augmentation = pgd_augmentation(0.1, steps=1, step_size=0.1, random_start=False)
    assert torch.equal(augmentation(model, x, y), fgsm(model, x, y, 0.1))


def test_fgsm_rs_is_a_step_of_pgd_from_a_random_start(small):
    model, x, y = network(), small.x_train, small.y_train
    torch.manual_seed(3)
    found = fgsm_rs_augmentation(0.1)(model, x, y)
    torch.manual_seed(3)
    assert torch.equal(found, pgd_augmentation(0.1, steps=1, step_size=0.125)(model, x, y))
    assert not torch.equal(found, fgsm_rs_augmentation(0.1)(model, x, y))


def test_deepfool_moves_images_to_another_class(small):
    pytest.importorskip("foolbox", exc_type=ImportError)
    model, x, y = network().eval(), small.x_train, small.y_train
    found = deepfool_augmentation(steps=20)(model, x, y)
    torch.testing.assert_close(found - x, deepfool_source(model, steps=20)(x, x))
    assert (model(found).argmax(1) != model(x).argmax(1)).float().mean() > 0.9


def test_trades_attacks_the_divergence_of_the_clean_outputs(small):
    model, x, y = network().eval(), small.x_train, small.y_train
    model[5].weight.data.mul_(5)
    clean = model(x).softmax(1).detach()

    def loss(outputs, clean):
        return F.kl_div(outputs.log_softmax(1), clean, reduction="batchmean")

    torch.manual_seed(0)
    starts = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    expected = pgd(model, x, clean, 0.1, steps=4, generator=starts, loss_fn=loss)
    torch.manual_seed(0)
    found = trades_augmentation(0.1, steps=4)(model, x, y)
    # A gradient of nearly 0 may have either sign.
    assert (found - expected).abs().gt(1e-6).float().mean() < 0.01
    assert not torch.equal(found, trades_augmentation(0.1, steps=4)(model, x, y))


@pytest.mark.parametrize("penalties", [[], [{"name": "gn"}]])
def test_the_scale_of_a_loss_is_that_of_its_divergence_too(small, penalties):
    grads = []
    for scale in (1.0, 64.0):
        run = trainer(small, "trades", precision="float16", penalties=penalties)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run.model.train()
        run.step(torch.arange(96))  # which leaves `.grad` unscaled
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.999
    torch.testing.assert_close(*(grad.norm() for grad in grads), rtol=0.01, atol=0)


def test_the_divergence_is_that_of_kullback_and_leibler():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(divergence(a, b), expected.mean())
    assert divergence(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("penalties", [[], [{"name": "gn", "weight": "0.1"}]])
def test_a_step_is_the_engine_at_the_images_of_the_augmentation(small, name, penalties):
    run = trainer(small, name, penalties=penalties)
    given = []
    inner = run.augmentation
    run.augmentation = lambda *arguments: given.append(inner(*arguments)) or given[0]
    model, x, y = copy.deepcopy(run.model).train(), small.x_train, small.y_train
    run.model.train()
    run.penalty.set_epoch(0)
    loss, _ = run.step(torch.arange(96))
    at = x if name == "trades" else given[0]
    terms = []
    expected = robustkern.backward(model, at, y, GN).loss if penalties else 0
    if not penalties:
        terms.append(lambda outputs: F.cross_entropy(outputs, y))
    if name == "trades":
        terms.append(lambda outputs: 6 * divergence(outputs, model(given[0])))
    if terms:
        outputs = model(at)
        rest = sum(term(outputs) for term in terms)
        rest.backward()
        expected = expected + rest
    assert loss.item() == expected.item()
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("penalties", [[], [{"name": "gn", "weight": "0.1"}]])
def test_trades_with_beta_0_is_clean_training(small, penalties):
    runs = [
        trainer(small, augmentation=augmentation, trades_beta=beta, penalties=penalties, crop=0)
        for augmentation, beta in ((None, None), (trades_augmentation(0.1), 0.0))
    ]
    order = torch.arange(96)
    for run in runs:
        run.penalty.set_epoch(0)
        run.model.train()
        for index in order.split(32):
            run.step(index)
    assert same_parameters(runs[0].model, runs[1].model)


@pytest.mark.parametrize("name", SPECS)
def test_an_augmentation_leaves_the_network_as_it_was(small, name):
    model = network(dropout=0.3).train()
    model[3].eval()
    model[1].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = copy.deepcopy(model.state_dict())
    augmentation, _ = adversarial_training(spec(name), small.shape)
    found = augmentation(model, small.x_train, small.y_train)
    assert found.shape == small.x_train.shape
    assert not found.requires_grad
    assert 0 <= found.min() <= found.max() <= 1
    assert not torch.equal(found, small.x_train)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert [m.training for m in model] == [True, True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False, True]


class Breaks(nn.Linear):
    """Raises at a chosen call."""

    calls, fail_at = 0, 0

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("broken model")
        return super().forward(inputs)


@pytest.mark.parametrize("name", ["fgsm-rs", "pgd", "deepfool", "trades"])
def test_after_an_error_in_the_attack_all_is_as_it_was(small, name):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), Breaks(64, 10)).train()
    run = trainer(small, name, model)
    model[2].fail_at = 1 if name == "fgsm-rs" else 2
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"^broken model$"):
        run.run_epoch()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model._forward_hooks


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
def test_every_precision_trains(small, name, precision):
    run = trainer(small, name, penalties=[{"name": "gn", "weight": "0.1"}], precision=precision)
    before = copy.deepcopy(run.model)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "float16")
    record = run.run_epoch()
    assert record.loss > 0
    # Casts cached without gradients would leave weights where they are.
    for moved, still in zip(run.model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(moved, still)


def test_the_attack_has_the_precision_of_the_step(small):
    seen = []
    run = trainer(
        small,
        precision="bfloat16",
        augmentation=lambda model, x, y: seen.append(model(x).dtype) or x,
    )
    run.step(torch.arange(8))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("name", SPECS)
def test_a_run_goes_on_where_it_stopped(small, name):
    def new():
        penalties = [{"name": "cure", "direction": "gaussian", "weight": "0.1"}]
        return trainer(small, name, network(dropout=0.2), penalties, crop=1, batch_size=40)

    straight, resumed = new(), new()
    torch.manual_seed(5)
    straight.run_epoch()
    saved = copy.deepcopy(straight.state_dict())
    expected = straight.run_epoch()
    resumed.load_state_dict(saved)
    found = resumed.run_epoch()
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert same_parameters(straight.model, resumed.model)


def test_what_is_drawn_follows_from_the_seed_and_disturbs_no_other_draws(small):
    found = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        run = trainer(small, "uniform", seed=seed)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        run.run_epoch()
        assert torch.equal(torch.get_rng_state(), state)
        found.append(run.model)
    assert same_parameters(found[0], found[1])
    assert not same_parameters(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [(None, 1, 1), ("fgsm-rs", 2, 2), ("pgd", 4, 4), ("trades", 6, 5), ("uniform", 1, 1)],
)
@pytest.mark.parametrize("penalized", [False, True])
def test_passes_are_counted(small, name, forward, backward, penalized):
    more = [{"name": "gn"}] if penalized else []
    record = trainer(small, name, penalties=more, batch_size=40).run_epoch()
    # Beside a penalty TRADES passes the clean images once more, for the divergence.
    further = penalized * (2 if name == "trades" else 1)
    assert record.forward_passes == forward + further
    assert record.backward_passes == backward + further


def test_correlated_noise_has_its_deviation(digits):
    x = digits.x_train
    moved = lrc_augmentation(digits.shape, 0.2)(network(), x, digits.y_train) - x
    # What the edges cannot have cut off: medians of pixels in the middle.
    moved = moved[(x > 0.4) & (x < 0.6)]
    assert abs(moved.median()) < 0.02
    torch.testing.assert_close(moved.abs().median(), torch.tensor(0.2 * 0.6745), rtol=0.1, atol=0)


BAD = [
    (
        {"name": "mixup"},
        f"adversarial_training: name must be one of {', '.join(DEFAULTS)}, got mixup",
    ),
    (
        {"name": "uniform", "eps": 0.1, "steps": 2, "beta": 1.0},
        "adversarial_training: uniform takes the options eps, got steps, beta",
    ),
    ({"name": "pgd"}, "adversarial_training: eps must be given for pgd, got None"),
    (
        {"name": "fgsm-rs", "eps": -0.1},
        "fgsm_rs_augmentation: eps must be positive and finite, got -0.1",
    ),
    (
        {"name": "pgd", "eps": float("nan")},
        "pgd_augmentation: eps must be positive and finite, got nan",
    ),
    (
        {"name": "pgd", "eps": 0.1, "step_size": 0.0},
        "pgd_augmentation: step_size must be positive and finite, got 0.0",
    ),
    (
        {"name": "trades", "eps": 0.1, "steps": 0},
        "trades_augmentation: steps must be at least 1, got 0",
    ),
    ({"name": "deepfool", "steps": 0}, "deepfool_augmentation: steps must be at least 1, got 0"),
    (
        {"name": "uniform", "eps": 0.0},
        "uniform_augmentation: eps must be positive and finite, got 0.0",
    ),
    (
        {"name": "lrc", "eps": float("inf")},
        "lrc_augmentation: eps must be positive and finite, got inf",
    ),
    (
        {"name": "lrc", "eps": 0.1, "decay_length": 0.0},
        "CovarianceFunction.exponential: decay_length must be positive and finite, got 0.0",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_spec_is_named(bad, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adversarial_training(bad, (1, 8, 8))


def test_a_bad_beta_is_named(small):
    message = "Trainer: trades_beta must be finite and not negative, got -1"
    with pytest.raises(ValueError, match=f"^{message}$"):
        trainer(small, augmentation=uniform_augmentation(0.1), trades_beta=-1)
    message = "Trainer: augmentation must be given with trades_beta, got None"
    with pytest.raises(ValueError, match=f"^{message}$"):
        trainer(small, trades_beta=1)


def arguments(folder, *more):
    sizes = ["--train-size", "64", "--test-size", "20", "--device", "cpu"]
    return ["train", "--output", str(folder), *sizes, *more]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", [""])
    options = ["--adversarial", "trades", "--adversarial-eps", "8/80", "--adversarial-steps", "2"]
    options += ["--adversarial-beta", "3", "--penalty", "gn", "--adversarial-step-size", "0.05"]
    assert main(arguments(tmp_path, *options, "--epochs", "1")) == 0
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert content["options"]["adversarial"] == {
        "name": "trades", "eps": 0.1, "steps": 2, "beta": 3.0, "step_size": 0.05,
    }  # fmt: skip
    (record,) = content["log"]
    assert (record["forward_passes"], record["backward_passes"]) == (7, 6)
    assert "7.0 forward and 6.0 backward passes a step" in capsys.readouterr().out
    assert main(arguments(tmp_path, *options, "--epochs", "2", "--resume")) == 0
    options += ["--adversarial-beta", "4"]
    assert main(arguments(tmp_path, *options, "--epochs", "2", "--resume")) == 2
    assert "adversarial must be what the resumed run was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adversarial-eps", "0.1"], "--adversarial-eps must follow --adversarial"),
        (["--adversarial", "lrc"], "adversarial_training: eps must be given for lrc, got None"),
        (
            ["--adversarial", "pgd", "--adversarial-eps", "1/0"],
            "argument --adversarial-eps: must be a number or a fraction, got 1/0",
        ),
    ],
)
def test_errors_of_the_command_line(tmp_path, capsys, options, message):
    try:
        status = main(arguments(tmp_path, *options))
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert capsys.readouterr().err.strip().endswith(f"error: {message}")


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, name):
    def run(folder, epochs, resume=False):
        options = Options(
            train_size=64, test_size=20, epochs=epochs, crop=1, adversarial=spec(name),
            device="cpu", output=str(tmp_path / folder),
        )  # fmt: skip
        return load_checkpoint(train(options, resume=resume))["trainer"]["model"]

    whole = run("whole", 2)
    run("parts", 1)
    parts = run("parts", 2, resume=True)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_run_of_options_that_are_no_more_is_not_resumed(tmp_path):
    options = Options(train_size=64, test_size=20, epochs=1, device="cpu", output=str(tmp_path))
    path = train(options)
    content = torch.load(path, weights_only=True)
    content["options"]["lrc_eps"] = 0.3
    torch.save(content, path)
    message = "train: the resumed run must be of options that this version has, got lrc_eps"
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(dataclasses.replace(options, epochs=2), resume=True)
