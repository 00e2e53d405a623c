"""How robust a network is: small attacks of our own and accuracy under them.

`fgsm` and `pgd` are the L-infinity attacks that the papers report. They are gradient attacks: a
network that hides its gradients can pass them and still be fragile, so a claim of robustness also
needs a gradient-free attack. `lrc`, long-range-correlated noise, asks for no gradient. The sources
give SGR the perturbations of an attack to learn from.
"""

from robustkern.evaluation.accuracy import RobustAccuracy, accuracy, robust_accuracy
from robustkern.evaluation.attacks import evaluating, fgsm, pgd
from robustkern.evaluation.lrc import lrc, lrc_accuracy
from robustkern.evaluation.perturbations import (
    deepfool_source,
    fgsm_source,
    gradient_source,
    pgd_source,
)

__all__ = [
    "RobustAccuracy",
    "accuracy",
    "deepfool_source",
    "evaluating",
    "fgsm",
    "fgsm_source",
    "gradient_source",
    "lrc",
    "lrc_accuracy",
    "pgd",
    "pgd_source",
    "robust_accuracy",
]
