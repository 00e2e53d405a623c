r"""What networks are like: their curvature and geometry, and what a penalty does to one.

`check` tries a penalty on a network. Much of the rest is about the Hessian H of a sample's loss in
its input, whose curvature CURE makes small. There are three ways to it, all for many samples at
once:

- `InputHessian`, the operator v -> Hv: by differences of a finite length, as the CURE paper looks
  at networks, or exactly by double backward. `lanczos` finds its extreme eigenpairs, `spectrum` all
  eigenvalues of small inputs.
- `gauss_newton`, for cross entropy: all eigenpairs from an input gradient per class. They are the
  Hessian's where the network is piecewise linear; where it is not, `curved_operations` says why.
- `frobenius_norm`, from products with random vectors.

`curvature_profile`, `sign_curvature` and `alignment` are the paper's figures. Bounds of robustness
come from gradient and curvature; planes through inputs, boundary normals and saliency from the
network alone. Normals and adversarial inputs may be those of any attack. `plain` turns results into
what JSON holds, and `robustkern.analysis.figures` draws that.
"""

from robustkern.analysis.bounds import (
    RobustnessBounds,
    loss_gap,
    margin_loss,
    robustness_bounds,
)
from robustkern.analysis.check import CheckReport, check
from robustkern.analysis.curvature import (
    Alignment,
    CurvatureProfile,
    FrobeniusNorm,
    alignment,
    curvature_profile,
    frobenius_norm,
    sign_curvature,
)
from robustkern.analysis.gram import GaussNewton, curved_operations, gauss_newton
from robustkern.analysis.hessian import InputHessian
from robustkern.analysis.illustrations import bounds_against_curvature, losses_along_line
from robustkern.analysis.lanczos import Eigenpairs, lanczos, spectrum
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
    "Alignment",
    "CheckReport",
    "CurvatureProfile",
    "Eigenpairs",
    "FrobeniusNorm",
    "GaussNewton",
    "InputHessian",
    "NormalSections",
    "NormalSpectrum",
    "PerturbedImages",
    "PlaneSections",
    "RobustnessBounds",
    "SharedCurvature",
    "SubspaceLaw",
    "alignment",
    "bounds_against_curvature",
    "check",
    "curvature_profile",
    "curved_operations",
    "frobenius_norm",
    "gauss_newton",
    "lanczos",
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
    "sign_curvature",
    "spectrum",
    "subspace_law",
]
