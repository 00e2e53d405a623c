"""Results of an evaluation made up, in the form in which `robustkern evaluate` writes them."""

import math
import random

from robustkern.evaluation import wilson_interval

NAMES = ("clean", "CURE", "GN", "SGR", "TV+Lipschitz", "PGD-7 AT")


def share(accuracy, samples=1000):
    right = round(accuracy * samples)
    low, high = wilson_interval(right, samples)
    return {
        "right": right,
        "samples": samples,
        "accuracy": right / samples,
        "low": low,
        "high": high,
    }


def curve(eps, at):
    points = [share(at(radius)) for radius in eps]
    columns = {
        key: [point[key] for point in points] for key in ("right", "accuracy", "low", "high")
    }
    return {
        "eps": list(eps),
        "samples": 1000,
        "area": sum(columns["accuracy"]) / len(eps),
        **columns,
    }


def network(strength, shape, source):
    """One that hides nothing; the larger `strength`, the more robust."""
    images, size = 5, math.prod(shape)
    eps = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]

    def falling(scale):
        return lambda radius: 0.985 * math.exp(-((radius / (scale * strength)) ** 2))

    pgd = falling(0.1)(0.1)
    accuracy = {"FGSM": pgd + 0.04, "PGD-20": pgd, "APGD": pgd - 0.005, "Square": pgd + 0.03}
    accuracy |= {"FAB": pgd - 0.002, "SPSA": pgd + 0.02, "PGD-20 of the twin": pgd + 0.2}
    samples = dict.fromkeys(accuracy, 1000) | {"SPSA": 200}
    gaps = [source.gauss(strength, 3) for _ in range(200)]

    def norms(mean):
        return [math.exp(source.gauss(math.log(mean), 1)) for _ in range(500)]

    def picture(noise):
        return [
            [
                [
                    int(min(255, max(0, 255 * math.sin(x * y / 60) ** 2 + source.gauss(0, noise))))
                    for x in range(shape[2])
                ]
                for y in range(shape[1])
            ]
            for _ in range(shape[0])
        ]

    nearest = ("DeepFool L2", "DeepFool Linf", "CW L2", "Boundary")
    detected = ("PGD", "Boundary", "CW", "Evasive CW")
    shown = [*accuracy, *nearest]
    ways = [step / 20 for step in range(21)]
    slide = [1 / (1 + math.exp(12 * (way - 0.6))) for way in ways]
    values = {
        "clean": share(0.985),
        "fgsm_curve": curve(eps, falling(0.12)),
        "pgd_curve": curve(eps, falling(0.1)),
        "lrc_curve": curve([0.0, 0.1, 0.2, 0.3, 0.5], falling(0.4)),
        "pgd_l2_curve": curve([0.0, 0.5, 1.0, 1.5, 2.0], falling(1.5)),
        "targeted": {**share(pgd + 0.1), "reached": 0.7 - pgd / 2},
        "ladder": {
            "accuracy": {
                "FGSM": pgd + 0.04,
                "DeepFool Linf": pgd + 0.02,
                "PGD-7": pgd + 0.01,
                "PGD-20": pgd,
            },
            "gap": 0.04,
            "samples": 1000,
        },
        "attacks": {"accuracy": accuracy, "samples": samples, "worst": share(pgd - 0.008)},
        "masking": {
            "white_box": gaps,
            "black_box": [gap + source.expovariate(2) for gap in gaps],
            "below": 0.0,
        },
        "distances": {
            name: {
                "p": "inf" if name == "DeepFool Linf" else 2,
                "median": strength * (0.05 if name == "DeepFool Linf" else 0.9),
                "mean": strength * (0.06 if name == "DeepFool Linf" else 1.0),
                "misclassified": 15,
                "standing": 0,
                "samples": 1000,
            }
            for name in nearest
        },
        "deepfool_robustness": {"rho": 0.1 * strength, "changed": 999, "unchanged": 1},
        "gradients": {
            "loss": {"mean": 0.3 / strength, "max": 9 / strength},
            "outputs": {"mean": 2 / strength, "max": 20 / strength},
            "clean_norms": norms(0.02),
            "pgd_norms": norms(0.6),
        },
        "detection": {
            "samples": 200,
            "false_positive_rate": 0.06,
            "threshold": 0.4,
            "calibration": 500,
            "attacks": {
                name: {"fooled": 190, "flagged": 0.96, "auc": 0.97, "median_distance": 0.9}
                for name in detected
            },
            "roc": {
                name: {
                    "false_positive": ways,
                    "true_positive": [way ** (0.1 + 0.2 * kind) for way in ways],
                    "auc": 0.97 - 0.1 * kind,
                }
                for kind, name in enumerate(detected)
            },
        },
        "segments": {
            "labels": [7, 2],
            "probabilities": [
                [
                    [0.0] * 7 + [p, 0.9 * (1 - p), 0.1 * (1 - p)] if sample else
                    [0.0, 0.05 * (1 - p), p, 0.95 * (1 - p)] + [0.0] * 6
                    for p in slide
                ]
                for sample in range(2)
            ],
        },
        "label_leaking": {
            "clean": 0.985,
            "true_labels": pgd + 0.04,
            "predicted_labels": pgd + 0.05,
            "leaks": False,
        },
        "failures": {
            name: {"raised": False, "value": 0.0}
            for name in (
                "zero_gradients", "flat_loss", "black_box_stronger", "robust_at_large_eps",
            )
        },
        "subspace": {
            "dimensions": [max(1, size // part) for part in (64, 16, 4, 1)],
            "median_distance": [0.9 * strength * part**0.45 for part in (64, 16, 4, 1)],
        },
        "universal": {"fooled": 0.5 / (1 + strength), "eps": 0.1},
        "images": {
            "labels": list(range(images)),
            "clean": [picture(0) for _ in range(images)],
            "adversarial": {name: [picture(25) for _ in range(images)] for name in shown},
            "predictions": {"clean": list(range(images)), **{name: [3] * images for name in shown}},
        },
    }  # fmt: skip
    return {
        name: {"value": value, "forward": 21.0, "backward": 20.0, "seconds": 3.2}
        for name, value in values.items()
    }


def results(names=NAMES, shape=(1, 16, 16)):
    source = random.Random(0)
    networks = {
        name: network(0.5 + 0.25 * place, shape, source) for place, name in enumerate(names)
    }
    sources = [*names, *(f"twin of {name}" for name in names)]
    own = [networks[name]["attacks"]["value"]["accuracy"]["PGD-20"] for name in names]
    matrix = [
        [share if source == name else (1 + share) / 2 for source in sources]
        for name, share in zip(names, own, strict=True)
    ]
    return {
        "format": 1,
        "suite": "standard",
        "data": {"name": "mnist", "images": 1000, "shape": list(shape), "classes": 10},
        "eps": [0.02, 0.04, 0.06, 0.08, 0.1],
        "radius": 0.1,
        "seed": 0,
        "batch_size": 256,
        "versions": {"robustkern": "1.0", "torch": "2.13"},
        "checkpoints": {name: f"runs/{name}/best.pt" for name in names},
        "networks": networks,
        "transfer": {
            "value": {"evaluated": list(names), "sources": sources, "accuracy": matrix},
            "forward": 32.0,
            "backward": 20.0,
            "seconds": 12.0,
        },
    }
