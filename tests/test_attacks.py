"""FGSM, I-FGSM, PGD and accuracy under them."""

import math
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustkern.evaluation import (
    accuracy,
    adversarial_inputs,
    fgsm,
    ifgsm,
    pgd,
    robust_accuracy,
)

ATTACKS = [fgsm, ifgsm, pgd]
NORMS = {1: 0.6, 2: 0.2, math.inf: 0.1}  # radii of about the same strength


class Fragile(nn.Module):
    """Dropout that ignores eval mode, batch norm, and an error at a chosen call."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.BatchNorm1d(6).eval()
        self.linear = nn.Linear(6, 3)
        self.calls, self.fail_at = 0, fail_at

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("broken model")
        return self.linear(F.dropout(self.frozen(self.norm(inputs)), training=True))


@pytest.fixture
def batch():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    inputs = torch.rand(12, 6, generator=generator)
    inputs[0], inputs[1] = 0, 1
    return inputs, torch.arange(12) % 3


def smooth_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets, reduction="none")


def test_fgsm_is_the_signed_gradient_of_each_sample(batch):
    inputs, targets = batch
    model = smooth_model()
    x = inputs.clone().requires_grad_()
    loss_of(model, x, targets).sum().backward()
    expected = (inputs + 0.07 * x.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, inputs, targets, 0.07), expected, rtol=0, atol=1e-7)


def test_pgd_takes_projected_signed_steps(batch):
    inputs, targets = batch
    model = smooth_model(torch.float64)
    inputs = inputs.double()
    point = inputs
    for _ in range(4):
        x = point.clone().requires_grad_()
        loss_of(model, x, targets).sum().backward()
        moved = point + 0.03 * x.grad.sign()
        point = inputs + (moved - inputs).clamp(-0.05, 0.05)
        point = point.clamp(0, 1)
    result = pgd(model, inputs, targets, 0.05, steps=4, step_size=0.03, random_start=False)
    torch.testing.assert_close(result, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attacks_stay_in_the_ball_and_in_range_and_raise_the_loss(batch, attack, dtype):
    inputs, targets = batch[0].to(dtype), batch[1]
    model = smooth_model(dtype)
    result = attack(model, inputs, targets, 0.1)
    assert result.dtype == dtype
    assert not result.requires_grad
    assert (result - inputs).abs().max() <= 0.1 + 1e-6
    assert (result - inputs).abs().max() > 0.09
    assert result.min() >= 0
    assert result.max() <= 1
    assert (loss_of(model, result, targets) > loss_of(model, inputs, targets)).all()


def test_pgd_is_stronger_than_fgsm(batch):
    inputs, targets = batch
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 3))
    for parameter in model.parameters():
        parameter.data.mul_(4)
    one, some, many = (
        loss_of(model, attack(model, inputs, targets, 0.3), targets).mean() for attack in ATTACKS
    )
    assert one < some < many


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("fails", [False, True])
def test_attacks_leave_everything_as_they_found_it(batch, attack, fails):
    inputs, targets = batch
    inputs.requires_grad_()
    model = Fragile(fail_at=(1 if attack is fgsm else 3) if fails else None).train()
    model.frozen.eval()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.full((3, 6), 7.0)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match=r"^broken model$"):
            attack(model, inputs, targets, 0.1)
    else:
        attack(model, inputs, targets, 0.1)
    assert model.calls > 0
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert [p.requires_grad for p in model.linear.parameters()] == [True, False]
    assert inputs.requires_grad
    assert inputs.grad is None
    assert (model.linear.weight.grad == 7).all()
    assert model.norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_attacks_run_in_eval_mode_so_that_samples_do_not_mix(batch):
    inputs, targets = batch
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train()
    whole = pgd(model, inputs, targets, 0.1, random_start=False)
    parts = [
        pgd(model, x, y, 0.1, random_start=False)
        for x, y in zip(inputs.split(5), targets.split(5), strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


def test_pgd_random_start_is_seeded(batch):
    inputs, targets = batch

    def start(seed):
        generator = None if seed is None else torch.Generator(inputs.device).manual_seed(seed)
        return pgd(
            smooth_model(), inputs, targets, 0.2, steps=1, step_size=0.01, generator=generator
        )

    assert torch.equal(start(None), start(0))
    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(0), start(3))


def test_ifgsm_is_pgd_from_the_inputs(batch):
    inputs, targets = batch
    options = {"steps": 4, "step_size": 0.025, "random_start": False}
    expected = pgd(smooth_model(), inputs, targets, 0.1, **options)
    assert torch.equal(ifgsm(smooth_model(), inputs, targets, 0.1, steps=4), expected)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_stays_in_the_ball_of_its_norm_and_raises_the_loss(batch, p, random_start):
    inputs, targets = batch
    model, eps = smooth_model(), NORMS[p]
    result = pgd(model, inputs, targets, eps, p=p, random_start=random_start)
    length = (result - inputs).flatten(1).norm(p, dim=1)
    assert length.max() <= eps * (1 + 1e-5)
    assert length.max() > 0.9 * eps
    assert result.min() >= 0
    assert result.max() <= 1
    assert (loss_of(model, result, targets) > loss_of(model, inputs, targets)).all()


@pytest.mark.parametrize("p", NORMS)
def test_pgd_crosses_a_linear_boundary_just_beyond_its_distance(p):
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    inputs = 0.4 + 0.2 * torch.rand(20, 6)
    slope = (model.weight[1] - model.weight[0]).detach()
    model.bias.data = torch.stack([(inputs @ slope).median(), torch.tensor(0.0)])
    targets = model(inputs).argmax(1)
    margin = (model(inputs)[:, 1] - model(inputs)[:, 0]).abs().detach()
    distance = margin / slope.norm({1: math.inf, 2: 2, math.inf: 1}[p])
    inside = (distance > 0.01) & (distance < 0.3)  # so that the edges of [0, 1] are far
    assert inside.sum() > 10
    for one, label, radius in zip(inputs[inside], targets[inside], distance[inside], strict=True):
        for factor, right in ((0.98, True), (1.02, False)):
            eps = factor * radius.item()
            found = pgd(model, one[None], label[None], eps, p=p, random_start=False)
            assert (model(found).argmax(1) == label).item() == right


@pytest.mark.parametrize("p", NORMS)
def test_pgd_agrees_with_foolbox(batch, p):
    foolbox = pytest.importorskip("foolbox", exc_type=ImportError)
    inputs, targets = batch
    model, eps = smooth_model().eval(), NORMS[p]
    steps = 4 if p == 1 else 8  # where foolbox projects in L1, it leaves the ball
    kind = {
        1: foolbox.attacks.SparseL1DescentAttack,
        2: foolbox.attacks.L2ProjectedGradientDescentAttack,
        math.inf: foolbox.attacks.LinfProjectedGradientDescentAttack,
    }[p]
    attack = kind(rel_stepsize=0.2, steps=steps, random_start=False)
    attacked = foolbox.PyTorchModel(model, bounds=(0, 1), device=inputs.device)
    expected = attack.run(attacked, inputs, targets, epsilon=eps)
    found = pgd(
        model, inputs, targets, eps, p=p, steps=steps, step_size=0.2 * eps, random_start=False
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - inputs).abs().max() > 0.05


def test_pgd_restarts_break_more_and_leave_the_broken_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 3))
    for parameter in model.parameters():
        parameter.data.mul_(4)
    inputs = torch.rand(100, 6)
    targets = model(inputs).argmax(1)
    sizes = []
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    attack = partial(pgd, model, inputs, targets, 0.05, steps=1)
    first, many = attack(), attack(restarts=10)
    sizes = sizes[-20:]  # ten runs, and a look at what stands between them: 19
    broken = model(first).argmax(1) != targets
    assert torch.equal(many[broken], first[broken])
    right = (model(many).argmax(1) == targets).sum()
    assert right < (~broken).sum()
    attacked = [size for size in sizes if size < 100]
    assert attacked == sorted(attacked, reverse=True)
    assert attacked[0] == (~broken).sum()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attacks_need_no_grad_mode_of_the_caller(batch, attack, mode):
    inputs, targets = batch
    model = smooth_model()
    expected = attack(model, inputs, targets, 0.1)
    with mode():
        assert torch.equal(attack(model, inputs.clone(), targets.clone(), 0.1), expected)


def test_restarts_need_no_grad_mode_of_the_caller(batch):
    inputs, targets = batch
    attack = partial(pgd, smooth_model(), eps=0.02, steps=2, restarts=3)
    expected = attack(inputs, targets)
    with torch.inference_mode():
        assert torch.equal(attack(inputs.clone(), targets.clone()), expected)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_with_nothing_to_do(batch, attack):
    inputs, targets = batch
    assert torch.equal(attack(smooth_model(), inputs, targets, 0.0), inputs)
    assert attack(smooth_model(), inputs[:0], targets[:0], 0.1).shape == (0, 6)


BAD = {
    "model": (TypeError, "model must be a torch.nn.Module, got function"),
    "dtype": (TypeError, "inputs must be a floating-point tensor, got torch.int64"),
    "array": (TypeError, "inputs must be a floating-point tensor, got list"),
    "length": (ValueError, "targets must have inputs' length, got (12, 6) and (11,)"),
    "negative": (ValueError, "eps must be finite and not negative, got -0.1"),
    "infinite": (ValueError, "eps must be finite and not negative, got inf"),
    "range": (ValueError, "inputs must lie in [0, 1], got values from 0 to 2"),
    "nan": (ValueError, "inputs must lie in [0, 1], got values from nan to nan"),
    "outputs": (TypeError, "model must return a tensor, got tuple"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("case", BAD)
def test_attacks_name_bad_input(batch, attack, case):
    inputs, targets = batch
    model, eps = smooth_model(), 0.1
    if case == "model":
        model = F.relu
    elif case == "dtype":
        inputs = inputs.long()
    elif case == "array":
        inputs = inputs.tolist()
    elif case == "length":
        targets = targets[:-1]
    elif case == "negative":
        eps = -0.1
    elif case == "infinite":
        eps = float("inf")
    elif case == "range":
        inputs = inputs * 2
    elif case == "nan":
        inputs = inputs * float("nan")
    else:

        class Pair(nn.Linear):
            def forward(self, inputs):
                return super().forward(inputs), None

        model = Pair(6, 3)
    kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{re.escape(f'{attack.__name__}: {message}')}$"):
        attack(model, inputs, targets, eps)


def test_pgd_names_bad_steps(batch):
    with pytest.raises(ValueError, match=r"^pgd: steps must be at least 1, got 0$"):
        pgd(smooth_model(), *batch, 0.1, steps=0)
    with pytest.raises(ValueError, match=r"^pgd: step_size must be positive and finite, got -0.1$"):
        pgd(smooth_model(), *batch, 0.1, step_size=-0.1)
    with pytest.raises(ValueError, match=r"^ifgsm: steps must be at least 1, got 0$"):
        ifgsm(smooth_model(), *batch, 0.1, steps=0)
    with pytest.raises(ValueError, match=r"^pgd: p must be 1, 2 or inf, got 3$"):
        pgd(smooth_model(), *batch, 0.1, p=3)
    message = (
        "pgd: restarts must be at least 1, and 1 without a random start, "
        "got 2 and random_start=False"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pgd(smooth_model(), *batch, 0.1, restarts=2, random_start=False)


def test_accuracy_counts_right_answers_whatever_the_batches(batch):
    inputs, targets = batch
    model = smooth_model().train()
    right = (model(inputs).argmax(1) == targets).float().mean().item()
    sizes = []
    for batch_size in (1, 5, 100):
        assert accuracy(model, inputs, targets, batch_size=batch_size) == pytest.approx(right)
    accuracy(model, inputs, targets, batch_size=5, advance=sizes.append)
    assert sizes == [5, 5, 2]
    assert model.training


def test_accuracy_moves_batches_to_the_dtype_of_the_model(batch):
    inputs, targets = batch
    low = accuracy(smooth_model(), inputs, targets)
    assert accuracy(smooth_model(torch.float64), inputs, targets) == low


def test_robust_accuracy_falls_with_eps_and_starts_clean():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    inputs = torch.rand(200, 2, generator=generator)
    targets = (inputs[:, 0] > inputs[:, 1]).long()
    model = nn.Linear(2, 2)
    model.weight.data.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    model.bias.data.zero_()
    seen = []
    result = robust_accuracy(model, inputs, targets, [0.0, 0.1, 0.2], advance=seen.append)
    # A linear classifier: the attack succeeds exactly where the margin is below 2 eps.
    margin = (inputs[:, 0] - inputs[:, 1]).abs()
    # Clipping to [0, 1] saves nobody here: an attack moves both pixels towards each other.
    expected = tuple((margin > 2 * eps).float().mean().item() for eps in (0.0, 0.1, 0.2))
    assert result.clean == 1
    assert result.pgd == pytest.approx(expected)
    assert result.fgsm == pytest.approx(expected)
    assert sum(seen) == 200 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adversarial_inputs_are_those_of_the_batches(batch, dtype):
    inputs, targets = batch
    model = smooth_model(dtype)
    sizes = []
    found = adversarial_inputs(
        model, inputs, targets, partial(pgd, eps=0.1), batch_size=5, advance=sizes.append
    )
    assert sizes == [5, 5, 2]
    assert torch.equal(found[5:10], pgd(model, inputs[5:10].to(dtype), targets[5:10], 0.1))
    attacked = accuracy(model, inputs, targets, attack=partial(pgd, eps=0.1), batch_size=5)
    assert accuracy(model, found, targets) == attacked


def test_accuracy_names_bad_input(batch):
    inputs, targets = batch
    message = "accuracy: targets must have inputs' length, got (12, 6) and (11,)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accuracy(smooth_model(), inputs, targets[:-1])
    message = "accuracy: inputs must hold at least one sample, got shape (0, 6)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accuracy(smooth_model(), inputs[:0], targets[:0])
    message = "accuracy: targets must lie in [0, 3), the model's classes, got values from 1 to 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accuracy(smooth_model(), inputs, targets + 1)
    message = "accuracy: model must return finite outputs, got infinite ones or NaN"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accuracy(smooth_model(), inputs * torch.nan, targets)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_without_a_gradient_is_named(frozen):
    class Detached(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.detach())

    model = Detached(3, 2).requires_grad_(not frozen)
    message = "pgd: model must be differentiable, got outputs without a gradient"
    with pytest.raises(ValueError, match=f"^{message}$"):
        pgd(model, torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), 0.1)
