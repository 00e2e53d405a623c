"""The attacks that look for the nearest adversarial input, and those of foolbox's that they are."""

import math

import pytest
import torch
from torch import nn

from robustkern.evaluation import (
    boundary,
    carlini_wagner,
    deepfool,
    evaluating,
    evasive_carlini_wagner,
    hop_skip_jump,
    subspace_deepfool,
)

foolbox = pytest.importorskip("foolbox", exc_type=ImportError)


def linear(samples=12, size=16):
    """A linear network, inputs far from the edges of [0, 1], labels and distances in L2 and inf."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 2))
    inputs = 0.5 + 0.05 * torch.randn(samples, 1, 4, size // 4)
    slope = (model[1].weight[1] - model[1].weight[0]).detach()
    score = inputs.flatten(1) @ slope
    model[1].bias.data = torch.stack([score.median() + 0.01, torch.tensor(0.0)])
    margin = (score - model[1].bias.data[0]).abs()
    distances = {2: margin / slope.norm(), math.inf: margin / slope.norm(1)}
    return model, inputs, model(inputs).argmax(1), distances


def length(x, p=2):
    return torch.linalg.vector_norm(x.flatten(1), p, dim=1)


@pytest.mark.parametrize(
    ("attack", "p", "options", "excess"),
    [
        (deepfool, 2, {"p": 2}, 1.06),
        (deepfool, math.inf, {"p": math.inf}, 1.06),
        (carlini_wagner, 2, {"steps": 300, "searches": 9, "initial_const": 0.1}, 1.05),
        (boundary, 2, {"steps": 2000}, 1.3),
        (hop_skip_jump, 2, {"steps": 20}, 1.1),
        (hop_skip_jump, math.inf, {"p": math.inf, "steps": 20}, 1.1),
        (evasive_carlini_wagner, 2, {"weight": 0.0, "searches": 9}, 1.05),
        (subspace_deepfool, 2, {"dim": 16}, 1.06),
    ],
)
def test_they_find_the_distance_to_a_linear_boundary(attack, p, options, excess):
    model, inputs, targets, distances = linear()
    found = attack(model, inputs, targets, **options)
    assert (model(found).argmax(1) != targets).all()
    share = length(found - inputs, p) / distances[p]
    assert share.min() > 0.999
    assert share.median() < excess


def network():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    inputs = torch.rand(8, 1, 4, 4)
    model[3].bias.data -= model(inputs).mean(0).detach()  # so that there are several classes
    return model, inputs, model(inputs).argmax(1)


@pytest.mark.parametrize(
    ("attack", "options", "other"),
    [
        (deepfool, {"steps": 20}, foolbox.attacks.L2DeepFoolAttack(steps=20)),
        (deepfool, {"p": math.inf}, foolbox.attacks.LinfDeepFoolAttack(steps=50)),
        (
            carlini_wagner,
            {"steps": 40, "searches": 5, "initial_const": 0.1, "confidence": 0.01},
            foolbox.attacks.L2CarliniWagnerAttack(
                steps=40, binary_search_steps=5, initial_const=0.1, confidence=0.01
            ),
        ),
        (boundary, {"steps": 50}, foolbox.attacks.BoundaryAttack(steps=50)),
        (hop_skip_jump, {"steps": 4}, foolbox.attacks.HopSkipJumpAttack(steps=4)),
    ],
)
def test_they_are_foolbox_s(attack, options, other):
    model, inputs, targets = network()
    # foolbox's HopSkipJump takes shorter steps the larger the batch.
    inputs, targets = (inputs[:1], targets[:1]) if attack is hop_skip_jump else (inputs, targets)
    found = attack(model, inputs, targets, **options)
    attacked = foolbox.PyTorchModel(model, bounds=(0, 1), device=inputs.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with evaluating(model):
        torch.manual_seed(0)
        expected = other.run(attacked, inputs.clone(), targets)
    broken = model(expected).argmax(1) != targets
    assert broken.any()
    torch.testing.assert_close(found[broken], expected[broken], rtol=0, atol=1e-5)
    assert torch.equal(found[~broken], inputs[~broken])


def test_hop_skip_jump_takes_no_shorter_steps_in_a_larger_batch():
    model, inputs, targets, distances = linear()
    inputs, targets = inputs[:1], targets[:1]
    shares = [
        length(hop_skip_jump(model, x, y, steps=5) - x).median() / distances[2][0]
        for x, y in ((inputs, targets), (inputs.repeat(64, 1, 1, 1), targets.repeat(64)))
    ]
    assert shares[1] < 1.2 * shares[0]


class Constant(nn.Module):
    """Always the first class, except for a black image."""

    def forward(self, inputs):
        black = (inputs.flatten(1).amax(1) == 0).to(inputs.dtype)
        return torch.stack([1 - black, black], 1) + 0 * inputs.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("attack", [deepfool, carlini_wagner, boundary, hop_skip_jump])
def test_what_cannot_be_broken_stays_as_it_is(attack):
    inputs = 0.25 + torch.rand(3, 1, 4, 4) / 2
    targets = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(attack(Constant(), inputs, targets, steps=5), inputs)


@pytest.mark.parametrize("attack", [boundary, hop_skip_jump])
def test_starts_that_are_not_found_do_not_stop_the_others(attack, monkeypatch):
    blend = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack
    kept = blend.run

    def run(self, model, inputs, labels):
        found = kept(self, model, inputs, labels)
        found[1] = inputs[1]
        return found

    monkeypatch.setattr(blend, "run", run)
    model, inputs, targets, _ = linear(samples=4)
    found = attack(model, inputs, targets, steps=5)
    broken = model(found).argmax(1) != targets
    assert broken.tolist() == [True, False, True, True]
    assert torch.equal(found[1], inputs[1])


@pytest.mark.parametrize("dim", [32, 8])
def test_in_a_random_subspace_the_distance_grows_with_the_square_root(dim):
    model, inputs, targets, distances = linear(samples=8, size=64)
    shares = []
    for seed in range(30):
        generator = torch.Generator(inputs.device).manual_seed(seed)
        found = subspace_deepfool(model, inputs, targets, dim, overshoot=0.0, generator=generator)
        broken = model(found).argmax(1) != targets
        shares.append((distances[2] / length(found - inputs))[broken].square().mean())
        assert shares[-1] < 1
    # The mean square of the share of the normal that lies in the subspace.
    assert torch.stack(shares).mean().item() == pytest.approx(dim / 64, rel=0.25)


def test_a_subspace_is_one_for_the_whole_batch():
    model, inputs, targets, _ = linear(samples=12)
    found = subspace_deepfool(model, inputs, targets, 3) - inputs
    values = torch.linalg.svdvals(found.flatten(1).double())
    assert values[3] < 1e-5 * values[0]
