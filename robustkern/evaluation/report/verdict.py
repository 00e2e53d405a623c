"""What an evaluation says of each network in a few numbers, and what speaks against them.

An attack that fails because gradients are hidden reads like robustness (Athalye et al. 2018). So
beside the numbers stand warnings, and which checks looked for them: where none was made, no warning
says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robustkern.evaluation.curves import wilson_interval

# Attacks that ask for no gradient of the network, by how their names begin: AutoAttack holds one of
# them, so it stands on neither side. One made on a twin is named after it.
_GRADIENT_FREE = ("square", "spsa", "boundary", "hopskipjump", "lrc")
_OF_A_TWIN = "of the twin"
# In accuracy. A smaller difference is put down to chance, as of random starts.
_STRAY = 0.01
# Share of points below the diagonal: attacks that minimize different losses leave some there.
_BELOW = 0.05
_FAILURES = {
    "zero_gradients": "The input gradient is zero at {} of the images classified right.",
    "flat_loss": "The gradient attack does not raise the loss of {} of the images.",
    "black_box_stronger": "An attack without gradients leaves {} fewer images right than the "
    "gradient attack.",
    "robust_at_large_eps": "{} of the images stay right under an attack so large that no network "
    "can stand it.",
}


@dataclass(frozen=True)
class NetworkVerdict:
    """What stands at the head of a report about one network; accuracies are fractions.

    Attributes:
        network: its name.
        clean: accuracy without attack; None if it was not measured.
        strongest: the single attack that leaves the least accuracy at the radius; one on fewer
            images than the others only where it does so beyond chance.
        strongest_accuracy: what it leaves.
        strongest_samples: of so many images.
        worst: share of images that stay right under every attack at the radius that was made on
            them; of fewer images, which more attacks were made on, where they are worse beyond
            chance.
        worst_interval: in which it lies at 95% confidence.
        worst_samples: of so many images.
        warnings: sentences, one for each sign of an attack that failed for another reason than the
            robustness of the network.
        checks: names of the checks that looked for such signs.
    """

    network: str
    clean: float | None
    strongest: str | None
    strongest_accuracy: float | None
    strongest_samples: int | None
    worst: float | None
    worst_interval: tuple[float, float] | None
    worst_samples: int | None
    warnings: tuple[str, ...]
    checks: tuple[str, ...]


def verdict(results: Mapping[str, Any]) -> list[NetworkVerdict]:
    """Sum up the results of an evaluation.

    Differences of accuracy up to one percentage point are put down to chance, and so are those
    between attacks on different numbers of images that the 95% intervals do not tell apart.

    Args:
        results: of format 1, as `robustkern evaluate` writes them to `report.json`; a network's
            items may be absent.

    Returns:
        A verdict for each network, in their order.

    Raises:
        TypeError: `results` is no mapping.
        ValueError: another format, or no network.

    Example:
        >>> attacks = {
        ...     "accuracy": {"PGD-20": 0.5, "Square": 0.3},
        ...     "samples": {"PGD-20": 1000, "Square": 1000},
        ... }
        >>> found = verdict({"format": 1, "networks": {"a": {"attacks": {"value": attacks}}}})
        >>> found[0].strongest
        'Square'
        >>> print(*found[0].warnings)
        Square asks the network for no gradient and leaves 30.0% right, fewer than PGD-20 (50.0%).
    """
    check_results("verdict", results)
    return [_verdict(name, results) for name in results["networks"]]


def check_results(caller: str, results: Mapping[str, Any]) -> None:
    """Refuse what no evaluation wrote."""
    if not isinstance(results, Mapping):
        raise TypeError(f"{caller}: results must be a mapping, got {type(results).__name__}")
    if results.get("format") != 1:
        raise ValueError(f"{caller}: results must be of format 1, got {results.get('format')!r}")
    if not isinstance(results.get("networks"), Mapping) or not results["networks"]:
        raise ValueError(f"{caller}: results must hold at least one network, got none")


def percent(fraction: float) -> str:
    """Write a fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def strongest_attack(attacks: Mapping[str, Any]) -> str:
    """Name of the attack that leaves the least accuracy."""
    accuracy: Mapping[str, float] = attacks["accuracy"]
    samples: Mapping[str, int] = attacks["samples"]

    def left(name: str) -> float:
        # On fewer images the upper end of the interval: which images they are must not decide.
        if samples[name] == max(samples.values()):
            return accuracy[name]
        return wilson_interval(round(accuracy[name] * samples[name]), samples[name])[1]

    return min(accuracy, key=left)


