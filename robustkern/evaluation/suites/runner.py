"""One evaluation of some networks: suites of attacks and measures, and what they find."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustkern.analysis.samples import check_labels
from robustkern.evaluation.attacks import pgd
from robustkern.evaluation.counting import Cost, metered
from robustkern.evaluation.curves import check_eps
from robustkern.evaluation.minimal import _library
from robustkern.evaluation.passes import check_data, check_samples, outputs_of
from robustkern.evaluation.suites.items import ITEMS
from robustkern.evaluation.suites.subject import CALLER, Subject, Suite
from robustkern.evaluation.transfer import transfer_matrix

FORMAT = 1  # of the results; raised with their layout
_QUICK = ("clean", "fgsm_curve", "pgd_curve", "attacks", "failures", "gradients", "images")
LEAST_CALIBRATION = 19  # for a false positive rate of 5%
# So that a hundred steps of Adam arrive: the defaults are for a thousand.
_CW = {"initial_const": 1.0, "step_size": 0.05}
_STANDARD = Suite(
    "standard",
    tuple(ITEMS),
    attacks=("FGSM", "PGD-20", "APGD", "FAB", "Square", "SPSA"),
    distances=("DeepFool L2", "DeepFool Linf", "CW L2", "Boundary"),
    samples={
        "APGD": 300,
        "FAB": 100,
        "Square": 200,
        "SPSA": 100,
        "PGD-100": 100,
        "PGD-20 L2": 200,
        "LRC": 300,
        "Targeted PGD-20": 300,
        "DeepFool L2": 200,
        "DeepFool Linf": 200,
        "CW L2": 100,
        "Boundary": 50,
        "Evasive CW": 50,
        "Subspace": 50,
    },
    curve_samples=300,
    options={
        "APGD": {"steps": 50},
        "FAB": {"steps": 20},
        "Square": {"queries": 1000},
        "SPSA": {"steps": 20, "directions": 64, "chunk": 256},
        "LRC": {"draws": 20},
        "CW L2": {"steps": 100, "searches": 4, **_CW},
        "Boundary": {"steps": 4000},
        "Evasive CW": {"steps": 100, "searches": 3, **_CW},
    },
    libraries=("foolbox", "pyautoattack"),
    transfer=True,
)
SUITES = {
    "quick": Suite(
        "quick",
        _QUICK,
        attacks=("FGSM", "PGD-20", "Square"),
        samples={"Square": 200},
        curve_samples=200,
        options={"Square": {"queries": 200}},
        libraries=("pyautoattack",),
    ),
    "standard": _STANDARD,
    "full": Suite(
        "full",
        _STANDARD.items,
        attacks=(*_STANDARD.attacks, "AutoAttack"),
        distances=(*_STANDARD.distances, "HopSkipJump"),
        options={
            "PGD-20": {"restarts": 5},
            "SPSA": {"steps": 50},
            "CW L2": {"steps": 300, "searches": 6, **_CW},
            "Evasive CW": {"steps": 200, "searches": 6, **_CW},
            "HopSkipJump": {"steps": 20},
        },
        libraries=_STANDARD.libraries,
        transfer=True,
    ),
}


def evaluate_networks(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    eps: Sequence[float],
    radius: float,
    suite: str | Suite = "quick",
    twins: Mapping[str, nn.Module] | None = None,
    calibration: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    partial_results: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] | None = None,
    progress: Callable[[str, str], object] | None = None,
) -> dict[str, Any]:
    r"""Attack networks in all the ways of a suite, and measure what is left of them.

    The samples are put in an order drawn with `seed`; slow attacks are made on the first ones.
    Every attack begins with `seed` anew, so that it finds the same whatever was done before.

    Args:
        models: for each name a network that maps (N, C, H, W) to (N, classes), logits; taken in
            eval mode.
        inputs: (N, C, H, W) floating point, values in [0, 1].
        targets: (N,) int64, the true labels.
        eps: strictly rising radii of the curves, L-infinity, in [0, 1]; of LRC standard deviations,
            and in L2 times sqrt(C H W) / 4.
        radius: L-infinity, in (0, 1], of all that is measured at one radius.
        suite: `quick`, `standard` or `full`.
        twins: for the name of a model a network trained like it from another seed, whose
            adversarial inputs are tried on it.
        calibration: inputs and labels that are not among the others, for the detector and the
            universal perturbation; `quick` needs none.
        batch_size: samples per pass.
        seed: of the order and of all attacks.
        partial_results: what `save` was given last, of the same arguments: what is in it is not
            measured again.
        save: called after each measure with the results so far.
        progress: called with a model's name and a measure's before each that is not in
            `partial_results`; for the measures of all networks the name is "".

    Returns:
        Plain data, as JSON takes it, measures of six digits, None for what is infinite or does not
        exist. `networks` has for each name and measure its `value`, the `forward` and `backward`
        passes (those of attacks for each sample attacked, shared ones counted by all that use them;
        the rest for each sample) and `seconds`; `transfer` has the same for the transfer matrix, or
        is None.

    Raises:
        ImportError: a library of the attacks is missing.
        TypeError: a model is no module, `inputs` are not floating point or `targets` not int64.
        ValueError: no model, an unknown suite, a twin of no model; no samples, values outside
            [0, 1], labels out of range or all of one class; outputs that are not (N, classes) or
            not finite; `eps` or `radius` out of range; too few calibration samples; `batch_size`
            below 1; or `partial_results` of other arguments.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> inputs, targets = torch.rand(6, 1, 2, 2), torch.arange(6) % 2
        >>> suite = Suite("clean only", ("clean",))
        >>> found = evaluate_networks(
        ...     {"mine": model}, inputs, targets, eps=[0.1], radius=0.1, suite=suite
        ... )
        >>> found["networks"]["mine"]["clean"]["value"]["samples"]
        6
    """
    chosen = _find(suite)
    twins = {} if twins is None else twins
    classes = _check(models, inputs, targets, eps, radius, chosen, twins, calibration, batch_size)
    results: dict[str, Any] = {
        "format": FORMAT,
        "suite": chosen.name,
        "data": {"images": len(inputs), "shape": list(inputs.shape[1:]), "classes": classes},
        "eps": list(map(float, eps)),
        "radius": float(radius),
        "seed": seed,
        "batch_size": batch_size,
    }
    networks: dict[str, dict[str, Any]] = {name: {} for name in models}
    transfer = None
    if partial_results is not None:
        _check_same(results, models, partial_results)
        networks = copy.deepcopy(dict(partial_results["networks"]))
        transfer = partial_results["transfer"]
    results |= {"networks": networks, "transfer": transfer}

    def begin(name: str, item: str) -> None:
        if progress is not None:
            progress(name, item)

    def end() -> None:
        if save is not None:
            save(results)

    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    inputs, targets = inputs[order.to(inputs.device)], targets[order.to(targets.device)]
    least = min([len(inputs), *chosen.samples.values()])
    if targets[:least].min() == targets[:least].max():
        raise ValueError(
            f"{CALLER}: targets must hold two classes among the {least} samples that slow attacks "
            f"are made on, drawn with seed {seed}, got {int(targets[0])} only"
        )
    for name, model in models.items():
        missing = [item for item in chosen.items if item not in networks[name]]
        if not missing:
            continue
        subject = Subject(
            model,
            inputs,
            targets,
            chosen,
            eps=tuple(eps),
            radius=radius,
            twin=twins.get(name),
            calibration=calibration,
            seed=seed,
            batch_size=batch_size,
        )
        for item in missing:
            begin(name, item)
            networks[name][item] = _entry(*subject.measure(ITEMS[item]))
            end()
    if chosen.transfer and len(models) + len(twins) > 1 and transfer is None:
        begin("", "transfer")
        results["transfer"] = _transfer(models, twins, inputs, targets, radius, seed, batch_size)
        end()
    return results


def _find(suite: str | Suite) -> Suite:
    if isinstance(suite, Suite):
        return suite
    if suite not in SUITES:
        raise ValueError(f"{CALLER}: suite must be one of {', '.join(SUITES)}, got {suite}")
    return SUITES[suite]


def _transfer(
    models: Mapping[str, nn.Module],
    twins: Mapping[str, nn.Module],
    inputs: Tensor,
    targets: Tensor,
    radius: float,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    def attack(model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        source = torch.Generator(batch.device).manual_seed(seed)
        return pgd(model, batch, labels, radius, steps=20, generator=source)

    sources = {**models, **{f"twin of {name}": twin for name, twin in twins.items()}}
    with metered(dict.fromkeys(sources.values())) as cost:
        found = transfer_matrix(
            models, inputs, targets, attack, sources=sources, batch_size=batch_size
        )
    return _entry(dataclasses.asdict(found), cost.per(len(inputs)))


def _entry(value: Any, cost: Cost) -> dict[str, Any]:
    return {"value": _plain(value), **_plain(dataclasses.asdict(cost))}


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _check(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    targets: Tensor,
    eps: Sequence[float],
    radius: float,
    suite: Suite,
    twins: Mapping[str, nn.Module],
    calibration: tuple[Tensor, Tensor] | None,
    batch_size: int,
) -> int:
    """Refuse what would fail later; return the number of classes."""
    if not models:
        raise ValueError(f"{CALLER}: models must hold at least one network, got none")
    check_eps(CALLER, eps)
    if not (0 < radius <= 1 and max(eps) <= 1):  # pixels reach no farther
        raise ValueError(
            f"{CALLER}: radius must lie in (0, 1] and eps in [0, 1], got {radius} and {list(eps)}"
        )
    for name in twins:
        if name not in models:
            raise ValueError(f"{CALLER}: twins must be of models, got one of {name}")
        if f"twin of {name}" in models:
            raise ValueError(f"{CALLER}: models must not be named as a twin, got twin of {name}")
    for library in suite.libraries:
        _library(CALLER, library)
    held_out = "detection" in suite.items or "universal" in suite.items
    if held_out and (calibration is None or len(calibration[0]) < LEAST_CALIBRATION):
        came = 0 if calibration is None else len(calibration[0])
        raise ValueError(
            f"{CALLER}: calibration must hold at least {LEAST_CALIBRATION} samples for "
            f"{suite.name}, got {came}"
        )
    for model in (*models.values(), *twins.values()):
        check_data(CALLER, model, inputs, targets)
        if inputs.dim() != 4:
            raise ValueError(f"{CALLER}: inputs must be (N, C, H, W), got {tuple(inputs.shape)}")
        for x, y in ((inputs, targets), *([calibration] if held_out and calibration else [])):
            check_samples(CALLER, model, x, y)
            outputs = outputs_of(CALLER, model, x[:1], batch_size, None)
            check_labels(CALLER, y, outputs)
    return outputs.shape[1]


def _check_same(
    results: Mapping[str, Any], models: Mapping[str, nn.Module], partial_results: Mapping[str, Any]
) -> None:
    wanted = {**results, "networks": list(models)}
    came = {**partial_results, "networks": list(partial_results["networks"])}
    for key, value in wanted.items():
        if came[key] != value:
            raise ValueError(
                f"{CALLER}: partial_results must be of the same {key}, {value}, got {came[key]}"
            )
