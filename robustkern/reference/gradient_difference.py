"""||a_i - b_i||_2^2 per sample, and its derivatives."""

from torch import Tensor

from robustkern.reference.samples import per_sample, sample_sum, widen


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    """The (N,) squared distances, in the accumulation dtype."""
    return sample_sum((widen(a) - widen(b)) ** 2)


def gradient_difference_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """2 grad_i (a_i - b_i), and its negative."""
    d = widen(a) - widen(b)
    da = (per_sample(2 * grad, d) * d).to(a.dtype).contiguous()
    return da, -da
