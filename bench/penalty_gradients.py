"""CURE's parameter gradient in a trained network, by its ways of computing it."""

import copy
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern import CURE
from robustkern.training.data import Dataset

MODES = ("batch", "eval")
SHIFTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
USUAL = 3e-4  # of what is not over shifts: about what training chooses for pixels in [0, 1]
Gradients = dict[str, Tensor]


def gradients(model: nn.Module, mode: str, x: Tensor, y: Tensor, h: float, **how: Any) -> Gradients:
    """Of CURE with weight 1, by parameter, in float64; `model` stays as it is."""
    model = copy.deepcopy(model).to(x.dtype).train(mode == "batch")
    value = CURE(1.0, h)(model, x, y, **how)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, materialize_grads=True)
    return {name: g.double() for name, g in zip(names, found, strict=True)}


def alike(a: Gradients, b: Gradients) -> tuple[float, float]:
    """Cosine, and the length of `a` in lengths of `b`."""
    first, second = (torch.cat([g.flatten() for g in each.values()]) for each in (a, b))
    length = (first.norm() / second.norm()).item()
    return F.cosine_similarity(first, second, dim=0).item(), length


def along_weights(model: nn.Module, found: Gradients) -> dict[str, float]:
    """How much of the convolutions' gradient lies along their weights, channel by channel.

    Returns:
        `share` of its squared length; the share `by_chance`, of a gradient without a preferred
        direction; and `shrinking`, the part of that share whose descent makes weights smaller.
    """
    share = chance = shrinking = whole = 0.0
    for name, weight in convolutions(model).items():
        w, g = weight.flatten(1), found[name].flatten(1)
        along = (g * w).sum(1)
        squares = along.square() / w.square().sum(1).clamp_min(1e-30)
        share += squares.sum().item()
        shrinking += squares[along > 0].sum().item()
        chance += g.square().sum().item() / w.shape[1]
        whole += g.square().sum().item()
    if not whole:
        return {"share": 0.0, "by_chance": 0.0, "shrinking": 0.0}
    return {
        "share": share / whole,
        "by_chance": chance / whole,
        "shrinking": shrinking / share if share else 0.0,
    }


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the convolutions; in the ResNet a batch norm stands behind every one."""
    return {
        f"{name}.weight": module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def batches(data: Dataset, size: int, number: int) -> list[tuple[Tensor, Tensor]]:
    """The first held-out images."""
    return list(zip(data.x_test.split(size), data.y_test.split(size), strict=True))[:number]


@torch.no_grad()
def roughness(model: nn.Module, images: Iterable[tuple[Tensor, Tensor]], h: float) -> dict:
    """The penalty with weight 1 in both modes, and the norm of the convolutions' weights."""
    norms = [weight.square().sum() for weight in convolutions(model).values()]
    found = {"norm": torch.stack(norms).sum().sqrt().item()}
    for mode in MODES:
        held = copy.deepcopy(model).train(mode == "batch")
        found[mode] = statistics.mean(CURE(1.0, h)(held, x, y).item() for x, y in images)
    return found


def explained(model: nn.Module, images: list[tuple[Tensor, Tensor]], h: float) -> dict[str, Any]:
    """First order against double backward, batch against eval, and what lies along the weights.

    The truth is double backward in float64. Means over the batches.
    """
    rows = [_of_batch(model, x, y, h) for x, y in images]
    return {"roughness": roughness(model, images, h), **_mean(rows)}


def _of_batch(model: nn.Module, x: Tensor, y: Tensor, h: float) -> dict[str, Any]:
    row: dict[str, Any] = {}
    exact, usual = {}, {}
    for mode in MODES:
        exact[mode] = gradients(model, mode, x.double(), y, h)
        found = {
            shift: gradients(model, mode, x, y, h, method="first_order", shift=shift)
            for shift in SHIFTS
        }
        usual[mode] = found[USUAL]
        agreement = {shift: alike(g, exact[mode]) for shift, g in found.items()}
        row[mode] = {
            "cosine": [cosine for cosine, _ in agreement.values()],
            "length": [length for _, length in agreement.values()],
            "along": {
                "double backward": along_weights(model, exact[mode]),
                "first order": along_weights(model, usual[mode]),
            },
        }
    row["eval_with_batch"] = {
        way: dict(zip(("cosine", "length"), alike(each["eval"], each["batch"]), strict=True))
        for way, each in (("double backward", exact), ("first order", usual))
    }
    return row


def _mean(rows: list[Any]) -> Any:
    """Of numbers that lie at the same place in each."""
    if isinstance(rows[0], dict):
        return {key: _mean([row[key] for row in rows]) for key in rows[0]}
    if isinstance(rows[0], list):
        return [_mean(list(each)) for each in zip(*rows, strict=True)]
    return statistics.mean(rows)
