r"""The ops as functions: checked, documented, usable under `torch.func` transforms.

Shape letters: N batch, C channels, H and W height and width, D = C * H * W, \*D any sample shape.
All take float64, float32, bfloat16 and float16 in any strides, accept an empty batch, accumulate in
float32 (float64 for float64) and return contiguous tensors. Values per sample, shape (N,), come in
the accumulation dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from robustkern import ops, reference
from robustkern.ops._library import kernel_of
from robustkern.reference.samples import accumulation_dtype

__all__ = [
    "autocovariance",
    "covariance_form",
    "covariance_product",
    "gradient_difference",
    "gradient_norm",
    "perturb",
    "show_config",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DIRECTIONS = ("sign", "gradient")


def perturb(inputs: Tensor, gradient: Tensor, length: float, direction: str = "sign") -> Tensor:
    r"""Inputs moved an L2 distance `length` up their loss (Moosavi-Dezfooli et al. 2019, sec. 4).

    .. math:: x_i + \mathrm{length}\; z_i, \qquad
        z = \mathrm{sign}(g) / \|\mathrm{sign}(g)\|_2 \;\text{ or }\; g / \|g\|_2

    A sample whose gradient is zero stays where it is.

    Args:
        inputs: (N, \*D).
        gradient: input gradient, of the shape, dtype and device of `inputs`.
        length: L2 length, in input units (pixels scaled to [0, 1]); finite.
        direction: "sign" or "gradient".

    Returns:
        (N, \*D), dtype of `inputs`. Differentiable through `inputs` only, for z is a constant.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for a shape or device unlike that of `inputs`, a length that is not finite, or
            another direction.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> functional.perturb(torch.zeros(1, 4), torch.tensor([[3.0, -1.0, 2.0, 5.0]]), 2.0)
        tensor([[ 1., -1.,  1.,  1.]])
    """
    _check_pair("perturb", "inputs", inputs, "gradient", gradient)
    _check_number("perturb", "length", length)
    if direction not in _DIRECTIONS:
        raise ValueError(f"perturb: direction must be one of {_DIRECTIONS}, got {direction!r}")
    return _call("perturb", inputs, gradient, float(length), direction)


def gradient_norm(gradient: Tensor, p: float) -> Tensor:
    r"""The norm of each sample's gradient, :math:`\|g_i\|_p` (Finlay, Oberman and Abbasi 2019).

    Args:
        gradient: (N, \*D).
        p: 1, 2 or infinity.

    Returns:
        (N,), in the accumulation dtype. Twice differentiable in `gradient`; at a zero gradient, and
        at kinks, the derivative is the subgradient of least length, so never NaN.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for a shape without sample dimensions, or another p.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> functional.gradient_norm(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), p=2)
        tensor([5., 0.])
    """
    _check_batch("gradient_norm", "gradient", gradient)
    if p not in (1, 2, torch.inf):
        raise ValueError(f"gradient_norm: p must be 1, 2 or inf, got {p!r}")
    return _call("gradient_norm", gradient, float(p))


def gradient_difference(a: Tensor, b: Tensor) -> Tensor:
    r"""Squared distance of two gradients, :math:`\|a_i - b_i\|_2^2`.

    With a the gradient at x + hz and b the gradient at x this is the regularizer of CURE
    (Moosavi-Dezfooli et al. 2019, sec. 4), whose :math:`1/h^2` is part of the weight.

    Args:
        a: (N, \*D).
        b: (N, \*D), of the shape, dtype and device of `a`.

    Returns:
        (N,), in the accumulation dtype. Twice differentiable in both. Reads 2ND numbers, writes N.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for a shape or device unlike that of `a`.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> functional.gradient_difference(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([3., 3.])
    """
    _check_pair("gradient_difference", "a", a, "b", b)
    return _call("gradient_difference", a, b)


def covariance_product(gradient: Tensor, covariance: Tensor) -> Tensor:
    r"""The product with a covariance over pixel displacements, :math:`\Sigma g`.

    .. math:: (\Sigma g)[c, i] = \sum_{c', j} K[c, c', j - i]\, g[c', j]

    It equals ``F.conv2d(gradient, covariance, padding=(P - 1, Q - 1))``.

    Args:
        gradient: (N, C, H, W).
        covariance: K, (C, C, 2P-1, 2Q-1) with P <= H and Q <= W: displacement zero is at
            [P-1, Q-1], and K is zero beyond. Its dtype is that of `gradient` or its accumulation
            dtype.

    Returns:
        (N, C, H, W), dtype of `gradient`. Twice differentiable in `gradient`.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for a shape or device that does not fit, or a covariance that requires grad.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> identity = torch.zeros(1, 1, 3, 5)
        >>> identity[..., 1, 2] = 1
        >>> functional.covariance_product(torch.ones(1, 1, 2, 3), 2 * identity)
        tensor([[[[2., 2., 2.],
                  [2., 2., 2.]]]])
    """
    _check_covariance("covariance_product", gradient, covariance)
    return _call("covariance_product", gradient, covariance)


def covariance_form(gradient: Tensor, covariance: Tensor) -> Tensor:
    r"""The quadratic form :math:`g_i^T \Sigma g_i` of SGR (Roth et al. 2018, Eq. 11, twice it).

    Args:
        gradient: (N, C, H, W).
        covariance: K, (C, C, 2P-1, 2Q-1), as for `covariance_product`.

    Returns:
        (N,), in the accumulation dtype. Twice differentiable in `gradient`. Negative values mean
        that the covariance is not positive semidefinite.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for a shape or device that does not fit, or a covariance that requires grad.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> functional.covariance_form(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 5))
        tensor([36.])
    """
    _check_covariance("covariance_form", gradient, covariance)
    return _call("covariance_form", gradient, covariance)


def autocovariance(perturbation: Tensor, unbiased: bool = True) -> Tensor:
    r"""The second moment of perturbations over pixel displacements (Roth et al. 2018, Eq. 16).

    .. math:: K[c, c', d] = \frac{1}{N} \sum_n \frac{1}{M(d)} \sum_i p_{nc}(i)\, p_{nc'}(i + d)

    Args:
        perturbation: (N, C, H, W).
        unbiased: M(d) is the number of pixel pairs at displacement d, which makes the estimate
            unbiased; otherwise M = HW, which makes it positive semidefinite.

    Returns:
        (C, C, 2H-1, 2W-1), in the accumulation dtype; zeros for an empty batch. Not differentiable.

    Raises:
        TypeError: for an argument of another type, or a dtype not listed above.
        ValueError: for another number of dimensions.

    Example:
        >>> import torch
        >>> from robustkern import functional
        >>> functional.autocovariance(torch.ones(1, 1, 1, 3), unbiased=False)
        tensor([[[[0.3333, 0.6667, 1.0000, 0.6667, 0.3333]]]])
    """
    _check_image("autocovariance", "perturbation", perturbation)
    if not isinstance(unbiased, bool):
        raise TypeError(f"autocovariance: unbiased must be a bool, got {type(unbiased).__name__}")
    return _call("autocovariance", perturbation.detach(), unbiased)


def show_config() -> None:
    """Print which kernel serves each op on each kind of device, as the dispatcher will choose it.

    Example:
        >>> from robustkern import show_config
        >>> show_config()  # doctest: +ELLIPSIS
        op                   CPU...
        ...
    """
    print(f"{'op':<20} {'CPU':<10} {'CUDA':<10}")
    for op in ops.__all__:
        print(f"{op:<20} {kernel_of(op, 'CPU'):<10} {kernel_of(op, 'CUDA'):<10}")


def _call(name: str, *arguments: Any) -> Tensor:
    # A kernel sees one tensor at a time; transforms (jvp, vmap, grad) need what it is made of.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    function: Callable[..., Tensor] = getattr(
        reference if transformed else torch.ops.robustkern, name
    )
    return function(*arguments)


def _check_batch(function: str, argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {argument} must be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: {argument} must be float64, float32, bfloat16 or float16, "
            f"got {tensor.dtype}"
        )
    if tensor.dim() < 2:
        raise ValueError(f"{function}: {argument} must be (N, *D), got {tuple(tensor.shape)}")


def _check_pair(function: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    _check_batch(function, first, a)
    _check_batch(function, second, b)
    if b.dtype != a.dtype:
        raise TypeError(
            f"{function}: {second} must have {first}'s dtype, got {a.dtype} and {b.dtype}"
        )
    if b.shape != a.shape:
        raise ValueError(
            f"{function}: {second} must have {first}'s shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    _check_device(function, first, a, second, b)


def _check_device(function: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    if b.device != a.device:
        raise ValueError(
            f"{function}: {second} must be on {first}'s device, got {a.device} and {b.device}"
        )


def _check_image(function: str, argument: str, tensor: Tensor) -> None:
    _check_batch(function, argument, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{function}: {argument} must be (N, C, H, W), got {tuple(tensor.shape)}")
    if 0 in tensor.shape[1:]:
        raise ValueError(
            f"{function}: {argument} must have at least one channel and pixel, "
            f"got {tuple(tensor.shape)}"
        )


def _check_covariance(function: str, gradient: Tensor, covariance: Tensor) -> None:
    _check_image(function, "gradient", gradient)
    _check_batch(function, "covariance", covariance)
    if covariance.dtype not in (gradient.dtype, accumulation_dtype(gradient)):
        raise TypeError(
            f"{function}: covariance must have gradient's dtype or {accumulation_dtype(gradient)}, "
            f"got {gradient.dtype} and {covariance.dtype}"
        )
    channels, height, width = gradient.shape[1:]
    largest = (2 * height - 1, 2 * width - 1)
    fits = covariance.dim() == 4 and all(
        size % 2 == 1 and size <= most
        for size, most in zip(covariance.shape[2:], largest, strict=True)
    )
    if not fits or tuple(covariance.shape[:2]) != (channels, channels):
        raise ValueError(
            f"{function}: covariance must be (C, C, 2P-1, 2Q-1), at most "
            f"{(channels, channels, *largest)} for gradient {tuple(gradient.shape)}, "
            f"got {tuple(covariance.shape)}"
        )
    _check_device(function, "gradient", gradient, "covariance", covariance)
    if covariance.requires_grad:
        raise ValueError(
            f"{function}: covariance must not require grad (only gradient is differentiated), "
            "got requires_grad=True"
        )


def _check_number(function: str, argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    if not -torch.inf < value < torch.inf:
        raise ValueError(f"{function}: {argument} must be finite, got {value!r}")
