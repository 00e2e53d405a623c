"""What a penalty does to a user's own network, `robustkern.check`, and what a network looks like.

Bounds of robustness from gradient and curvature, planes through inputs, boundary normals, saliency.
Normals and adversarial inputs may be those of any attack. `plain` turns results into what JSON
holds, and `robustkern.analysis.figures` draws that.
"""

from robustkern.analysis.bounds import (
    RobustnessBounds,
    loss_gap,
    margin_loss,
    robustness_bounds,
)
from robustkern.analysis.check import CheckReport, check
from robustkern.analysis.illustrations import bounds_against_curvature, losses_along_line
from robustkern.analysis.normals import (
    NormalSpectrum,
    SharedCurvature,
    SubspaceLaw,
    normal_spectrum,
    shared_curvature,
    subspace_law,
)
from robustkern.analysis.plain import plain
from robustkern.analysis.planes import (
    NormalSections,
    PlaneSections,
    normal_sections,
    plane_axes,
    plane_sections,
)
from robustkern.analysis.saliency import PerturbedImages, perturbed_images, saliency

__all__ = [
    "CheckReport",
    "NormalSections",
    "NormalSpectrum",
    "PerturbedImages",
    "PlaneSections",
    "RobustnessBounds",
    "SharedCurvature",
    "SubspaceLaw",
    "bounds_against_curvature",
    "check",
    "loss_gap",
    "losses_along_line",
    "margin_loss",
    "normal_sections",
    "normal_spectrum",
    "perturbed_images",
    "plain",
    "plane_axes",
    "plane_sections",
    "robustness_bounds",
    "saliency",
    "shared_curvature",
    "subspace_law",
]
