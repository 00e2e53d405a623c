"""Penalties on input gradients: the papers' formulas as modules."""

from robustkern.penalties.base import Lazy, Penalty, Sum
from robustkern.penalties.cure import CURE
from robustkern.penalties.local_linearity import LocalLinearity
from robustkern.penalties.norms import GradientPenalty, LipschitzPenalty
from robustkern.penalties.sgr import SGR

__all__ = [
    "CURE",
    "SGR",
    "GradientPenalty",
    "Lazy",
    "LipschitzPenalty",
    "LocalLinearity",
    "Penalty",
    "Sum",
]
