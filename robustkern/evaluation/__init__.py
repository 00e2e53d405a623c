"""How robust a network is: attacks, and accuracy under them.

Inputs are pixels scaled to [0, 1]; a network normalizes them itself. An attack within a radius is
called as `attack(model, inputs, targets, eps)`, one that looks for the nearest adversarial input as
`attack(model, inputs, targets)`. Both give adversarial inputs, and leave the network as they found
it: modes, `requires_grad`, `.grad` and the random state. What is misclassified already only `fgsm`,
`ifgsm`, `pgd` and `lrc` move any further.

`fgsm`, `ifgsm`, `pgd`, `apgd` and `fab` follow gradients: a network that hides its gradients can
pass them and still be fragile. So a claim of robustness also needs attacks that ask for none:
`square`, `spsa`, `boundary`, `hop_skip_jump`, or `lrc`, long-range-correlated noise. The sources
give SGR the perturbations of an attack to learn from.
"""

from robustkern.evaluation.accuracy import (
    RobustAccuracy,
    accuracy,
    adversarial_inputs,
    robust_accuracy,
)
from robustkern.evaluation.attacks import evaluating, fgsm, ifgsm, pgd
from robustkern.evaluation.autoattack import apgd, autoattack, fab, square
from robustkern.evaluation.evasive import evasive_carlini_wagner
from robustkern.evaluation.lrc import lrc, lrc_accuracy
from robustkern.evaluation.minimal import boundary, carlini_wagner, deepfool, hop_skip_jump
from robustkern.evaluation.perturbations import (
    deepfool_source,
    fgsm_source,
    gradient_source,
    pgd_source,
)
from robustkern.evaluation.spsa import spsa
from robustkern.evaluation.subspace import subspace_deepfool
from robustkern.evaluation.universal import universal

__all__ = [
    "RobustAccuracy",
    "accuracy",
    "adversarial_inputs",
    "apgd",
    "autoattack",
    "boundary",
    "carlini_wagner",
    "deepfool",
    "deepfool_source",
    "evaluating",
    "evasive_carlini_wagner",
    "fab",
    "fgsm",
    "fgsm_source",
    "gradient_source",
    "hop_skip_jump",
    "ifgsm",
    "lrc",
    "lrc_accuracy",
    "pgd",
    "pgd_source",
    "robust_accuracy",
    "spsa",
    "square",
    "subspace_deepfool",
    "universal",
]
