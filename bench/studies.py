"""What bench/experiments.py trains: the studies, with their variants, strengths and seeds."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from frontier_methods import CIFAR10, MNIST, ExactTrainer, Method, Setting, penalty
from torch import Tensor, fx, nn
from torch.nn import functional as F

from robustkern.training.adversarial import pgd_augmentation
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.trainer import Trainer

# In the place of ReLU. This softplus differs from it within a few tenths of zero alone.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "ReLU": (F.relu, {}),
    "GELU": (F.gelu, {}),
    "softplus": (F.softplus, {"beta": 10.0}),
}


@dataclass(frozen=True)
class Variant:
    """A way to fine-tune, each of whose strengths is trained on so many seeds.

    Clamped, the network takes pixels outside [0, 1] for the nearest inside, so that the shifted
    points of a penalty are images too.
    """

    method: Method
    activation: str = "ReLU"
    seeds: int = 3
    clamped: bool = False

    @property
    def name(self) -> str:
        return self.method.name


@dataclass(frozen=True)
class Study:
    """Variants that start from the same clean networks, of a seed and an activation."""

    setting: Setting
    variants: tuple[Variant, ...]
    attacked: int  # of the held-out images
    each_epoch: bool = False  # measure after every epoch, not only the last
    explained: bool = False  # measure the penalty's gradients in the clean networks


class Clamp(nn.Module):
    """To [0, 1]; the gradient passes at both ends, where most pixels of MNIST are."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.clamp(0, 1)


