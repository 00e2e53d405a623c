"""Recipes: the options of `train` with which the papers' networks are trained.

Where a paper says how it trains, a recipe says the same: CURE (Moosavi-Dezfooli et al. 2019) and
its fine-tuning, the data augmentation and standardization of SGR (Roth et al. 2018), the weights of
total variation and the Lipschitz term (Finlay et al. 2018). Clean training, the batch sizes,
SGR's weight and the combinations of FGSM-RS with penalties are ours. Schedules count epochs:
whoever changes `epochs` changes them too.

CURE is the paper's: gamma times the squared norm, h rising to 1.5 for pixels in [0, 1], batch
statistics. `cure-norm` is what the authors' code computes at the same weight and h: the norm, its
passes in eval mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustkern.training.session import Options


@dataclass(frozen=True)
class Recipe:
    """Options that differ from those of `Options`, and the recipe of the network to start from."""

    options: Mapping[str, Any]
    start: str | None = None


# 125 divides the 50,000 images, so that a compiled network is compiled for no last, smaller batch.
_CIFAR10 = {"data": "cifar10", "batch_size": 125, "crop": 4, "flip": True}
_SVHN = {"data": "svhn", "batch_size": 128}
_CLEAN = {
    "epochs": 30,
    "optimizer": "sgd",
    "lr": "0:0.01,6:0.1,30:0",
    "momentum": 0.9,
    "weight_decay": 5e-4,
}
_CURE = {"epochs": 20, "optimizer": "adam", "lr": "0:0.0001,20:0.000001"}
_CARLINI = {
    **_CIFAR10,
    "model": "carlini",
    "per_image": True,
    "epochs": 50,
    "optimizer": "adam",
    "lr": "0:0.001,50:0",
}


def _cure(weight: str, h: str, name: str = "cure", **more: Any) -> dict[str, Any]:
    return {**_CURE, "penalties": [{"name": name, "weight": weight, "h": h, **more}]}


def _sgr(source: str, **more: Any) -> dict[str, Any]:
    penalty = {"name": "sgr", "weight": "1", "source": source, "standardize": "data", **more}
    return {**_CARLINI, "penalties": [penalty]}


def _tv(tv: str, lipschitz: str | None = None, p: float = 2.0) -> dict[str, Any]:
    penalties: list[dict[str, Any]] = [{"name": "tv", "weight": tv, "p": p}]
    if lipschitz is not None:
        penalties.append({"name": "lipschitz", "weight": lipschitz, "p": 2.0})
    return {**_CIFAR10, "model": "resnext34", **_CLEAN, "penalties": penalties}


def _pgd(eps: float) -> dict[str, Any]:
    return {"adversarial": {"name": "pgd", "eps": eps, "steps": 7}}


_FGSM_RS = {"adversarial": {"name": "fgsm-rs", "eps": 8 / 255}}
_RISE = "0:0,5:1.5"
# 4, 8 and 12 for 10, 5 and 5 epochs: the steps are steeper than one training step.
_STAIRS = "0:4,9.999:4,10:8,14.999:8,15:12"
_RESNET = {**_CIFAR10, "model": "resnet18"}
_WIDE = {**_CIFAR10, "model": "wideresnet28x10"}
_RESNET_SVHN = {**_SVHN, "model": "resnet18"}

RECIPES: dict[str, Recipe] = {
    "clean-resnet18-cifar10": Recipe({**_RESNET, **_CLEAN}),
    "clean-wideresnet28x10-cifar10": Recipe({**_WIDE, **_CLEAN}),
    "clean-resnet18-svhn": Recipe({**_RESNET_SVHN, **_CLEAN}),
    "clean-carlini-cifar10": Recipe(_CARLINI),
    "clean-resnext34-cifar10": Recipe({**_CIFAR10, "model": "resnext34", **_CLEAN}),
    "cure-resnet18-cifar10": Recipe({**_RESNET, **_cure("4", _RISE)}, "clean-resnet18-cifar10"),
    "anchored-cure-resnet18-cifar10": Recipe(
        {**_RESNET, **_cure("4", _RISE, "anchored-cure")}, "clean-resnet18-cifar10"
    ),
    "cure-norm-resnet18-cifar10": Recipe(
        {**_RESNET, **_cure("4", _RISE, norm=True), "batch_norm": "eval"}, "clean-resnet18-cifar10"
    ),
    "cure-wideresnet28x10-cifar10": Recipe(
        {**_WIDE, **_cure("8", _RISE)}, "clean-wideresnet28x10-cifar10"
    ),
    "cure-resnet18-svhn": Recipe({**_RESNET_SVHN, **_cure(_STAIRS, "1.25")}, "clean-resnet18-svhn"),
    "sgr-sign-carlini-cifar10": Recipe(_sgr("sign")),
    "sgr-pgd-carlini-cifar10": Recipe(_sgr("pgd", attack_eps=8 / 255)),
    "tv-resnext34-cifar10": Recipe(_tv("0.01")),
    "l1-tv-resnext34-cifar10": Recipe(_tv("0.01", p=1.0)),
    "tv-lipschitz-resnext34-cifar10": Recipe(_tv("0.01", "0.1")),
    "medium-tv-lipschitz-resnext34-cifar10": Recipe(_tv("0.1", "0.1")),
    "strong-tv-lipschitz-resnext34-cifar10": Recipe(_tv("0.1", "1")),
    "pgd-resnet18-cifar10": Recipe({**_RESNET, **_CLEAN, **_pgd(8 / 255)}),
    "pgd-wideresnet28x10-cifar10": Recipe({**_WIDE, **_CLEAN, **_pgd(8 / 255)}),
    "pgd-resnet18-svhn": Recipe({**_RESNET_SVHN, **_CLEAN, **_pgd(12 / 255)}),
    "weak-pgd-carlini-cifar10": Recipe({**_CARLINI, **_pgd(4 / 255)}),
    "pgd-carlini-cifar10": Recipe({**_CARLINI, **_pgd(8 / 255)}),
    "fgsm-rs-resnet18-cifar10": Recipe({**_RESNET, **_CLEAN, **_FGSM_RS}),
    "fgsm-rs-cure-resnet18-cifar10": Recipe(
        {**_RESNET, **_cure("4", _RISE), **_FGSM_RS}, "clean-resnet18-cifar10"
    ),
    "fgsm-rs-lazy-cure-resnet18-cifar10": Recipe(
        {**_RESNET, **_cure("4", _RISE, every=4), **_FGSM_RS}, "clean-resnet18-cifar10"
    ),
    "fgsm-rs-tv-resnet18-cifar10": Recipe({**_tv("0.1"), **_RESNET, **_FGSM_RS}),
}


def find_recipe(name: str) -> Recipe:
    """Look up a recipe.

    Args:
        name: of the recipe.

    Returns:
        The recipe.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> find_recipe("cure-resnet18-cifar10").start
        'clean-resnet18-cifar10'
    """
    if name not in RECIPES:
        raise ValueError(f"train: recipe must be one of {', '.join(RECIPES)}, got {name}")
    return RECIPES[name]


def from_recipe(name: str, given: Mapping[str, Any]) -> Options:
    """Options of a run by a recipe.

    Args:
        name: of the recipe.
        given: options that hold in place of the recipe's, by their names in `Options`.

    Returns:
        The options.

    Raises:
        ValueError: an unknown name, or no `init` where the recipe starts from another's network.

    Example:
        >>> options = from_recipe("clean-resnet18-cifar10", {"epochs": 1})
        >>> options.model, options.epochs
        ('resnet18', 1)
    """
    recipe = find_recipe(name)
    if recipe.start is not None and given.get("init") is None:
        raise ValueError(
            f"train: init must be given with the recipe {name}, the checkpoint of a network "
            f"trained by the recipe {recipe.start}, got None"
        )
    return Options(**{**recipe.options, **given})
