"""Input-gradient regularization for PyTorch at the cost of a few ordinary training steps."""

__version__ = "0.1.0"

from robustkern import functional, reference
from robustkern.analysis import CheckReport, check
from robustkern.covariance import CovarianceFunction, FullCovariance
from robustkern.functional import show_config
from robustkern.gradients import Step, backward
from robustkern.penalties import (
    CURE,
    SGR,
    GradientPenalty,
    Lazy,
    LipschitzPenalty,
    LocalLinearity,
    Penalty,
    Sum,
)

__all__ = [
    "CURE",
    "SGR",
    "CheckReport",
    "CovarianceFunction",
    "FullCovariance",
    "GradientPenalty",
    "Lazy",
    "LipschitzPenalty",
    "LocalLinearity",
    "Penalty",
    "Step",
    "Sum",
    "backward",
    "check",
    "functional",
    "reference",
    "show_config",
]