class _Tracer(fx.Tracer):
    """Sees the ReLU within its module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.ReLU) and super().is_leaf_module(m, module_qualified_name)


def activated(model: nn.Module, activation: str) -> nn.Module:
    """The same parameters with another activation in the place of each ReLU."""
    if activation == "ReLU":
        return model
    function, options = ACTIVATIONS[activation]
    graph = _Tracer().trace(model)
    for node in graph.nodes:
        if node.target is F.relu:
            node.target, node.args, node.kwargs = function, node.args[:1], options
    return fx.GraphModule(model, graph)


def _scaled(h: float, usual: float, power: int, **more: Any) -> Callable[[float], Any]:
    """CURE of another h, at the weight with which a small h would give the same penalty."""
    return lambda strength: [
        {"name": "cure", "weight": str(strength * (usual / h) ** power), "h": str(h), **more}
    ]


def _fgsm(eps: float) -> dict[str, Any]:
    """FGSM as it was first: no random start."""
    return {"augmentation": pgd_augmentation(eps, steps=1, step_size=eps, random_start=False)}


def _fgsm_rs(eps: float) -> dict[str, Any]:
    return {"name": "fgsm-rs", "eps": eps}


def batch_statistics() -> Study:
    """CURE by batch statistics and in eval mode, by first order and by double backward."""
    setting = dataclasses.replace(
        CIFAR10, grids={}, train=2_000, clean_epochs=8, epochs=3, eps=(2 / 255, 4 / 255), test=1
    )
    cure = penalty("cure", h="0.5")
    variants = []
    for activation in ACTIVATIONS:
        # What takes most of the time has fewer weights and seeds.
        relu = activation == "ReLU"
        seeds = 3 if relu else 2
        plain = Method(f"{activation}, no penalty", "plain")
        variants.append(Variant(plain, activation, seeds))
        for way, kind in (("first order", None), ("double backward", ExactTrainer)):
            for mode in ("batch", "eval"):
                method = Method(
                    f"{activation}, {way}, {mode}", "naive" if kind else "penalty", cure,
                    options=lambda strength, mode=mode: {"batch_norm": mode},
                    grid=(0.1, 0.3) if relu and not kind else (0.1,),
                    **({"trainer": kind} if kind else {}),
                )  # fmt: skip
                variants.append(Variant(method, activation, seeds if relu or not kind else 1))
    for at in (0.001, 0.003):
        method = Method(
            f"ReLU, first order, batch, shift {at:g}", "penalty", cure, grid=(0.1,),
            options=lambda strength, at=at: {"shift": at},
        )  # fmt: skip
        variants.append(Variant(method))
    authors = Method(
        "ReLU, authors' structure", "naive", penalty("cure", h="0.5", norm=True), grid=(0.1,),
        trainer=NaiveCURETrainer,
    )  # fmt: skip
    variants.append(Variant(authors, seeds=2))
    return Study(setting, tuple(variants), attacked=250, explained=True)


def cure() -> Study:
    """What CURE is made of, on MNIST."""
    h, grid = MNIST.step_length, (0.5,)
    rise, usual = f"0:0,{MNIST.epochs}:{h}", {"h": str(h), "norm": True}
    specs = {
        "full": penalty("cure", **usual),
        "anchored": penalty("anchored-cure", **usual),
        **{f"h {other}": _scaled(other, h, 1, norm=True) for other in (0.7, 1.4, 5.6)},
        "h from 0": penalty("cure", h=rise, norm=True),
        "weight from 0": lambda strength: [
            {"name": "cure", "weight": f"0:0,{MNIST.epochs}:{strength}", **usual}
        ],
        "gradient": penalty("cure", **usual, direction="gradient"),
        "gaussian": penalty("cure", **usual, direction="gaussian"),
        "gaussian, 2 samples": penalty("cure", **usual, direction="gaussian", samples=2),
        **{
            f"half sign, half {other}": lambda strength, other=other: [
                {"name": "cure", "weight": str(strength / 2), **usual, "direction": direction}
                for direction in ("sign", other)
            ]
            for other in ("gradient", "gaussian")
        },
        **{f"every {k}": penalty("cure", **usual, every=k) for k in (2, 4, 8)},
        "anchored, every 2": penalty("anchored-cure", **usual, every=2),
    }
    methods = [Method("no penalty", "plain")]
    methods += [Method(name, "penalty", each, grid=grid) for name, each in specs.items()]
    shifts = {
        f"{name}, shift {at:g}": (name, {"shift": at})
        for name in ("full", "anchored")
        for at in (0.003, 0.01, 0.03, 0.1)
    }
    options = {
        **shifts,
        "full, bfloat16": ("full", {"precision": "bfloat16"}),
        "anchored, every 2, shift 0.03": ("anchored, every 2", {"shift": 0.03}),
    }
    methods += [
        Method(name, "penalty", specs[of], options=lambda strength, more=more: more, grid=grid)
        for name, (of, more) in options.items()
    ]
    setting = dataclasses.replace(MNIST, grids={}, test=1)
    return Study(setting, tuple(Variant(method, seeds=2) for method in methods), attacked=500)


def cure_cifar10() -> Study:
    """The same on reduced CIFAR-10, fewer of them."""
    both, one = (0.1, 0.3), (0.1,)
    specs = {
        "full": (penalty("cure", h="0.5"), both),
        "anchored": (penalty("anchored-cure", h="0.5"), both),
        "h 0.25": (_scaled(0.25, 0.5, 2), one),
        "h 1": (_scaled(1.0, 0.5, 2), one),
        "gradient": (penalty("cure", h="0.5", direction="gradient"), one),
        "gaussian": (penalty("cure", h="0.5", direction="gaussian"), one),
        "every 2": (penalty("cure", h="0.5", every=2), both),
        "every 4": (penalty("cure", h="0.5", every=4), both),
    }
    methods = [Method("no penalty", "plain")]
    methods += [Method(name, "penalty", each, grid=grid) for name, (each, grid) in specs.items()]
    # Of the norm, which moves every image as far.
    norm = penalty("cure", h="0.5", norm=True)
    methods.append(Method("norm", "penalty", norm, grid=one))
    methods += [
        Method(
            f"norm, shift {at:g}", "penalty", norm,
            options=lambda strength, at=at: {"shift": at}, grid=one,
        )
        for at in (0.001, 0.003)
    ]  # fmt: skip
    variants = tuple(Variant(method, seeds=2) for method in methods)
    return Study(batch_statistics().setting, variants, attacked=250)


def combined() -> Study:
    """FGSM-RS and, beside it, what costs little."""
    eps = MNIST.combined_eps
    formula = {"h": str(MNIST.step_length), "norm": True}
    auto: dict[str, Any] = {}
    specs = {
        "CURE anchored, every 8": ({"every": 8}, auto, (0.02, 0.1)),
        "CURE anchored, every 8, shift 0.03": ({"every": 8}, {"shift": 0.03}, (0.02, 0.1, 0.3)),
        "CURE anchored, every 4, shift 0.03": ({"every": 4}, {"shift": 0.03}, (0.05, 0.2)),
        "CURE anchored, shift 0.03": ({}, {"shift": 0.03}, (0.05, 0.2)),
    }
    attack = {"attack": lambda strength: {"name": "fgsm-rs", "eps": eps}}
    methods = [
        Method("no penalty", "plain"),
        Method("FGSM-RS", "attack", **attack),
        Method(
            "FGSM-RS, eps 0.3", "attack", attack=lambda strength: {"name": "fgsm-rs", "eps": 0.3}
        ),
    ]
    methods += [
        Method(
            f"PGD-{steps}", "attack",
            attack=lambda strength, steps=steps: {"name": "pgd", "eps": eps, "steps": steps},
        )
        for steps in (2, 7)
    ]  # fmt: skip
    methods += [
        Method(
            f"FGSM-RS + {name}", "both", penalty("anchored-cure", **formula, **more),
            options=lambda strength, more=options: more, grid=grid, **attack,
        )
        for name, (more, options, grid) in specs.items()
    ]  # fmt: skip
    tv: list[tuple[float, dict[str, Any], tuple[float, ...]]] = [
        (0.075, {}, (0.01, 0.02, 0.05, 0.1)),
        (0.15, {}, (0.02, 0.05)),
        (0.075, {"every": 2}, (0.02, 0.05)),
        (0.075, {"every": 4}, (0.02, 0.05)),
    ]
    methods += [
        Method(
            ", ".join([f"FGSM-RS + TV, p=1, shift {at:g}", *(f"every {k}" for k in more.values())]),
            "both", penalty("tv", p=1.0, **more),
            options=lambda strength, at=at: {"shift": at}, grid=grid, **attack,
        )
        for at, more, grid in tv
    ]  # fmt: skip
    setting = dataclasses.replace(MNIST, grids={}, test=1)
    return Study(setting, tuple(Variant(method, seeds=2) for method in methods), attacked=500)


def overfitting() -> Study:
    """One-step training at an eps at which it collapses, and what may stop it."""
    eps = 0.3
    setting = dataclasses.replace(
        MNIST, grids={}, test=1, epochs=8, eps=(eps,), main_eps=eps, combined_eps=eps
    )
    formula = {"h": str(MNIST.step_length), "norm": True}
    # Of each, a weight at the lower end of what bench/frontier.py searches, and one further up.
    specs = {
        "CURE": (penalty("cure", **formula), (0.25, 1.0)),
        "anchored CURE, every 2": (penalty("anchored-cure", **formula, every=2), (0.25, 1.0)),
        "GN": (penalty("gn"), (10.0, 100.0)),
        "TV, p=1": (penalty("tv", p=1.0), (0.05, 0.2)),
        "LLR": (penalty("llr", eps=eps), (1.0, 4.0)),
    }
    grad_align = (0.2, 1.0)
    attack = {
        "FGSM": {"options": lambda strength: _fgsm(eps)},
        "FGSM-RS": {"attack": lambda strength: _fgsm_rs(eps)},
    }
    methods = [
        Method("PGD-7", "attack", attack=lambda strength: {"name": "pgd", "eps": eps, "steps": 7})
    ]
    for name, how in attack.items():
        # All where the start is random, as people train; without one, CURE at the larger weight.
        first = 1 if name == "FGSM" else 0
        methods.append(Method(name, "attack", **how))
        methods += [
            Method(f"{name} + {other}", "both", each, grid=grid[first:], **how)
            for other, (each, grid) in specs.items()
            if name == "FGSM-RS" or "CURE" in other
        ]
        methods.append(
            Method(f"{name} + GradAlign", "both", grid=grad_align[first:], grad_align=True, **how)
        )
    variants = tuple(Variant(method, seeds=2) for method in methods)
    return Study(setting, variants, attacked=300, each_epoch=True)


def shift() -> Study:
    """TV with p=1 from a small shift to one of eps, where it is FGSM adversarial training.

    A strength is lambda, and lambda eps the weight. `robustkern.backward` weights the shifted
    gradients by a power of two, so that the shifts that it can meet are these.
    """
    eps = MNIST.main_eps
    variants = [Variant(Method("no penalty", "plain"), seeds=2)]
    for radius in (eps, 0.2):
        fgsm = Method(
            f"FGSM, eps {radius:g}", "attack", options=lambda strength, r=radius: _fgsm(r)
        )
        start = Method(
            f"FGSM-RS, eps {radius:g}", "attack", attack=lambda strength, r=radius: _fgsm_rs(r)
        )
        variants += [Variant(fgsm, seeds=2), Variant(start, seeds=2)]
    for clamped in (False, True):
        grid = (1.0,) if clamped else (0.5, 1.0, 2.0)
        shifts = {eps / 2**halvings: grid for halvings in (7, 4, 2, 1, 0, -1)}
        for at, strengths in {**shifts, 0.2: (0.2 / eps,)}.items():
            method = Method(
                f"TV, shift {at:.2g}" + ", clamped" * clamped, "penalty",
                lambda strength: [{"name": "tv", "p": 1.0, "weight": str(eps * strength)}],
                options=lambda strength, at=at: {"shift": at}, grid=strengths,
            )  # fmt: skip
            variants.append(Variant(method, seeds=2, clamped=clamped))
    setting = dataclasses.replace(MNIST, grids={}, test=1)
    return Study(setting, tuple(variants), attacked=500)


class CentralTrainer(Trainer):
    """First order by a central difference, at one pass more; for penalties at the inputs alone.

    The one-sided difference of `robustkern.backward` sees a piecewise linear network's kinks on one
    side of the inputs, this one those on both.
    """

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        samples = len(inputs)
        x = inputs.clone().requires_grad_()
        loss = F.cross_entropy(self.model(x), targets)
        loss.backward()
        gradient = (samples * x.grad).requires_grad_()
        value = self.penalty.penalty.value(gradient)
        (v,) = torch.autograd.grad(value, gradient)
        step = float(self.shift) / v.square().mean().sqrt()
        for side in (step, -step):
            moved = F.cross_entropy(self.model(inputs + side * v), targets)
            (samples / (2 * side) * moved).backward()
        return loss.detach(), value.detach()


def kinks() -> Study:
    """GN by double backward, which sees no kinks, and by first order on one side and on both."""
    gn, grid = penalty("gn"), (10.0,)
    ways: dict[str, dict[str, Any]] = {
        "double backward": {"trainer": ExactTrainer},
        "first order": {},
        **{
            f"first order, shift {at:g}": {"options": lambda strength, at=at: {"shift": at}}
            for at in (0.001, 0.003, 0.01)
        },
        **{
            f"central, shift {at:g}": {
                "trainer": CentralTrainer, "options": lambda strength, at=at: {"shift": at},
            }
            for at in (0.001, 0.01)
        },
    }  # fmt: skip
    smooth = ("double backward", "first order", "central, shift 0.001")
    variants = []
    for activation in ("ReLU", "softplus"):
        variants.append(Variant(Method(f"{activation}, no penalty", "plain"), activation))
        variants += [
            Variant(
                Method(f"{activation}, {way}", "penalty", gn, grid=grid, **how),
                activation,
                seeds=3 if activation == "ReLU" else 2,
            )
            for way, how in ways.items()
            if activation == "ReLU" or way in smooth
        ]
    setting = dataclasses.replace(MNIST, grids={}, test=1)
    return Study(setting, tuple(variants), attacked=500)


STUDIES = {
    "batch-statistics": batch_statistics,
    "cure": cure,
    "cure-cifar10": cure_cifar10,
    "overfitting": overfitting,
    "combined": combined,
    "shift": shift,
    "kinks": kinks,
}