def _verdict(name: str, results: Mapping[str, Any]) -> NetworkVerdict:
    items = {item: record["value"] for item, record in results["networks"][name].items()}
    attacks = items.get("attacks", {})
    worst = attacks.get("worst")
    strongest = strongest_attack(attacks) if attacks.get("accuracy") else None
    transfer = (results.get("transfer") or {}).get("value")
    signs = {
        "failure indicators": _failures(items.get("failures")),
        "attacks without gradients": _outdone(attacks),
        "logit gaps": _below(items.get("masking")),
        "transferred attacks": _transferred(name, transfer),
        "attack ladder": _ladder(items.get("ladder")),
        "label leaking": _leaking(items.get("label_leaking")),
    }
    return NetworkVerdict(
        network=name,
        clean=items["clean"]["accuracy"] if "clean" in items else None,
        strongest=strongest,
        strongest_accuracy=attacks["accuracy"][strongest] if strongest else None,
        strongest_samples=attacks["samples"][strongest] if strongest else None,
        worst=worst["accuracy"] if worst else None,
        worst_interval=(worst["low"], worst["high"]) if worst else None,
        worst_samples=worst["samples"] if worst else None,
        warnings=tuple(warning for found in signs.values() for warning in found or ()),
        checks=tuple(check for check, found in signs.items() if found is not None),
    )


# Each of these gives its warnings, or None where what it looks at was not measured.
def _failures(failures: Mapping[str, Any] | None) -> list[str] | None:
    if failures is None:
        return None
    return [
        sentence.format(percent(failures[name]["value"]))
        for name, sentence in _FAILURES.items()
        if name in failures and failures[name]["raised"]
    ]


def _outdone(attacks: Mapping[str, Any]) -> list[str] | None:
    accuracy, samples = attacks.get("accuracy", {}), attacks.get("samples", {})
    black = [name for name in accuracy if _gradient_free(name)]
    white = [name for name in accuracy if name not in black and name != "AutoAttack"]
    if not white or not black:
        return None
    best = min(white, key=accuracy.__getitem__)
    return [
        f"{name} asks the network for no gradient and leaves {percent(accuracy[name])} right, "
        f"fewer than {best} ({percent(accuracy[best])})."
        for name in black
        if _lower(accuracy[name], samples[name], accuracy[best], samples[best])
    ]


def _gradient_free(attack: str) -> bool:
    return attack.lower().startswith(_GRADIENT_FREE) or attack.endswith(_OF_A_TWIN)


def _lower(one: float, samples: int, other: float, other_samples: int) -> bool:
    """Whether an accuracy is lower than another beyond chance."""
    if samples == other_samples:  # the same images
        return one < other - _STRAY
    _, high = wilson_interval(round(one * samples), samples)
    low, _ = wilson_interval(round(other * other_samples), other_samples)
    return high < low


def _below(masking: Mapping[str, Any] | None) -> list[str] | None:
    if masking is None:
        return None
    if masking["below"] <= _BELOW:
        return []
    return [
        f"At {percent(masking['below'])} of {len(masking['white_box'])} images the attack without "
        "gradients lowers the logit gap further than the gradient attack."
    ]


def _transferred(name: str, transfer: Mapping[str, Any] | None) -> list[str] | None:
    if not transfer or name not in transfer["evaluated"] or name not in transfer["sources"]:
        return None
    row = dict(
        zip(
            transfer["sources"],
            transfer["accuracy"][list(transfer["evaluated"]).index(name)],
            strict=True,
        )
    )
    own = row.pop(name)
    if not row:
        return None
    source = min(row, key=row.__getitem__)
    if row[source] >= own - _STRAY:
        return []
    return [
        f"Attacks made on {source} leave {percent(row[source])} right, fewer than those made on "
        f"the network itself ({percent(own)})."
    ]


def _ladder(ladder: Mapping[str, Any] | None) -> list[str] | None:
    if ladder is None:
        return None
    accuracy = dict(ladder["accuracy"])
    last = list(accuracy)[-1]
    best = min(accuracy, key=accuracy.__getitem__)
    if accuracy[last] <= accuracy[best] + _STRAY:
        return []
    return [
        f"{last}, the strongest attack of the ladder, leaves {percent(accuracy[last])} right, more "
        f"than {best} ({percent(accuracy[best])})."
    ]


def _leaking(leaking: Mapping[str, Any] | None) -> list[str] | None:
    if leaking is None:
        return None
    if not leaking["leaks"]:
        return []
    return [
        f"It reads labels off the attack: {percent(leaking['true_labels'])} right where FGSM knew "
        f"the true labels, {percent(leaking['predicted_labels'])} where it knew the predicted ones."
    ]
