"""Sections of docs/analysis.md: pictures of the committed analysis, and what their numbers say."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results" / "analysis-mnist"
NOT_MEASURED = "Not measured yet.\n"
Data = dict[str, Any]


def section(
    name: str, says: Callable[[Data], str], pictures: Mapping[str, str]
) -> Callable[[], str]:
    """The pictures of a figure, described by the end of their names, and what its data say."""

    def made() -> str:
        path = FOLDER / f"{name}.json"
        if not path.exists():
            return NOT_MEASURED
        shown = "".join(
            f"![{text}](../bench/results/{FOLDER.name}/{name}{which}.png)\n"
            for which, text in pictures.items()
        )
        return f"{shown}\n{says(json.loads(path.read_text())['data'])}\n"

    return made


def setting() -> str:
    """What the run was made with."""
    found = sorted(FOLDER.glob("*.json"))
    if not found:
        return NOT_MEASURED
    content = json.loads(found[0].read_text())
    made, versions = content["made_with"], content["versions"]
    return (
        f"Networks: {', '.join(made['checkpoints'])}; {made['test_size']:,} test images of "
        f"{made['data']}, h = {made['h']:g}, seed {made['seed']}; robustkern "
        f"{versions['robustkern']}, torch {versions['torch']}, {versions['machine']}; "
        '`python -m robustkern analyze runs/networks/{clean,CURE,"PGD-7 AT"}/checkpoint.pt '
        "--data mnist.npz --output bench/results/analysis-mnist`.\n"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table between blank lines."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def compared(values: Mapping[str, float], claim: str, *, smaller: bool) -> str:
    """Whether the later networks are to the first as the paper says, and by how much."""
    (first, before), *others = values.items()
    if not others:
        return f"The paper: {claim}. There is no network to compare {first} with."
    shares = [
        f"{name} {times(before, value) if smaller else times(value, before)}"
        for name, value in others
    ]
    # A difference of a twentieth is none.
    holds = all(
        20 * value < 19 * before if smaller else value > 1.05 * before for _, value in others
    )
    verdict = "Agrees" if holds else "Does not agree"
    way = "smaller" if smaller else "greater"
    return (
        f"{verdict} with the paper: {claim}. {way.capitalize()} than {first}: {', '.join(shares)}."
    )


def times(larger: float, smaller: float) -> str:
    """How many times as large, where that is a number."""
    if not smaller or not math.isfinite(larger) or not math.isfinite(smaller):
        return "by no finite factor"
    factor = larger / smaller
    digits = ".2f" if factor < 2 else ".2g" if factor < 100 else ",.0f"
    return f"{factor:{digits}} times"


def middle(values: list[float | None]) -> float:
    """The median, None being infinite."""
    return statistics.median(map(number, values or [None]))


def number(value: float | None) -> float:
    """As a figure's data have it, where None is infinite."""
    return math.inf if value is None else value


def profile(data: Data) -> str:
    """Largest and smallest eigenvalues of both views."""
    rows = []
    for name, finite in data["finite"].items():
        exact = data["exact"][name]
        ends = (finite["mean"][0], finite["mean"][-1], exact["mean"][0], exact["mean"][-1])
        rows.append([name, *(f"{value:.3g}" for value in ends)])
    views = ("of length h", "at the point")
    header = [f"{end}, {view}" for view in views for end in ("largest", "smallest")]
    text = table(["network", *header], rows)
    for view, where in (("finite", "of length h"), ("exact", "at the point")):
        largest = {name: each["mean"][0] for name, each in data[view].items()}
        claim = f"the largest eigenvalue {where} is smaller after CURE and adversarial training"
        text += compared(largest, claim, smaller=True) + "\n"
    return text


def evolution(data: Data) -> str:
    """From the first epoch to the last."""
    rows = [
        [
            name,
            *(f"{each['frobenius_squared'][i]:.3g}" for i in (0, -1)),
            *(f"{each['sign_curvature'][i]:.3g}" for i in (0, -1)),
            *(f"{100 * each['accuracy'][i]:.1f}%" for i in (0, -1)),
        ]
        for name, each in data["networks"].items()
    ]
    quantities = ("squared Frobenius norm", "norm of Hz", "PGD accuracy")
    header = [f"{each}, {when} epoch" for each in quantities for when in ("first", "last")]
    norms = {name: each["frobenius_squared"] for name, each in data["networks"].items()}
    last = {name: each[-1] for name, each in norms.items()}
    claim = "robust training ends with less curvature"
    fell = [name for name, each in norms.items() if each[-1] < each[0]]
    return (
        table(["network", *header], rows)
        + compared(last, claim, smaller=True)
        + f" From the first epoch to the last it fell in: {', '.join(fell) or 'none'}."
    )


