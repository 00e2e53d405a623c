"""What a training step with each penalty costs, in plain training steps."""

import time
from functools import partial

import pytest
import torch
from networks import VisionTransformer, resnet50
from torch.nn import functional as F

import robustkern
from robustkern import CURE, SGR, CovarianceFunction, GradientPenalty, reference
from robustkern.evaluation import pgd
from robustkern.reference import authors_cure_backward
from robustkern.training.models import ResNet, resnet18, wideresnet28x10

SAMPLES = 48
GN = GradientPenalty(0.1, p=2, power=2)


def sgr(size=32):
    return SGR(0.1, CovarianceFunction(3, size, size))


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


def test_step(network, compare, device):
    if device.type != "cpu":
        pytest.skip("a GPU has networks of its own, below")
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
    running, signs = CovarianceFunction(3, 32, 32), torch.randn(inputs.shape).sign()
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
        {
            **{name: method(run) for name, run in methods.items()},
            "SGR's covariance update alone": lambda: running.update(signs),
        },
        baseline="plain",
        rounds=15,
        limits={
            **{name: limit for name, (_, limit) in FIRST_ORDER.items()},
            "SGR's covariance update alone": 0.03,
        },
    )


def test_compiled_step(network, compare, device):
    if device.type != "cpu":
        pytest.skip("compiled networks are among a GPU's cases, below")
    eager, inputs, targets = network
    model = torch.compile(eager, dynamic=False)

    def plain(model):
        eager.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()

    def first_order(model, penalty):
        eager.zero_grad()
        return robustkern.backward(model, inputs, targets, penalty)

    limits = {"GN compiled": 2.2, "CURE compiled": 4.2}
    for penalty in (GN, FIRST_ORDER["CURE"][0]):  # correct, before the clock starts
        expected = first_order(eager, penalty)
        torch.testing.assert_close(
            first_order(model, penalty).penalty, expected.penalty, rtol=1e-3, atol=1e-6
        )
    compare(
        f"compiled step|ResNet width 24, 2-2-2-2|N={SAMPLES}, 3x32x32|float32|cpu",
        {
            "plain": lambda: plain(eager),
            "plain compiled": lambda: plain(model),
            "GN compiled": lambda: first_order(model, GN),
            "CURE": lambda: first_order(eager, FIRST_ORDER["CURE"][0]),
            "CURE compiled": lambda: first_order(model, FIRST_ORDER["CURE"][0]),
        },
        baseline="plain compiled",
        rounds=15,
        limits=limits,
    )


# On a GPU: the network, the height of its images, their number; the most important first.
NETWORKS = {
    "ResNet-18": (lambda: resnet18((3, 32, 32), 10), 32, 128),
    "ViT-B/16": (VisionTransformer, 224, 32),
    "ResNet-50": (resnet50, 224, 64),
    "WRN-28-10": (lambda: wideresnet28x10((3, 32, 32), 10), 32, 64),
    "ResNet-18, large batch": (lambda: resnet18((3, 32, 32), 10), 32, 512),
}
ROUNDS_S = 5.0  # for the rounds of one group


def cases(mode, *names):
    return [(name, precision, mode) for name in names for precision in ("bfloat16", "float32")]


FIRST, *REST = NETWORKS
CASES = [  # in order of importance: a compilation takes as long as many groups
    *cases("eager", FIRST),
    cases("compiled", FIRST)[0],
    *cases("eager", *REST),
    cases("compiled", FIRST)[1],
    *cases("compiled", *REST),
]


