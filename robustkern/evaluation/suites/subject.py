"""A network under evaluation, and the attacks on it: each is made once, for all that measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.samples import check_labels
from robustkern.evaluation.attacks import fgsm, pgd
from robustkern.evaluation.autoattack import apgd, autoattack, fab, square
from robustkern.evaluation.counting import Cost, metered
from robustkern.evaluation.evasive import evasive_carlini_wagner
from robustkern.evaluation.lrc import lrc
from robustkern.evaluation.minimal import boundary, carlini_wagner, deepfool, hop_skip_jump
from robustkern.evaluation.passes import adversarial_inputs, correct, outputs_of
from robustkern.evaluation.spsa import spsa
from robustkern.evaluation.subspace import subspace_deepfool

CALLER = "evaluate_networks"
TWIN = "PGD-20 of the twin"


def _towards(outputs: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, targets)


def _spsa(model: nn.Module, inputs: Tensor, targets: Tensor, eps: float, **options: Any) -> Tensor:
    """SPSA whose few steps can cross the ball, whatever its size."""
    return spsa(model, inputs, targets, eps, step_size=eps / 5, **options)


@dataclass(frozen=True)
class _Kind:
    """How an attack is called."""

    attack: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True  # takes eps; the others look for the nearest adversarial input
    seeded: bool = True  # takes a generator
    predicted: bool = False  # is told the predicted labels


_KINDS = {
    "FGSM": _Kind(fgsm, seeded=False),
    "PGD-7": _Kind(pgd, {"steps": 7}),
    "PGD-20": _Kind(pgd, {"steps": 20}),
    "PGD-100": _Kind(pgd, {"steps": 100}),
    "PGD-20 L2": _Kind(pgd, {"steps": 20, "p": 2}),
    "Targeted PGD-20": _Kind(pgd, {"steps": 20, "loss_fn": _towards}),
    TWIN: _Kind(pgd, {"steps": 20}),
    "APGD": _Kind(apgd),
    "FAB": _Kind(fab),
    "AutoAttack": _Kind(autoattack),
    "Square": _Kind(square),
    "SPSA": _Kind(_spsa),
    "LRC": _Kind(lrc),
    "DeepFool L2": _Kind(deepfool, sized=False, seeded=False, predicted=True),
    "DeepFool Linf": _Kind(deepfool, {"p": math.inf}, sized=False, seeded=False, predicted=True),
    "CW L2": _Kind(carlini_wagner, sized=False, seeded=False),
    "Evasive CW": _Kind(evasive_carlini_wagner, sized=False, seeded=False),
    "Boundary": _Kind(boundary, sized=False),
    "HopSkipJump": _Kind(hop_skip_jump, sized=False),
    "Subspace": _Kind(subspace_deepfool, sized=False),
}


@dataclass(frozen=True)
class Suite:
    """What an evaluation consists of.

    Attributes:
        name: of the suite.
        items: names of the measures, in the order in which they are taken.
        attacks: those of the item `attacks`, within the main radius.
        distances: those of the item `distances`.
        samples: for an attack's name the number of samples it is made on, the first ones; all of
            them for any other.
        curve_samples: the same for all attacks at another radius than the main one.
        options: for an attack's name its further options.
        libraries: that its attacks need.
        transfer: whether to try the attacks on each network on the others.
    """

    name: str
    items: tuple[str, ...]
    attacks: tuple[str, ...] = ()
    distances: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    curve_samples: int | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    transfer: bool = False


@dataclass(frozen=True)
class Attacked:
    """The first samples, what an attack made of them, and its cost for each of them."""

    inputs: Tensor
    targets: Tensor
    found: Tensor
    cost: Cost


class Subject:
    """A network, the samples it is tried on, and what attacks made of them.

    Args:
        model: the network.
        inputs: (N, C, H, W), in [0, 1].
        targets: (N,), the true labels.
        suite: which attacks are made, and on how many samples.
        eps: radii of the curves, in input units.
        radius: the main one.
        twin: a network trained like this one from another seed, if there is one.
        calibration: inputs and labels that are not among the samples.
        seed: of each attack.
        batch_size: samples per pass.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        suite: Suite,
        *,
        eps: tuple[float, ...],
        radius: float,
        twin: nn.Module | None,
        calibration: tuple[Tensor, Tensor] | None,
        seed: int,
        batch_size: int,
    ) -> None:
        self.model, self.twin, self.suite = model, twin, suite
        self.inputs, self.targets, self.calibration = inputs, targets, calibration
        self.eps, self.radius, self.seed, self.batch_size = eps, radius, seed, batch_size
        outputs = outputs_of(CALLER, model, inputs, batch_size, None)
        check_labels(CALLER, targets, outputs)
        self.predicted, self.classes = outputs.argmax(1), outputs.shape[1]
        # AutoAttack is made for four classes and more.
        self.attacks = tuple(
            name for name in suite.attacks if name != "AutoAttack" or self.classes > 3
        )
        self._kept: dict[str, Attacked] = {}
        self._used: dict[str, Cost] = {}
        self._fresh = Cost()

    def measure(self, item: Callable[[Subject], Any]) -> tuple[Any, Cost]:
        """Take a measure and its cost: that of its attacks, whoever made them, and its own."""
        self._used, self._fresh = {}, Cost()
        with metered(self._networks()) as total:
            value = item(self)
        own = (total - self._fresh).per(len(self.inputs))
        return value, sum(self._used.values(), own)

    def attacked(
        self,
        name: str,
        eps: float | None = None,
        *,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Attacked:
        """Make an attack, unless it is at hand.

        Args:
            name: of the attack, with which options may stand that follow a comma.
            eps: its radius; the main one when None.
            labels: (N,) that it is told, the same for a name; when None the true ones, and of
                DeepFool the predicted ones.
            options: of the attack, the same for a name.

        Returns:
            The samples, as many as the suite says, and the adversarial inputs.
        """
        radius = self.radius if eps is None else eps
        key = f"{name} at {radius}"
        if key not in self._kept:
            kind = name.split(",")[0]
            if labels is None:
                labels = self.predicted if _KINDS[kind].predicted else self.targets
            count = self.suite.samples.get(kind, len(self.inputs))
            if radius != self.radius and self.suite.curve_samples is not None:
                count = min(count, self.suite.curve_samples)
            inputs, targets = self.inputs[:count], self.targets[:count]
            source = self.twin if name == TWIN and self.twin is not None else self.model
            with metered(self._networks()) as cost:
                found = adversarial_inputs(
                    source,
                    inputs,
                    labels[:count],
                    self._attack(source, kind, radius, options),
                    batch_size=self.batch_size,
                )
            self._fresh += cost
            attacked = Attacked(inputs, targets, found.to(inputs), cost.per(len(inputs)))
            if radius != self.radius:  # of no use to another item
                self._used[key] = attacked.cost
                return attacked
            self._kept[key] = attacked
        self._used[key] = self._kept[key].cost
        return self._kept[key]

    def together(self, *names: str) -> list[Attacked]:
        """Attacks on the first samples, as many as all of them are made on."""
        attacks = [self.attacked(name) for name in names]
        count = min(len(attack.inputs) for attack in attacks)
        return [
            Attacked(each.inputs[:count], each.targets[:count], each.found[:count], each.cost)
            for each in attacks
        ]

    def right(self, found: Tensor) -> Tensor:
        """Whether each of the first samples is classified right as it is given here: (n,) bool."""
        targets = self.targets[: len(found)]
        return correct(CALLER, self.model, found, targets, None, self.batch_size, None)

    def predictions(self, found: Tensor) -> Tensor:
        """The predicted labels, (n,)."""
        return outputs_of(CALLER, self.model, found, self.batch_size, None).argmax(1)

    def _attack(
        self, source: nn.Module, name: str, radius: float, options: Mapping[str, Any]
    ) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        kind = _KINDS[name]
        given = {**kind.options, **self.suite.options.get(name, {}), **options}
        if kind.sized:
            given["eps"] = radius
        if kind.seeded:
            device = next(source.parameters(), self.inputs).device
            given["generator"] = torch.Generator(device).manual_seed(self.seed)
        return lambda model, batch, labels: kind.attack(model, batch, labels, **given)

    def _networks(self) -> Iterable[nn.Module]:
        return {self.model} if self.twin is None else {self.model, self.twin}