def alignment(data: Data) -> str:
    """Mean cosines beside the paper's."""
    means = {name: statistics.fmean(each["cosines"]) for name, each in data["networks"].items()}
    rows = [
        [name, f"{mean:.3f}", str(data["networks"][name]["undefined"])]
        for name, mean in means.items()
    ]
    rows.append(["a random direction, at most", f"{data['size'] ** -0.5:.3f}", ""])
    first = next(iter(means))
    near = abs(means[first] - 0.43) < 0.1
    verdict = "close to" if near else "not"
    claim = "it is greater after robust training"
    return (
        table(["network", "mean cosine", "undefined: zero gradients"], rows)
        + compared(means, claim, smaller=False)
        + f" Before it, {first} has {means[first]:.2f}, {verdict} the paper's 0.43.\n"
    )


def bounds(data: Data) -> str:
    """Medians, and how often the quadratic's lower bound is above the distance."""
    text, below = "", []
    for loss, title in (("cross_entropy", "cross-entropy, t = log 2"), ("margin", "margin, t = 0")):
        rows = []
        for name, each in data[loss].items():
            medians = [middle(each[key]) for key in ("lower", "distances", "upper")]
            pairs = [
                distance is not None and (lower is None or distance < lower)
                for lower, distance in zip(each["lower"], each["distances"], strict=True)
            ]
            below.append(100 * sum(pairs) / max(1, len(pairs)))
            rows.append(
                [name, *(f"{m:.3g}" for m in medians), f"{below[-1]:.0f}%", str(each["excluded"])]
            )
        header = [title, "median lower bound", "median distance", "median upper bound"]
        text += table([*header, "distance below the lower bound", "excluded, c < 0"], rows)
    distances = {name: middle(each["distances"]) for name, each in data["margin"].items()}
    claim = "robust training moves the boundary away"
    return (
        f"{text}{compared(distances, claim, smaller=False)} Of the images {min(below):.0f}% to "
        f"{max(below):.0f}% have their boundary nearer than the lower bound: that far out the "
        "loss of these is no longer the quadratic.\n"
    )


