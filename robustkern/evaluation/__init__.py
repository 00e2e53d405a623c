"""How robust a network is: attacks, accuracy under them, and what else to measure.

Inputs are pixels scaled to [0, 1]; a network normalizes them itself. An attack within a radius is
called as `attack(model, inputs, targets, eps)`, one that looks for the nearest adversarial input as
`attack(model, inputs, targets)`. Both give adversarial inputs, and leave the network as they found
it: modes, `requires_grad`, `.grad` and the random state. What is misclassified already only `fgsm`,
`ifgsm` and `pgd` move any further. They compute in float32 or better; a network of half precision
sees, and gives back, inputs of its own precision, which are in the ball too.

`fgsm`, `ifgsm`, `pgd`, `apgd` and `fab` follow gradients: a network that hides its gradients can
pass them and still be fragile. So a claim of robustness also needs attacks that ask for none:
`square`, `spsa`, `boundary`, `hop_skip_jump`, or `lrc`, long-range-correlated noise. The sources
give SGR the perturbations of an attack to learn from.

Any attack can be measured, `attack(model, inputs, targets)` being all that is asked of it: let
`adversarial_inputs` attack a data set once, and give what it returns to the measures. `Detector`
tells adversarial inputs by their gradient norm. `evaluate_networks` takes all measures at once.
"""

from robustkern.evaluation.accuracy import RobustAccuracy, accuracy, robust_accuracy
from robustkern.evaluation.attacks import fgsm, ifgsm, pgd
from robustkern.evaluation.autoattack import apgd, autoattack, fab, square
from robustkern.evaluation.curves import (
    AccuracyCurve,
    AttackLadder,
    accuracy_curve,
    attack_ladder,
    wilson_interval,
)
from robustkern.evaluation.detector import (
    ROC,
    Detection,
    DetectionTable,
    Detector,
    detection_table,
    roc_curve,
)
from robustkern.evaluation.distances import (
    AdversarialDistances,
    DeepFoolRobustness,
    adversarial_distances,
    deepfool_robustness,
)
from robustkern.evaluation.evasive import evasive_carlini_wagner
from robustkern.evaluation.failures import FailureIndicators, Indicator, failure_indicators
from robustkern.evaluation.lrc import lrc, lrc_accuracy
from robustkern.evaluation.masking import (
    LabelLeaking,
    MaskingScatter,
    label_leaking,
    masking_scatter,
)
from robustkern.evaluation.minimal import boundary, carlini_wagner, deepfool, hop_skip_jump
from robustkern.evaluation.passes import adversarial_inputs
from robustkern.evaluation.perturbations import (
    deepfool_source,
    fgsm_source,
    gradient_source,
    pgd_source,
)
from robustkern.evaluation.report.page import report_page
from robustkern.evaluation.report.verdict import NetworkVerdict, verdict
from robustkern.evaluation.segment import softmax_along_segment
from robustkern.evaluation.sensitivity import (
    GradientStatistics,
    gradient_norms,
    gradient_statistics,
)
from robustkern.evaluation.spsa import spsa
from robustkern.evaluation.subspace import subspace_deepfool
from robustkern.evaluation.suites.runner import evaluate_networks
from robustkern.evaluation.transfer import TransferMatrix, transfer_matrix
from robustkern.evaluation.universal import universal
from robustkern.gradients.modes import evaluating

__all__ = [
    "ROC",
    "AccuracyCurve",
    "AdversarialDistances",
    "AttackLadder",
    "DeepFoolRobustness",
    "Detection",
    "DetectionTable",
    "Detector",
    "FailureIndicators",
    "GradientStatistics",
    "Indicator",
    "LabelLeaking",
    "MaskingScatter",
    "NetworkVerdict",
    "RobustAccuracy",
    "TransferMatrix",
    "accuracy",
    "accuracy_curve",
    "adversarial_distances",
    "adversarial_inputs",
    "apgd",
    "attack_ladder",
    "autoattack",
    "boundary",
    "carlini_wagner",
    "deepfool",
    "deepfool_robustness",
    "deepfool_source",
    "detection_table",
    "evaluate_networks",
    "evaluating",
    "evasive_carlini_wagner",
    "fab",
    "failure_indicators",
    "fgsm",
    "fgsm_source",
    "gradient_norms",
    "gradient_source",
    "gradient_statistics",
    "hop_skip_jump",
    "ifgsm",
    "label_leaking",
    "lrc",
    "lrc_accuracy",
    "masking_scatter",
    "pgd",
    "pgd_source",
    "report_page",
    "robust_accuracy",
    "roc_curve",
    "softmax_along_segment",
    "spsa",
    "square",
    "subspace_deepfool",
    "transfer_matrix",
    "universal",
    "verdict",
    "wilson_interval",
]
