"""What a training step with each penalty costs, in plain training steps."""

import pytest
import torch
from torch.nn import functional as F

import robustkern
from robustkern import CURE, SGR, CovarianceFunction, GradientPenalty
from robustkern.reference import authors_cure_backward
from robustkern.training.models import ResNet

SAMPLES = 48
GN = GradientPenalty(0.1, p=2, power=2)


def sgr():
    return SGR(0.1, CovarianceFunction(3, 32, 32))


# The penalty of each method, and the plain steps it may cost.
FIRST_ORDER = {
    "CURE": (CURE(0.1, h=0.5), 4.1),
    "CURE anchored": (CURE(0.1, h=0.5, anchored=True), 3.1),
    "GN": (GN, 2.1),
    "TV": (GradientPenalty(0.1), 2.1),
    "SGR": (sgr(), 2.3),
    "CURE + GN + SGR": (CURE(0.1, h=0.5) + GN + sgr(), 4.5),
}


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = ResNet(24, (2, 2, 2, 2))
    inputs = torch.rand(SAMPLES, 3, 32, 32)
    return model, inputs, torch.randint(10, (SAMPLES,))


def test_step(network, compare, request):
    model, inputs, targets = network

    def method(run):
        def step():
            model.zero_grad()
            run()

        return step

    def double_backward(penalty):
        loss = F.cross_entropy(model(inputs), targets)
        (loss + penalty(model, inputs, targets)).backward()

    def plain():
        F.cross_entropy(model(inputs), targets).backward()

    for name, (penalty, _) in FIRST_ORDER.items():  # correct, before the clock starts
        model.zero_grad()
        step = robustkern.backward(model, inputs, targets, penalty)
        state = penalty.training
        exact = penalty.eval()(model, inputs, targets)
        penalty.train(state)
        torch.testing.assert_close(step.penalty, exact.detach(), rtol=1e-3, atol=1e-6, msg=name)
        assert all(p.grad.isfinite().all() for p in model.parameters())

    cure = FIRST_ORDER["CURE"][0]
    methods = {
        "plain": plain,
        **{
            name: lambda p=penalty: robustkern.backward(model, inputs, targets, p)
            for name, (penalty, _) in FIRST_ORDER.items()
        },
        "CURE double backward": lambda: double_backward(cure),
        "GN double backward": lambda: double_backward(GN),
        "CURE authors": lambda: authors_cure_backward(model, inputs, targets, weight=0.1, h=0.5),
    }
    compare(
        f"step|ResNet width 24, 2-2-2-2|N={SAMPLES}, 3x32x32|float32|cpu",
        {name: method(run) for name, run in methods.items()},
        baseline="plain",
        rounds=15,
        limits={name: limit for name, (_, limit) in FIRST_ORDER.items()},
    )
