"""What attacks cost beyond the passes of the network that they are made of."""

import math

import pytest
import torch
from torch.nn import functional as F

from robustkern.evaluation import evaluating, lrc, pgd, spsa
from robustkern.training.models import ResNet

EPS, STEPS, DRAWS, CHUNK = 8 / 255, 20, 10, 256


@pytest.fixture
def network(request, device):
    """The network of the steps' benchmark, and inputs that it classifies right."""
    if device.type != "cpu":
        pytest.skip("limits are those of a CPU")
    torch.manual_seed(0)
    model = ResNet(24, (2, 2, 2, 2))
    inputs = torch.rand(4 if request.config.getoption("--smoke") else 128, 3, 32, 32)
    with evaluating(model), torch.no_grad():
        return model, inputs, model(inputs).argmax(1)


def group(attack, inputs):
    return f"attack|{attack}, ResNet width 24, 2-2-2-2|N={len(inputs)}, 3x32x32|float32|cpu"


def batches(model, attack):
    """What the attack returns, and the numbers of samples that it calls the model with."""
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    found = attack()
    hook.remove()
    return found, sizes


def test_pgd(network, compare):
    model, inputs, targets = network

    def attack():
        return pgd(model, inputs, targets, EPS, steps=STEPS)

    def passes():
        with evaluating(model):
            for _ in range(STEPS):
                point = inputs.clone().requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(point), targets), point)

    found, sizes = batches(model, attack)
    assert sizes == [len(inputs)] * STEPS
    assert (found - inputs).abs().max() <= EPS + 1e-6
    with evaluating(model), torch.no_grad():
        before, after = (F.cross_entropy(model(x), targets) for x in (inputs, found))
    assert after > before
    compare(
        group(f"PGD-{STEPS}", inputs),
        {"forward and input gradient": passes, "PGD": attack},
        baseline="forward and input gradient",
        rounds=5,
        warmup=0,
        limits={"PGD": 1.05},
    )


def test_spsa(network, compare):
    model, inputs, targets = network
    inputs, targets = inputs[:4], targets[:4]

    def attack():
        return spsa(model, inputs, targets, EPS, steps=1, directions=CHUNK // 8, chunk=CHUNK)

    found, sizes = batches(model, attack)
    assert sizes == [4, CHUNK, 4]  # clean, the estimate, what it led to
    assert (found - inputs).abs().max() <= EPS + 1e-6
    forwards(compare, model, inputs, "SPSA", attack, sizes)


def test_lrc(network, compare):
    model, inputs, targets = network

    def attack():
        return lrc(model, inputs, targets, EPS, draws=DRAWS)

    found, sizes = batches(model, attack)
    assert set(sizes[:-1]) == {len(inputs)}
    assert math.ceil(len(inputs) * DRAWS / 2) < sum(sizes) <= len(inputs) * (DRAWS + 1)
    assert found.min() >= 0
    assert found.max() <= 1
    forwards(compare, model, inputs, "LRC", attack, sizes)


def forwards(compare, model, inputs, name, attack, sizes):
    given = torch.rand(max(sizes), *inputs.shape[1:])

    def alone():
        with evaluating(model), torch.no_grad():
            for size in sizes:
                model(given[:size])

    compare(
        group(name, inputs),
        {"forward passes": alone, name: attack},
        baseline="forward passes",
        rounds=5,
        warmup=0,
        limits={name: 1.1},
    )
