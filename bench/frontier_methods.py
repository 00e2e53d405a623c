"""The methods that bench/frontier.py compares, the strengths it tries, and their trainers."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.evaluation import evaluating
from robustkern.training.adversarial import Augmentation, adversarial_training
from robustkern.training.data import Dataset
from robustkern.training.models import Normalize, ResNet, cnn, pixel_statistics
from robustkern.training.naive import NaiveCURETrainer
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.schedules import Schedule
from robustkern.training.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from grad_align import SHIFT as GRAD_ALIGN_SHIFT
from grad_align import GradAlign


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: `penalties` and `attack` of a strength, as the command line knows them.

    The family is `plain`; `penalty`, by this library's first-order passes; `naive`, the same by
    double backward; `attack`, training on attacked images; or `both` of penalty and attack.
    """

    name: str
    family: str
    penalties: Callable[[float], list[dict[str, Any]]] = lambda strength: []
    attack: Callable[[float], dict[str, Any] | None] = lambda strength: None
    options: Callable[[float], dict[str, Any]] = lambda strength: {}
    grid: tuple[float, ...] = (0.0,)
    trainer: type[Trainer] = Trainer
    naive_of: str | None = None
    grad_align: bool = False
    compiled: bool = False  # its step alone is measured: it trains as the method without
    epochs: int | None = None  # the setting's, if None


@dataclass(frozen=True)
class Setting:
    """A data set, a network and the sizes of the run."""

    set: str
    train: int
    validation: int
    test: int
    clean_epochs: int
    epochs: int
    seeds: int
    eps: tuple[float, ...]
    main_eps: float
    combined_eps: float  # of an attack beside a penalty, whose weight is the strength
    margin: float  # of clean accuracy on validation images, which a strength may cost
    step_length: float  # CURE's h
    cure_norm: bool
    grids: dict[str, tuple[float, ...]] = field(default_factory=dict)
    augment: bool = False
    batch_size: int = 64
    lr: float = 1e-3
    search_steps: int = 10
    pgd_steps: int = 20
    restarts: int = 2
    apgd_images: int = 300
    apgd_steps: int = 50
    timing_rounds: int = 12

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.train // self.batch_size)


MNIST = Setting(
    set="mnist", train=5_000, validation=1_000, test=600, clean_epochs=3, epochs=3, seeds=3,
    eps=(0.1, 0.15, 0.2), main_eps=0.15, combined_eps=0.2, margin=0.02,
    step_length=2.8, cure_norm=True,
    grids={
        "weight decay": (1e-3, 3e-3, 1e-2, 3e-2),
        "cure": (0.5, 1.0, 2.0, 4.0),
        "cure lazy": (0.25, 0.5, 1.0, 2.0),
        "gn": (1.0, 3.0, 10.0, 30.0),
        "tv": (100.0, 300.0, 1000.0, 3000.0),
        "tv l1": (0.05, 0.1, 0.2, 0.4),
        "tv l1 shifted": (0.0375, 0.075, 0.15, 0.3),
        "tv + lipschitz": (3.0, 6.0, 12.0, 25.0),
        "sgr": (100.0, 300.0, 1000.0, 3000.0),
        "sgr of pgd": (10.0, 30.0, 100.0, 300.0),
        "llr": (0.25, 0.5, 1.0, 2.0),
        "attack": (0.1, 0.15, 0.2, 0.3),
        "trades": (0.03, 0.05, 0.1, 0.15),
        "cure combined": (0.02, 0.05, 0.1, 0.2),
        "tv combined": (0.01, 0.03, 0.1, 0.3),
        "tv l1 combined": (0.009375, 0.01875, 0.0375, 0.075),
        "sgr combined": (0.3, 1.0, 3.0, 10.0),
        "grad align": (0.1, 0.2, 0.5, 1.0),
    },
)  # fmt: skip
CIFAR10 = Setting(
    set="cifar10", train=6_000, validation=1_000, test=1_000, clean_epochs=8, epochs=4, seeds=3,
    eps=(1 / 255, 2 / 255, 4 / 255), main_eps=4 / 255, combined_eps=4 / 255,
    margin=0.05, step_length=0.5, cure_norm=False, augment=True,
    grids={
        "weight decay": (1e-4, 3e-4, 1e-3, 3e-3),
        "cure": (0.03, 0.1, 0.3, 1.0),
        "cure lazy": (0.03, 0.1, 0.3, 1.0),
        "gn": (0.03, 0.1, 0.3, 1.0),
        "tv": (0.1, 0.3, 1.0, 3.0),
        "tv l1": (0.004, 0.008, 0.016, 0.032),
        "tv l1 shifted": (1 / 255, 2 / 255, 4 / 255, 8 / 255),
        "tv + lipschitz": (0.1, 0.3, 1.0, 3.0),
        "sgr": (1.0, 10.0, 100.0, 1000.0),
        "sgr of pgd": (1.0, 10.0, 100.0, 1000.0),
        "llr": (1.0, 2.0, 4.0, 8.0),
        "attack": (1 / 255, 2 / 255, 4 / 255, 8 / 255),
        "trades": (1 / 255, 2 / 255, 4 / 255, 8 / 255),
        "cure combined": (0.01, 0.03, 0.1, 0.3),
        "tv combined": (0.03, 0.1, 0.3, 1.0),
        "tv l1 combined": (0.25 / 255, 0.5 / 255, 1 / 255, 2 / 255),
        "sgr combined": (1.0, 10.0, 100.0, 1000.0),
        "grad align": (0.1, 0.2, 0.5, 1.0),
    },
)  # fmt: skip
SETTINGS = {setting.set: setting for setting in (MNIST, CIFAR10)}
# Of CURE's finite difference, longer than the automatic one.
LONGER_SHIFT = {"mnist": 0.03, "cifar10": 0.001}


