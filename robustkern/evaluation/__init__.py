"""How robust a network is: small attacks of our own and accuracy under them.

`fgsm` and `pgd` are the L-infinity attacks that the papers report. They are gradient attacks: a
network that hides its gradients can pass them and still be fragile, so a claim of robustness also
needs a gradient-free attack.
"""

from robustkern.evaluation.accuracy import RobustAccuracy, accuracy, robust_accuracy
from robustkern.evaluation.attacks import evaluating, fgsm, pgd

__all__ = ["RobustAccuracy", "accuracy", "evaluating", "fgsm", "pgd", "robust_accuracy"]