class Training:
    """A network and a batch on the GPU, and the ways to compute a step's gradient there."""

    def __init__(self, name, precision, device):
        make, self.size, samples = NETWORKS[name]
        torch.manual_seed(0)
        with device:
            self.model = make().to(memory_format=torch.channels_last)
            inputs = torch.rand(samples, 3, self.size, self.size)
            self.targets = torch.randint(10, (samples,))
        self.inputs = inputs.contiguous(memory_format=torch.channels_last)
        self.cure = CURE(0.1, h=0.5)
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=precision == "bfloat16"
        )

    def method(self, run):
        def step():
            self.model.zero_grad()
            with self.autocast():
                run()

        return step

    def eager(self):
        penalties = {
            "CURE": self.cure,
            "CURE anchored": CURE(0.1, h=0.5, anchored=True),
            "GN": GN,
            "TV": GradientPenalty(0.1),
            "SGR": sgr(self.size).to(self.inputs.device),
        }
        for penalty in penalties.values():
            self.check(penalty)
        return {
            "plain": lambda: self.plain(self.model),
            **{name: partial(self.first_order, self.model, p) for name, p in penalties.items()},
            "CURE authors": lambda: authors_cure_backward(
                self.model, self.inputs, self.targets, weight=0.1, h=0.5
            ),
            "CURE double backward": lambda: self.double_backward(self.cure),
            "GN double backward": lambda: self.double_backward(GN),
            "PGD-7 adversarial": self.adversarial,
        }

    def compiled(self):
        torch.compiler.reset()
        model = torch.compile(self.model, dynamic=False)
        exact = torch.compile(self.exact_cure, dynamic=False)

        def exact_cure():
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                exact(self.inputs.detach().requires_grad_()).backward()

        return {
            "plain": lambda: self.plain(self.model),
            "plain compiled": lambda: self.plain(model),
            "GN compiled": lambda: self.first_order(model, GN),
            "CURE compiled": lambda: self.first_order(model, self.cure),
            "CURE exact, compiled whole": exact_cure,
        }

    def plain(self, model):
        F.cross_entropy(model(self.inputs), self.targets).backward()

    def first_order(self, model, penalty):
        return robustkern.backward(model, self.inputs, self.targets, penalty)

    def double_backward(self, penalty):
        loss = F.cross_entropy(self.model(self.inputs), self.targets)
        (loss + penalty(self.model, self.inputs, self.targets)).backward()

    def adversarial(self):
        moved = pgd(self.model, self.inputs, self.targets, 8 / 255, steps=7)
        F.cross_entropy(self.model(moved), self.targets).backward()

    def exact_cure(self, x):
        """The loss and the exact penalty in plain PyTorch; both points hang on the one leaf x."""

        def loss_and_gradient(point):
            loss = F.cross_entropy(self.model(point), self.targets)
            (g,) = torch.autograd.grad(len(x) * loss, x, create_graph=True)
            return loss, g

        loss, g = loss_and_gradient(x)
        displacement = reference.perturb(torch.zeros_like(x), g.detach(), self.cure.h)
        _, shifted = loss_and_gradient(x + displacement.detach())
        return loss + self.cure.weight * reference.gradient_difference(shifted, g).mean()

    def check(self, penalty):
        """The step's penalty is that of plain differentiation, and its gradient finite."""
        self.model.zero_grad()
        with self.autocast():
            step = self.first_order(self.model, penalty)
            with torch.no_grad():
                value = penalty.eval()(self.model, self.inputs, self.targets)
        penalty.train()
        rtol = 5e-2 if step.outputs.dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(step.penalty, value, rtol=rtol, atol=1e-6)
        assert all(p.grad.isfinite().all() for p in self.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "precision", "mode"), CASES)
def test_step_on_a_gpu(name, precision, mode, device, compare, note, request):
    torch.backends.cudnn.benchmark = True
    training = Training(name, precision, device)
    samples, size = len(training.inputs), training.size
    group = f"step|{name}|N={samples}, 3x{size}x{size}|{precision}|{mode}|{device.type}"
    methods, seconds = {}, 0.0
    for method, run in getattr(training, mode)().items():
        step = training.method(run)
        try:
            step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
        except Exception as error:  # whatever the alternative fails with is its row
            training.model.train()
            torch.cuda.empty_cache()
            message = " ".join(str(error).split())[:300]
            note(group=group, method=method, error=f"{type(error).__name__}: {message}")
        else:
            methods[method] = step
            seconds += time.perf_counter() - start
    compare(
        group,
        methods,
        baseline="plain",
        rounds=max(2, min(10, int(ROUNDS_S / seconds))),
        warmup=1,
        precision=precision if precision == "float32" else "bfloat16 autocast",
        tf32=False,
        channels_last=True,
    )
