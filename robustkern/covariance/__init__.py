"""Running covariances of perturbations: the state that SGR learns (Roth et al. 2018, Eq. 14-16)."""

from robustkern.covariance.full import FullCovariance
from robustkern.covariance.function import CovarianceFunction
from robustkern.covariance.running import RunningMean

__all__ = ["CovarianceFunction", "FullCovariance", "RunningMean"]