def sections(data: Data) -> str:
    """Where the prediction is lost along r, at b = 0 and over all b."""
    rows, ahead = [], {}
    for name, each in data["networks"].items():
        label, offsets = each["targets"][0], each["offsets"]
        lost = []
        for row in each["classes"][0]:
            beyond = [
                a for a, label_there in zip(offsets, row, strict=True)
                if a >= 0 and label_there != label
            ]  # fmt: skip
            lost.append(min(beyond, default=math.inf))
        ahead[name] = lost[len(lost) // 2]
        rows.append([name, *(f"{value:.3g}" for value in (ahead[name], min(lost), max(lost)))])
    claim = "the boundary is farther from x after robust training"
    return table(["network", "boundary along r", "nearest over v", "farthest over v"], rows) + (
        compared(ahead, claim, smaller=False) + "\n"
    )


def surfaces(data: Data) -> str:
    """The sharpest bend of the loss along r."""
    bends = {}
    for name, each in data["networks"].items():
        losses, offsets = each["losses"][0][len(each["offsets"]) // 2], each["offsets"]
        step = offsets[1] - offsets[0]
        triples = zip(losses, losses[1:], losses[2:], strict=False)
        bends[name] = max(abs(a - 2 * b + c) for a, b, c in triples) / step**2
    rows = [[name, f"{bend:.3g}"] for name, bend in bends.items()]
    claim = "the loss bends less after robust training"
    return table(["network", "largest second difference along r"], rows) + (
        compared(bends, claim, smaller=True) + "\n"
    )


def images(data: Data) -> str:
    """How far the images had to be moved."""
    lengths = {
        name: statistics.median(each["distances"]) for name, each in data["networks"].items()
    }
    rows = [[name, f"{length:.3g}"] for name, length in lengths.items()]
    claim = "robust networks are fooled by larger perturbations only"
    return table(["network", "median length of those shown"], rows) + (
        compared(lengths, claim, smaller=False) + "\n"
    )


def normal_sections(data: Data) -> str:
    """How many boundaries are nearer to their inputs where these are moved along the direction."""
    rows, most = [], []
    for name, each in data["networks"].items():
        offsets = each["offsets"]
        middle, aside = len(offsets) // 2, len(offsets) // 4
        shown = [[row[middle + place] for place in (-aside, 0, aside)] for row in each["heights"]]
        bends = [(a + c) / 2 - b for a, b, c in shown if None not in (a, b, c)]
        towards = sum(bend < 0 for bend in bends)
        most.append(2 * towards > len(bends))
        drop = f"{-statistics.median(bends):.2g}" if bends else ""
        rows.append([name, f"{offsets[middle + aside]:.2g}", f"{towards} of {len(bends)}", drop])
    first = next(iter(data["networks"]))
    header = ["network", "moved to either side by", "boundaries nearer then", "median, by"]
    return table(header, rows) + (
        f"{_verdict(most[0], 'the curved model')}, if most boundaries of {first} are to be nearer, "
        "on the mean of both sides.\n"
    )


def normals(data: Data) -> str:
    """How much of the normals ten directions hold, and the first shared curvature."""

    def held(values: list[float]) -> str:
        squares = [value**2 for value in values]
        return f"{100 * sum(squares[:10]) / sum(squares):.0f}%"

    rows = []
    for name, each in data["spectra"].items():
        shared, random = (data["curvature"][f"{name}, {kind}"] for kind in ("shared", "random"))
        rows.append(
            [
                name,
                held(each["normals"]),
                held(each["random"]),
                f"{shared['mean'][0]:.3g} ± {shared['error'][0]:.2g}",
                f"{statistics.fmean(random['mean']):.3g}",
            ]
        )
    header = ["network", "held by ten directions", "of random vectors"]
    header += ["curvature along the first shared direction", "along random ones"]
    steep = all(
        sum(value**2 for value in each["normals"][:10])
        > 2 * sum(value**2 for value in each["random"][:10])
        for each in data["spectra"].values()
    )
    first = next(iter(data["spectra"]))
    curved = data["curvature"][f"{first}, shared"]
    shared = curved["mean"][0] > 2 * curved["error"][0]
    return (
        table(header, rows)
        + f"{_verdict(steep, 'the flat model')}, if ten directions are to hold more than twice "
        f"what they hold of random vectors. {_verdict(shared, 'the curved model')}, if the "
        f"boundaries of {first} near the other half of the images are to bend towards these along "
        "the first shared direction by more than two standard errors.\n"
    )


def _verdict(holds: bool, source: str = "the paper") -> str:
    return f"{'Agrees' if holds else 'Does not agree'} with {source}"


def subspace(data: Data) -> str:
    """Measured distances over those of the law."""
    dims = next(iter(data["networks"].values()))["dims"]
    medians = {
        name: [number(ratio) for _, ratio, _ in each["ratios"]]
        for name, each in data["networks"].items()
    }
    rows = [[name, *(f"{ratio:.2f}" for ratio in of_dims)] for name, of_dims in medians.items()]
    ratios = [ratio for of_dims in medians.values() for ratio in of_dims]
    near = max(abs(ratio - 1) for ratio in ratios) < 0.5
    return table(["network, over the law", *(f"m = {dim}" for dim in dims)], rows) + (
        f"{_verdict(near, 'the law')}, if that is to be within half of it. At m = {dims[0]} the "
        f"boundary of the first network is {'nearer' if ratios[0] < 1 else 'farther'} than that.\n"
    )


def saliency(data: Data) -> str:
    """How much of the maps lies on the strokes."""
    rows, shares = [], {}
    for name, maps in data["maps"].items():
        on = total = 0.0
        for image, found in zip(data["images"], maps, strict=True):
            for pixels, values in zip(image[0], found, strict=True):
                total += sum(values)
                on += sum(v for pixel, v in zip(pixels, values, strict=True) if pixel > 0)
        shares[name] = on / total
        rows.append([name, f"{100 * shares[name]:.0f}%"])
    claim = "the maps of robust networks follow the object"
    return table(["network", "of the map on the strokes"], rows) + (
        compared(shares, claim, smaller=False) + "\n"
    )


SECTIONS = {
    "analysis_setting": setting,
    "analysis_profile": section(
        "profile",
        profile,
        {
            "-finite": "mean sorted eigenvalues of the Hessian of length h",
            "-exact": "mean sorted eigenvalues of the Hessian at the point",
        },
    ),
    "analysis_evolution": section(
        "evolution",
        evolution,
        {"": "squared Frobenius norm, norm of Hz and PGD accuracy after each epoch"},
    ),
    "analysis_alignment": section(
        "alignment",
        alignment,
        {"": "histograms of the cosine between gradient and most curved direction"},
    ),
    "analysis_bounds": section(
        "bounds",
        bounds,
        {
            "-cross-entropy": "bounds from the cross-entropy beside DeepFool's distances",
            "-margin": "bounds from the margin loss beside DeepFool's distances",
            "-curves": "the bounds as functions of curvature",
            "-parabolas": "losses of one slope and several curvatures, up to the threshold",
        },
    ),
    "analysis_sections": section(
        "sections", sections, {"": "classes on the plane of r and v around one image"}
    ),
    "analysis_surfaces": section("surfaces", surfaces, {"": "the loss, downward, on that plane"}),
    "analysis_images": section(
        "images", images, {"": "images, what DeepFool made of them, and the change"}
    ),
    "analysis_normal_sections": section(
        "normal-sections",
        normal_sections,
        {"": "boundaries near several images over one shared direction"},
    ),
    "analysis_normals": section(
        "normals",
        normals,
        {
            "-spectra": "singular values of stacked normals and of random vectors",
            "-curvature": "mean curvature of boundaries along shared and random directions",
        },
    ),
    "analysis_subspace": section(
        "subspace",
        subspace,
        {"": "distances within random subspaces, and their ratios to the law"},
    ),
    "analysis_saliency": section(
        "saliency", saliency, {"": "images and the networks' saliency maps"}
    ),
}
