"""LocalLinearity: local linearity regularization, LLR (Qin et al., NeurIPS 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustkern.penalties.base import Penalty, check_every, check_weight
from robustkern.reference.samples import per_sample, sample_sum, widen

__all__ = ["LocalLinearity"]


class LocalLinearity(Penalty):
    r"""How far the loss is from its linear approximation in a ball (LLR, Qin et al. 2019).

    .. math:: R = \frac{1}{N} \sum_i \left( \mathrm{weight}\; \gamma_i(d_i)
        + \mu\, |d_i^\top g_i| \right), \qquad
        \gamma_i(d) = |\ell_i(x_i + d) - \ell_i(x_i) - d^\top g_i|

    d_i, a constant for the parameters, is to maximize gamma_i over :math:`\|d\|_\infty \le
    \mathrm{eps}`: so many steps along the sign of the gradient of gamma_i, from a uniform draw. In
    plain training steps a step costs `steps` + 4, of which `steps` + 1 leave the parameter
    gradients out.

    The loss of the batch must be the mean of those of its samples, each of which `loss_fn` makes,
    through `torch.vmap`, of one sample alone: no class weights or ignored labels, for instance.

    Args:
        weight: lambda of the paper, of the linearity error.
        mu: of the change that the linear approximation predicts.
        eps: radius of the ball, in input units.
        steps: of the ascent.
        step_size: largest change of an input element by a step; 2.5 eps / steps when None, so that
            the ball can be crossed.
        random_start: False begins at eps sign(g), which draws nothing.

    Raises:
        TypeError: for an argument of another type.
        ValueError: for a weight, mu, eps or step_size that is negative or not finite, or steps
            below 1.

    Example:
        >>> import torch, robustkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> inputs, targets = torch.rand(16, 4), torch.arange(16) % 3
        >>> penalty = robustkern.LocalLinearity(weight=1.0, mu=1.0, eps=0.1, steps=2)
        >>> step = robustkern.backward(model, inputs, targets, penalty)
        >>> bool(step.penalty > 0)
        True
    """

    def __init__(
        self,
        weight: float,
        mu: float,
        eps: float,
        *,
        steps: int = 2,
        step_size: float | None = None,
        random_start: bool = True,
    ) -> None:
        super().__init__()
        self.weight = check_weight("LocalLinearity", "weight", weight)
        self.mu = check_weight("LocalLinearity", "mu", mu)
        self.eps = check_weight("LocalLinearity", "eps", eps)
        self.steps = check_every("LocalLinearity", "steps", steps)
        if step_size is not None:
            step_size = check_weight("LocalLinearity", "step_size", step_size)
        self.step_size, self.random_start = step_size, random_start
        self._displacement: Tensor | None = None

    def takes_losses(self) -> bool:
        """It does."""
        return True

    def search(
        self,
        inputs: Tensor,
        gradient: Tensor,
        loss: Tensor,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> list[Tensor]:
        """The point x + d, by ascent of the linearity error."""
        if self.random_start:
            displacement = self.eps * (2 * torch.rand_like(inputs) - 1)
        else:
            displacement = self.eps * gradient.sign()
        length = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        for _ in range(self.steps):
            there, loss_there = evaluate(inputs + displacement)
            error = self._error(gradient, loss, loss_there, displacement)
            ascent = per_sample(error.sign(), inputs).to(inputs.dtype) * (there - gradient)
            # The sign of NaN is 0: an overflow must not pass for a gradient.
            signs = torch.where(ascent.isfinite(), ascent.sign(), torch.nan)
            displacement = (displacement + length * signs).clamp(-self.eps, self.eps)
        point = inputs + displacement
        self._displacement = point - inputs  # as the dtype has rounded it
        return [point]

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The mean over the batch."""
        assert self._displacement is not None
        _, loss, loss_there = shifted
        error = self._error(gradient, loss, loss_there, self._displacement)
        predicted = _product(self._displacement, gradient)
        return (self.weight * error.abs() + self.mu * predicted.abs()).mean()

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return (
            f"weight={self.weight}, mu={self.mu}, eps={self.eps}, steps={self.steps}, "
            f"step_size={self.step_size}, random_start={self.random_start}"
        )

    @staticmethod
    def _error(gradient: Tensor, loss: Tensor, loss_there: Tensor, displacement: Tensor) -> Tensor:
        """The loss's change less what the gradient predicts, (N,)."""
        return widen(loss_there) - widen(loss) - _product(displacement, gradient)


def _product(displacement: Tensor, gradient: Tensor) -> Tensor:
    return sample_sum(widen(displacement) * widen(gradient))
