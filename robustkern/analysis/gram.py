r"""The input Hessian of piecewise-linear networks, exactly, from one input gradient per class.

With f the outputs, p their softmax and J = df/dx, the Hessian of the cross entropy in x is

.. math:: H = J^T (\mathrm{diag}\,p - p p^T) J + \sum_k (p_k - y_k) \nabla^2 f_k

Its first part, the Gauss-Newton matrix, is positive semidefinite, of rank K - 1 at most, and does
not depend on the target. The second is zero where the outputs are linear around x.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustkern.analysis.samples import (
    check_count,
    check_inputs,
    check_network,
    input_gradient,
    logits,
    repeatable,
)
from robustkern.gradients.network import _nodes_between

__all__ = ["GaussNewton", "curved_operations", "gauss_newton"]

# Linear around all points but those of a kink, in whatever they are applied to. Torch numbers its
# own: without a number it is a custom function, whatever its name.
_PIECEWISE_LINEAR = re.compile(
    r"(Relu|LeakyRelu|Hardtanh|Threshold|Abs|Clamp|ClampMin|ClampMax|Where|Max"
    r"|Min|Amax|Amin|Maximum|Minimum|Sort|Topk|MaxPool\w*|AdaptiveMaxPool\w*|AvgPool\w*"
    r"|AdaptiveAvgPool\w*|MkldnnMaxPool\w*|MkldnnAdaptiveAvgPool\w*|Mean|Sum|Cumsum|Add|Sub|Rsub"
    r"|Neg|Alias|View|UnsafeView|ReshapeAlias|Permute|Transpose|T|Mt|Squeeze|Unsqueeze|Expand"
    r"|Repeat|Flip|Roll|Clone|ToCopy|AsStrided|Select|Slice|Index|IndexSelect"
    r"|Gather|Cat|Stack|Split|SplitWithSizes|Unbind|Unfold|Im2Col|Col2Im|ConstantPadNd"
    r"|ReflectionPad\w*|ReplicationPad\w*|PixelShuffle|PixelUnshuffle|Upsample\w*"
    r"|MaskedFill)Backward\d+|AccumulateGrad"
)
# Linear in each of what they multiply, but not in several at once.
_MULTILINEAR = re.compile(
    r"(Mul|Div|Mm|Mv|Bmm|Addmm|Addmv|Addbmm|Baddbmm|Dot|Linear|MkldnnLinear|Convolution"
    r"|ConvolutionOverrideable|MkldnnConvolution|CudnnConvolution|Prelu|PreluKernel"
    r"|(Native|Cudnn|Miopen)BatchNorm)Backward\d+"
)


@dataclass(frozen=True)
class GaussNewton:
    r"""Eigenpairs of :math:`J^T (\mathrm{diag}\,p - p p^T) J`; all others are zero.

    Attributes:
        values: (N, r), in descending order, not negative; r is the lesser of classes - 1 and d.
        vectors: (N, r, \*D), orthonormal.
        exact: whether this is the Hessian, the network being piecewise linear.
        note: what this is, in words, and why.
    """

    values: Tensor
    vectors: Tensor
    exact: bool
    note: str

    @property
    def frobenius(self) -> Tensor:
        """The Frobenius norm of each sample's matrix, (N,)."""
        largest = self.values[:, :1]
        scale = largest.masked_fill(largest == 0, 1)
        relative: Tensor = torch.linalg.vector_norm(self.values / scale, dim=1)
        return relative * largest[:, 0]

    def spectrum(self) -> Tensor:
        """All eigenvalues with the zeros, (N, d), in descending order."""
        size = self.vectors[0, 0].numel()
        return nn.functional.pad(self.values, (0, size - self.values.shape[1]))


