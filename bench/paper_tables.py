"""The papers' tables beside ours, drawn from the results of bench/papers.py."""

import math
from dataclasses import dataclass
from typing import Any

from recipe_runs import AUTHORS, Setting, recipe_of

from robustkern.training.report import percent, table

# A radius at which the small networks of the reduced runs still tell methods apart, in 255ths.
REDUCED_EPS = 2


@dataclass(frozen=True)
class Paper:
    """What a paper reports of a network, as it stands there in per cent; "" where it does not."""

    clean: str = ""
    attacked: str = ""
    autoattack: str = ""
    distance: str = ""


@dataclass(frozen=True)
class Table:
    """A paper's table: the attack, and the paper's figures by recipe."""

    title: str
    steps: int
    eps: tuple[int, ...]  # in 255ths
    rows: dict[str, Paper]
    distance: bool = False  # of the nearest adversarial images too
    times: bool = False  # in those of the authors' structure, if that has a row, and of PGD-7 too

    @property
    def times_of_authors(self) -> bool:
        return self.times and any(recipe in AUTHORS for recipe in self.rows)

    def radii(self, reduced: bool) -> tuple[int, ...]:
        """The paper's, behind a smaller one in a reduced run, in 255ths."""
        return (REDUCED_EPS, *self.eps) if reduced else self.eps

    def figures(self, reduced: bool, autoattacked: int) -> list[str]:
        """What is to be measured, AutoAttack on so many images, at the largest eps."""
        names = [f"pgd{self.steps}-{eps}" for eps in self.radii(reduced)]
        names += ["distance"] if self.distance else []
        return names + ([f"autoattack-{self.eps[-1]}"] if autoattacked else [])


TABLES = {
    "cure": Table(
        "CURE, Moosavi-Dezfooli et al. 2019, table 2: CIFAR-10", 20, (8,),
        {
            "clean-resnet18-cifar10": Paper("94.9", "0"),
            "authors-cure-resnet18-cifar10": Paper(),
            "cure-resnet18-cifar10": Paper("81.2", "36.3"),
            "anchored-cure-resnet18-cifar10": Paper(),
            "cure-norm-resnet18-cifar10": Paper(),
            "pgd-resnet18-cifar10": Paper("79.4", "43.7"),
            "fgsm-rs-resnet18-cifar10": Paper(),
            "fgsm-rs-cure-resnet18-cifar10": Paper(),
            "fgsm-rs-lazy-cure-resnet18-cifar10": Paper(),
            "fgsm-rs-tv-resnet18-cifar10": Paper(),
            "clean-wideresnet28x10-cifar10": Paper("94.6", "0"),
            # AutoAttack's figure is from its own authors.
            "cure-wideresnet28x10-cifar10": Paper("83.1", "41.4", autoattack="38.5"),
            "pgd-wideresnet28x10-cifar10": Paper("87.3", "45.8"),
        },
        times=True,
    ),
    "cure-svhn": Table(
        "CURE, Moosavi-Dezfooli et al. 2019, table 3: SVHN", 10, (12,),
        {
            "clean-resnet18-svhn": Paper("96.3", "0.9"),
            "cure-resnet18-svhn": Paper("91.1", "28.4"),
            "pgd-resnet18-svhn": Paper("93", "33"),
        },
        times=True,
    ),
    # Two figures under attack are of two strengths, the stronger one last; one alone is, as we take
    # it, of the strength that was trained with.
    "sgr": Table(
        "SGR, Roth et al. 2018: CIFAR-10, white box at two strengths of the paper's", 20, (4, 8),
        {
            "clean-carlini-cifar10": Paper(),
            "sgr-sign-carlini-cifar10": Paper("84.2", "33.7 / 10.0"),
            "sgr-pgd-carlini-cifar10": Paper(),
            "weak-pgd-carlini-cifar10": Paper("81.9", "56.1"),
            "pgd-carlini-cifar10": Paper("77.7", "40.5"),
        },
    ),
    # The paper's are by I-FGSM.
    "tv": Table(
        "TV and Lipschitz, Finlay et al. 2018: CIFAR-10", 20, (8,),
        {
            "clean-resnext34-cifar10": Paper("95.93", distance="0.09"),
            "l1-tv-resnext34-cifar10": Paper(),
            "tv-resnext34-cifar10": Paper("96.42", distance="0.30"),
            "tv-lipschitz-resnext34-cifar10": Paper("95.87", "1.9", distance="0.31"),
            "medium-tv-lipschitz-resnext34-cifar10": Paper(attacked="8.4"),
            "strong-tv-lipschitz-resnext34-cifar10": Paper("94.02", "6.3", distance="0.52"),
        },
        distance=True,
    ),
}  # fmt: skip