class ExactTrainer(Trainer):
    """Trains with the penalty as a term of the loss: double backward."""

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(self.model(inputs), targets)
        with evaluating(self.model) if self.batch_norm == "eval" else contextlib.nullcontext():
            penalty = self.penalty.penalty(self.model, inputs, targets)
        (loss + penalty).backward()
        return loss.detach(), penalty.detach()


def penalty(name: str, **more: Any) -> Callable[[float], list[dict[str, Any]]]:
    """A penalty whose weight is the strength."""
    return lambda strength: [{"name": name, "weight": str(strength), **more}]


def methods(setting: Setting) -> list[Method]:
    """Every method, each with as many strengths as the others but those that have none."""
    eps, grids = setting.main_eps, setting.grids

    def attack(name: str, **more: Any) -> Callable[[float], dict[str, Any]]:
        return lambda strength: {"name": name, "eps": strength, **more}

    def tv_and_lipschitz(strength: float) -> list[dict[str, Any]]:
        return [
            {"name": "tv", "weight": str(strength)},
            {"name": "lipschitz", "weight": str(0.1 * strength)},
        ]

    def fixed(name: str, **more: Any) -> Callable[[float], dict[str, Any]]:
        return lambda strength: {"name": name, "eps": setting.combined_eps, **more}

    def shifted(shift: float) -> Callable[[float], dict[str, Any]]:
        return lambda strength: {"shift": shift}

    formula = {"h": str(setting.step_length), "norm": setting.cure_norm}
    cure, sgr = penalty("cure", **formula), penalty("sgr", standardize="data")
    gn, tv, tv_l1 = penalty("gn"), penalty("tv"), penalty("tv", p=1.0)
    cure_seldom = penalty("anchored-cure", **formula, every=8)
    tv_seldom, tv_rarely = (penalty("tv", p=1.0, every=every) for every in (2, 4))
    # For TV half of eps, which a weight can meet that is this times a power of two.
    far, half = LONGER_SHIFT[setting.set], eps / 2
    more, many = setting.epochs + 1, round(5 / 3 * setting.epochs)  # where a step is cheap
    found = [
        Method("no penalty", "plain"),
        Method(
            "weight decay", "plain", options=lambda strength: {"weight_decay": strength},
            grid=grids["weight decay"],
        ),
        Method("CURE, double backward", "naive", cure, grid=grids["cure"], trainer=ExactTrainer,
               naive_of="CURE"),
        Method("CURE", "penalty", cure, grid=grids["cure"]),
        Method("CURE, bfloat16", "penalty", cure,
               options=lambda strength: {"precision": "bfloat16"}, grid=grids["cure"]),
        Method("CURE, compiled", "penalty", cure, grid=grids["cure"], compiled=True),
        Method(f"CURE, shift {far:g}", "penalty", cure, options=shifted(far), grid=grids["cure"]),
        Method("CURE anchored", "penalty", penalty("anchored-cure", **formula), grid=grids["cure"]),
        Method(f"CURE anchored, every 2nd step, shift {far:g}", "penalty",
               penalty("anchored-cure", **formula, every=2), options=shifted(far),
               grid=grids["cure lazy"]),
        Method("CURE, every 2nd step", "penalty", penalty("cure", **formula, every=2),
               grid=grids["cure lazy"]),
        Method("CURE, every 4th step", "penalty", penalty("cure", **formula, every=4),
               grid=grids["cure lazy"]),
        Method("GN, double backward", "naive", gn, grid=grids["gn"], trainer=ExactTrainer,
               naive_of="GN"),
        Method("GN", "penalty", gn, grid=grids["gn"]),
        Method("TV, p=2", "penalty", tv, grid=grids["tv"]),
        Method("TV, p=1", "penalty", tv_l1, grid=grids["tv l1"]),
        Method(f"TV, p=1, shift {half:.2g}", "penalty", tv_l1, options=shifted(half),
               grid=grids["tv l1 shifted"]),
        Method("TV + Lipschitz", "penalty", tv_and_lipschitz, grid=grids["tv + lipschitz"]),
        Method("SGR", "penalty", sgr, grid=grids["sgr"]),
        Method("SGR of PGD, every 4th step", "penalty",
               penalty("sgr", standardize="data", source="pgd", attack_eps=eps, update_every=4),
               grid=grids["sgr of pgd"]),
        Method("LLR", "penalty", penalty("llr", eps=eps), grid=grids["llr"]),
        Method("FGSM-RS", "attack", attack=attack("fgsm-rs"), grid=grids["attack"]),
        Method(f"FGSM-RS, {many} epochs", "attack", attack=attack("fgsm-rs"),
               grid=grids["attack"], epochs=many),
        Method("PGD-2", "attack", attack=attack("pgd", steps=2), grid=grids["attack"]),
        Method(f"PGD-2, {many} epochs", "attack", attack=attack("pgd", steps=2),
               grid=grids["attack"], epochs=many),
        Method("PGD-3", "attack", attack=attack("pgd", steps=3), grid=grids["attack"]),
        Method("PGD-7", "attack", attack=attack("pgd", steps=7), grid=grids["attack"]),
        Method("PGD-10", "attack", attack=attack("pgd", steps=10), grid=grids["attack"]),
        Method("TRADES", "attack", attack=attack("trades"), grid=grids["trades"]),
        Method("FGSM-RS + CURE", "both", cure, fixed("fgsm-rs"), grid=grids["cure combined"]),
        Method(f"FGSM-RS + CURE anchored, every 8th step, shift {far:g}", "both", cure_seldom,
               fixed("fgsm-rs"), shifted(far), grids["cure combined"]),
        Method(f"FGSM-RS + TV, p=1, every 2nd step, shift {half:.2g}", "both", tv_seldom,
               fixed("fgsm-rs"), shifted(half), grids["tv l1 combined"]),
        *(
            Method(f"FGSM-RS + TV, p=1, every {ordinal} step, shift {half:.2g}, {epochs} epochs",
                   "both", seldom, fixed("fgsm-rs"), shifted(half), grids["tv l1 combined"],
                   epochs=epochs)
            for ordinal, seldom, epochs in (
                ("2nd", tv_seldom, more), ("4th", tv_rarely, more), ("2nd", tv_seldom, many)
            )
        ),
        Method("FGSM-RS + GradAlign", "both", attack=fixed("fgsm-rs"), grid=grids["grad align"],
               grad_align=True),
        Method("FGSM-RS + SGR", "both", sgr, fixed("fgsm-rs"), grid=grids["sgr combined"]),
        Method("PGD-7 + TV", "both", tv, fixed("pgd", steps=7), grid=grids["tv combined"]),
    ]  # fmt: skip
    if setting.cure_norm:  # the authors' structure has the norm alone
        authors = Method(
            "CURE, authors' structure", "naive", cure, grid=grids["cure"],
            trainer=NaiveCURETrainer, naive_of="CURE",
        )  # fmt: skip
        found.insert(2, authors)
    return found


