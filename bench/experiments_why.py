"""The study of batch statistics in docs/experiments.md: what they change in training, and why."""

import statistics

from analysis_page import table
from experiments_page import Results, Row, accuracies, contrast, lines
from penalty_gradients import SHIFTS, USUAL
from studies import ACTIVATIONS


def batch_statistics(results: Results) -> str:
    """Modes, ways and activations, then why."""
    found = {(line.variant, line.strength): line for line in lines(results)}

    def swapped(title: str, this: str, that: str) -> str:
        """Variants with one thing in the place of another, the rest alike."""
        text = ""
        for activation in dict.fromkeys(name.split(",")[0] for name, _ in found):
            pairs = [
                (line, found[other])
                for (name, strength), line in found.items()
                if name.startswith(activation) and this in name
                if (other := (name.replace(this, that), strength)) in found
            ]
            text += contrast(results, pairs, f"{activation}, {title}")
        return text

    return (
        accuracies(results, "weight")
        + swapped("eval mode against batch statistics", ", eval", ", batch")
        + swapped("first order against double backward", "first order", "double backward")
        + "".join(
            swapped(f"shift {at} against the automatic one", f", shift {at}", "")
            for at in ("0.001", "0.003")
        )
        + explanation(results)
    )


def explanation(results: Results) -> str:
    """The penalty's gradient in the clean networks, and what fine-tuning did."""
    rows_of = {
        activation: [
            row for row in results["rows"]
            if row["kind"] == "explained" and row["method"] == activation
        ]
        for activation in ACTIVATIONS
    }  # fmt: skip
    explained = {activation: rows for activation, rows in rows_of.items() if rows}
    if not explained:
        return ""

    def mean(rows: list[Row], key: str) -> float:
        return statistics.mean(row[key] for row in rows)

    agreement, along = [], []
    for activation, rows in explained.items():
        for mode in ("batch", "eval"):
            cosines = [
                f"{statistics.mean(c):.3f}"
                for c in zip(*(r[mode]["cosine"] for r in rows), strict=True)
            ]
            lengths = [r[mode]["length"][SHIFTS.index(USUAL)] for r in rows]
            agreement.append([activation, mode, *cosines, f"{statistics.mean(lengths):.2f}"])
            for way in ("double backward", "first order"):
                parts = [r[mode]["along"][way] for r in rows]
                shares = [
                    f"{100 * mean(parts, key):.1f}%" for key in ("share", "by_chance", "shrinking")
                ]
                along.append([activation, mode, way, *shares])
    between = {
        activation: mean([row["eval_with_batch"]["double backward"] for row in rows], "cosine")
        for activation, rows in explained.items()
    }
    cosine = ", ".join(f"{activation} {value:.2f}" for activation, value in between.items())
    return (
        "\nIn the clean networks, the penalty's parameter gradient by first order against double "
        f"backward in float64: cosines over shifts, and the ratio of lengths at {USUAL:g}, "
        "which is about what training chooses.\n"
        + table(
            ["activation", "statistics", *(f"shift {s:g}" for s in SHIFTS),
             f"length, {USUAL:g}"],
            agreement,
        )
        + "The cosine between the gradients in eval mode and with batch statistics, by double "
        f"backward: {cosine}.\n"
        "\nHow much of the squared length of that gradient lies along the weights of each output "
        "channel of the convolutions, and how much of this part shrinks them.\n"
        + table(
            ["activation", "statistics", "by", "along the weights", "by chance", "shrinking"], along
        )
        + fine_tuned(results, explained)
    )  # fmt: skip


def fine_tuned(results: Results, explained: dict[str, list[Row]]) -> str:
    """Penalty in both modes and weights after fine-tuning, in those of the clean network."""
    before = {(a, r["seed"]): r["roughness"] for a, rows in explained.items() for r in rows}
    rows, factors = [], {}
    for line in lines(results):
        activation = line.variant.split(",")[0]
        seeds = [seed for seed in line.rows if (activation, seed) in before]
        if not seeds:
            continue
        factor = {
            key: statistics.geometric_mean(
                line.rows[s]["roughness"][key] / before[activation, s][key] for s in seeds
            )
            for key in ("batch", "eval", "norm")
        }
        factors[line.variant, line.strength] = factor
        strength = f"{line.strength:g}" if line.strength else ""
        rows.append([line.variant, strength, *(f"{value:.2g}" for value in factor.values())])
    header = ["fine-tuned with", "weight", "penalty, batch statistics", "penalty, eval mode",
              "norm of weights"]  # fmt: skip
    return (
        "\nWhat fine-tuning multiplied the penalty, with weight 1 on held-out images, and the norm "
        "of the convolutions' weights by.\n" + table(header, rows) + hypothesis(explained, factors)
    )


def hypothesis(explained: dict[str, list[Row]], factors: dict[tuple[str, float], Row]) -> str:
    """That in eval mode the penalty is lowered by smaller weights, which smooth nothing."""
    shares = {
        mode: [r[mode]["along"]["double backward"] for rows in explained.values() for r in rows]
        for mode in ("batch", "eval")
    }
    says = [
        (
            "with batch statistics less of the gradient lies along the weights than by chance",
            all(part["share"] < part["by_chance"] for part in shares["batch"]),
        ),
        (
            "in eval mode more of it does than by chance, and most of that shrinks them",
            all(p["share"] > p["by_chance"] and p["shrinking"] > 0.5 for p in shares["eval"]),
        ),
    ]
    pairs = [
        (factor, factors[other, strength])
        for (name, strength), factor in factors.items()
        if (other := name.replace(", eval", ", batch")) != name and (other, strength) in factors
    ]
    if pairs:
        says += [
            (
                "training in eval mode shrinks the weights more than with batch statistics",
                all(ours["norm"] < min(1, theirs["norm"]) for ours, theirs in pairs),
            ),
            (
                "it lowers the penalty in eval mode more than that with batch statistics",
                all(ours["eval"] < min(1, ours["batch"]) for ours, _ in pairs),
            ),
        ]
    return "".join(f"- {'Yes' if holds else 'No'}: {text}.\n" for text, holds in says)