def shown_table(
    shown: Table, recipes: list[str], rows: dict[str, dict[str, Any]], setting: Setting
) -> str:
    """The paper's figures beside ours, these from the rows by recipe alone."""
    mark = setting.mark
    radii = shown.radii(setting.reduced)
    header = ["recipe", "clean, paper", "clean", "attacked, paper"]
    header += [f"PGD-{shown.steps} at {eps}/255" for eps in radii]
    header += ["AutoAttack, paper", f"AutoAttack at {shown.eps[-1]}/255"]
    if shown.distance:
        header += ["median L2, paper", "median L2"]
    header += ["training", "passes forward, backward"]
    if shown.times_of_authors:
        header += ["in the time of the authors' structure"]
    if shown.times:
        header += ["with its start, in the time of PGD-7"]

    def cell(row: dict[str, Any], key: str) -> str:
        return percent(row[key]) + mark if key in row else ""

    lines = []
    for recipe in recipes:
        paper, row = shown.rows.get(recipe, Paper()), rows.get(recipe, {})
        clean = cell(row, "clean") if row else "not measured yet"
        line = [recipe, paper.clean, row.get("error", clean), paper.attacked]
        line += [cell(row, f"pgd{shown.steps}-{eps}") for eps in radii]
        of_autoattack = cell(row, f"autoattack-{shown.eps[-1]}")
        if of_autoattack:
            of_autoattack += f", {row['autoattack_images']} images"
        line += [paper.autoattack, of_autoattack]
        if shown.distance:
            line += [paper.distance, distance(row, mark)]
        line += training(row, setting) if "seconds" in row else ["", ""]
        if shown.times_of_authors:
            line += [times(ratio(recipe, "authors-cure", rows, whole=False), mark)]
        if shown.times:
            line += [times(ratio(recipe, "pgd", rows, whole=True), mark)]
        lines.append(line)
    return f"{shown.title}\n\n{table(header, lines)}"


def times(found: float, mark: str) -> str:
    """A ratio of times; nothing where one is missing."""
    return "" if math.isnan(found) else f"{found:.2f}{mark}"


def distance(row: dict[str, Any], mark: str) -> str:
    """The median over so many images; None where most stand."""
    if "distance" not in row:
        return ""
    found = "most stand" if row["distance"] is None else f"{row['distance']:.2f}"
    return f"{found}{mark}, {row['distance_images']} images"


def training(row: dict[str, Any], setting: Setting) -> list[str]:
    """Its time, and the passes of each image in all epochs."""
    eager = ", not compiled" if setting.fast and not row["options"]["compile"] else ""
    passes = f"{row['forward_passes']:.0f}, {row['backward_passes']:.0f}"
    return [f"{row['seconds']:.0f} s{setting.mark}{eager}", passes + setting.mark]


def ratio(recipe: str, method: str, rows: dict[str, dict[str, Any]], *, whole: bool) -> float:
    """Training time in that of a method on the same network and data; NaN where one is missing.

    `whole` counts the training of what they start from too; otherwise only what starts from
    another network has a ratio.
    """
    if not whole and recipe_of(recipe).start is None:
        return math.nan
    other = "-".join([method, *recipe.rsplit("-", 2)[1:]])
    return seconds(recipe, rows, whole=whole) / seconds(other, rows, whole=whole)


def seconds(recipe: str, rows: dict[str, dict[str, Any]], *, whole: bool) -> float:
    """Of training, with that of what it starts from if `whole`; NaN where they are missing."""
    if "seconds" not in rows.get(recipe, {}):
        return math.nan
    start = recipe_of(recipe).start if whole else None
    before = 0.0 if start is None else seconds(start, rows, whole=True)
    return before + rows[recipe]["seconds"]