def network(data: Dataset) -> nn.Module:
    """A small network, behind its normalization."""
    body = (
        cnn(data.shape, data.classes, width=16)
        if data.shape[0] == 1
        else ResNet(12, (1, 1, 1), data.shape[0], data.classes)
    )
    return nn.Sequential(Normalize(*pixel_statistics(data.x_train)), body)


def trainer(
    method: Method, strength: float, model: nn.Module, data: Dataset, setting: Setting, seed: int
) -> Trainer:
    """A trainer of `model`, which it changes."""
    augmentation, beta = adversarial_training(method.attack(strength), data.shape)
    options = {
        "batch_size": setting.batch_size,
        "lr": Schedule(((0, setting.lr),)),
        "crop": 4 if setting.augment else 0,
        "flip": setting.augment,
        "seed": seed,
        "augmentation": augmentation,
        "trades_beta": beta,
        **method.options(strength),
    }
    penalty = ScheduledPenalty(
        method.penalties(strength), data.shape, model=model, images=data.x_train
    )
    if method.grad_align:
        attack = options["augmentation"]
        options["augmentation"] = _aligned(penalty, strength, setting.combined_eps, attack)
        options["shift"] = GRAD_ALIGN_SHIFT
    if method.compiled:
        model = torch.compile(model, dynamic=False)
    return method.trainer(model, data, penalty, **options)


def _aligned(
    penalty: ScheduledPenalty, weight: float, eps: float, attack: Augmentation
) -> Augmentation:
    """The attack, after which the penalty is that of the images before it."""

    def augmentation(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        penalty.penalty = GradAlign(weight, inputs, eps)
        return attack(model, inputs, targets)

    return augmentation