def gauss_newton(model: nn.Module, inputs: Tensor, *, batch_size: int = 256) -> GaussNewton:
    r"""The cross entropy's Gauss-Newton matrix in x, which a piecewise-linear network's Hessian is.

    It is :math:`A^T A` with a row :math:`\sqrt{p_k} (\nabla f_k - \sum_j p_j \nabla f_j)` of A for
    each class, so its eigenvalues that are not zero are those of the K x K Gram matrix
    :math:`A A^T`; they are found as squared singular values of A, which keeps the small ones.

    Args:
        model: maps (N, \*D) to (N, classes), logits, each sample on its own and at each call alike:
            without batch norm, dropout or spectral norm in training mode. It and its `.grad` are
            left as they are.
        inputs: (N, \*D) floating point, on the device of the model.
        batch_size: samples per pass; each costs a forward and an input gradient per class, which
            are kept together in float64.

    Returns:
        The eigenpairs, float32 or better, detached, and whether they are the Hessian's.

    Raises:
        TypeError: `model` is no module or returns no tensor, or `inputs` are not floating point.
        ValueError: no samples, outputs that are not (N, classes) or not finite, `batch_size` below
            1, or a network whose samples have no Hessian of their own.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2)), torch.nn.init.zeros_(model.bias)
        >>> found = gauss_newton(model, torch.zeros(1, 2))
        >>> found.values, found.exact
        (tensor([[0.5000]]), True)
    """
    caller = "gauss_newton"
    check_inputs(caller, model, inputs)
    check_count(caller, "batch_size", batch_size)
    check_network(caller, model)
    with repeatable(caller, model, inputs.device):
        found = [_eigenpairs(caller, model, x) for x in torch.split(inputs, batch_size)]
    curved = tuple(dict.fromkeys(name for *_, names in found for name in names))
    if curved:
        note = f"only the Gauss-Newton part: not piecewise linear are {', '.join(curved)}"
    else:
        note = "the Hessian: the network is piecewise linear"
    return GaussNewton(
        torch.cat([values for values, *_ in found]),
        torch.cat([vectors for _, vectors, _ in found]),
        not curved,
        note,
    )


def curved_operations(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    r"""The operations of a network that are not piecewise linear in its inputs.

    They are read from autograd's graph of the outputs, so functions count as layers do. What is
    unknown counts as curved: compiled models, custom functions, writes in place to a part of a
    tensor.

    Args:
        model: as `gauss_newton` takes it.
        inputs: (N, \*D); one sample is enough.

    Returns:
        Their names in autograd, sorted; none for a network of convolutions, linear layers, ReLUs,
        pooling, batch norm in eval mode and the like.

    Raises:
        TypeError: as `gauss_newton`.
        ValueError: as `gauss_newton`.

    Example:
        >>> import torch
        >>> layers = [torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.GELU()]
        >>> curved_operations(torch.nn.Sequential(*layers), torch.zeros(1, 2))
        ('Gelu',)
    """
    caller = "curved_operations"
    check_inputs(caller, model, inputs)
    check_network(caller, model)
    with torch.inference_mode(False), torch.enable_grad():
        x = inputs.detach().clone().requires_grad_()
        with repeatable(caller, model, x.device):
            return _curved(logits(caller, model, x), x)


def _curved(outputs: Tensor, x: Tensor) -> tuple[str, ...]:
    through = _nodes_between(outputs.grad_fn, x)
    found = set()
    for node in through:
        name = node.name().split("::")[-1]
        moving = [before in through for before, _ in node.next_functions]
        linear = bool(_MULTILINEAR.fullmatch(name)) and sum(moving) <= 1
        linear = linear and not (name.startswith("Div") and moving[1])
        linear = linear and not getattr(node, "_saved_training", False)  # batch norm's
        if not (linear or _PIECEWISE_LINEAR.fullmatch(name)):
            found.add(re.sub(r"Backward\d*$", "", name))
    return tuple(sorted(found))


def _eigenpairs(caller: str, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        outputs = logits(caller, model, x)
        curved = _curved(outputs, x)
        # Against the likeliest class: its own row is then exactly zero, and where it takes nearly
        # all of p nothing cancels.
        likeliest = outputs.detach().argmax(1, keepdim=True)
        differences = outputs - outputs.gather(1, likeliest)
        rows = torch.stack(
            [
                input_gradient(column.sum(), x, retain_graph=True)
                for column in differences.unbind(1)
            ],
            1,
        )
    weights = outputs.detach().double().softmax(1)[:, :, None]
    jacobian = rows.flatten(2).double()
    factor = weights.sqrt() * (jacobian - (weights * jacobian).sum(1, keepdim=True))
    directions, triangle = torch.linalg.qr(factor.mT)
    rotation, singular, _ = torch.linalg.svd(triangle)
    count = min(outputs.shape[1] - 1, x[0].numel())
    vectors = (directions @ rotation[:, :, :count]).mT.reshape(len(x), count, *x.shape[1:])
    dtype = torch.promote_types(x.dtype, torch.float32)
    return singular[:, :count].square().to(dtype), vectors.to(dtype), curved
