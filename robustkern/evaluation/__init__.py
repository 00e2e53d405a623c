"""How robust a network is: small attacks of our own, accuracy under them, and what else to measure.

`fgsm` and `pgd` are the L-infinity attacks that the papers report. They are gradient attacks: a
network that hides its gradients can pass them and still be fragile, so a claim of robustness also
needs a gradient-free attack. `lrc`, long-range-correlated noise, asks for no gradient. The sources
give SGR the perturbations of an attack to learn from.

Any attack can be measured, `attack(model, inputs, targets)` being all that is asked of it: let
`adversarial_inputs` attack a data set once, and give what it returns to the measures. `Detector`
tells adversarial inputs by their gradient norm.
"""

from robustkern.evaluation.accuracy import RobustAccuracy, accuracy, robust_accuracy
from robustkern.evaluation.attacks import evaluating, fgsm, pgd
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
from robustkern.evaluation.failures import FailureIndicators, Indicator, failure_indicators
from robustkern.evaluation.lrc import lrc, lrc_accuracy
from robustkern.evaluation.masking import (
    LabelLeaking,
    MaskingScatter,
    label_leaking,
    masking_scatter,
)
from robustkern.evaluation.passes import adversarial_inputs
from robustkern.evaluation.perturbations import (
    deepfool_source,
    fgsm_source,
    gradient_source,
    pgd_source,
)
from robustkern.evaluation.segment import softmax_along_segment
from robustkern.evaluation.sensitivity import (
    GradientStatistics,
    gradient_norms,
    gradient_statistics,
)
from robustkern.evaluation.transfer import TransferMatrix, transfer_matrix

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
    "RobustAccuracy",
    "TransferMatrix",
    "accuracy",
    "accuracy_curve",
    "adversarial_distances",
    "adversarial_inputs",
    "attack_ladder",
    "deepfool_robustness",
    "deepfool_source",
    "detection_table",
    "evaluating",
    "failure_indicators",
    "fgsm",
    "fgsm_source",
    "gradient_norms",
    "gradient_source",
    "gradient_statistics",
    "label_leaking",
    "lrc",
    "lrc_accuracy",
    "masking_scatter",
    "pgd",
    "pgd_source",
    "robust_accuracy",
    "roc_curve",
    "softmax_along_segment",
    "transfer_matrix",
    "wilson_interval",
]
