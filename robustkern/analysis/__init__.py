r"""What networks are like: curvature in their inputs, and what a penalty does to one.

`check` tries a penalty on a network. The rest is about the Hessian H of a sample's loss in its
input, whose curvature CURE makes small. There are three ways to it, all for many samples at once:

- `InputHessian`, the operator v -> Hv: by differences of a finite length, as the CURE paper looks
  at networks, or exactly by double backward. `lanczos` finds its extreme eigenpairs, `spectrum` all
  eigenvalues of small inputs.
- `gauss_newton`, for cross entropy: all eigenpairs from an input gradient per class. They are the
  Hessian's where the network is piecewise linear; where it is not, `curved_operations` says why.
- `frobenius_norm`, from products with random vectors.

`curvature_profile`, `sign_curvature` and `alignment` are the paper's figures.
"""

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
from robustkern.analysis.lanczos import Eigenpairs, lanczos, spectrum

__all__ = [
    "Alignment",
    "CheckReport",
    "CurvatureProfile",
    "Eigenpairs",
    "FrobeniusNorm",
    "GaussNewton",
    "InputHessian",
    "alignment",
    "check",
    "curvature_profile",
    "curved_operations",
    "frobenius_norm",
    "gauss_newton",
    "lanczos",
    "sign_curvature",
    "spectrum",
]
