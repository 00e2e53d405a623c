"""The Hessian of each sample's loss in its input, as an operator on all samples at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.samples import check_inputs, check_network, normalized
from robustkern.gradients.network import check_differentiable_twice

__all__ = ["InputHessian"]

SampleLoss = Callable[[Tensor, Tensor], Tensor]
_METHODS = ("finite", "exact")


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each sample, (N,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


class InputHessian:
    r"""The operator :math:`v_i \mapsto H_i v_i`, H_i the input Hessian of the loss of sample i.

    By differences of a finite length h (Moosavi-Dezfooli et al. 2019, Eq. 1), one-sided or central,

    .. math:: H v = \|v\| \frac{g(x + h z) - g(x)}{h}, \quad
        H v = \|v\| \frac{g(x + h z) - g(x - h z)}{2 h}, \qquad z = v / \|v\|_2

    with g the input gradient. The length is finite on purpose: the Hessian at a point says little
    about a network of ReLUs around it. But the map is then linear only where the loss is quadratic
    over that distance, its matrix depends on the basis, that of `dense` being the pixels, and it is
    not symmetric. Products with its transpose do not come from differences, so what needs symmetry
    takes :math:`(H + H^T) / 2` of a matrix: the whole one in `dense`, the projected one in
    `lanczos`.

    Method "exact" is double backward: the Hessian at the point. Both cost a batch of samples a few
    passes. The network keeps its modes, `.grad` and `requires_grad`; its parameters must stay as
    they are while the operator is in use.

    Args:
        model: maps (N, \*D) to outputs that `loss_fn` takes, each sample on its own: without batch
            norm or dropout in training mode.
        inputs: (N, \*D) floating point, on the device of the model.
        targets: N of them, as `loss_fn` takes them.
        loss_fn: `loss_fn(outputs, targets)`, the loss of each sample, (N,).
        method: "finite" or "exact".
        h: L2 length of a finite difference, in input units; positive.
        central: whether a finite difference is central, at one more gradient a product.
        batch_size: samples, and in `dense` columns, per pass; bounds the memory.

    Attributes:
        inputs: (N, \*D), detached.
        gradient: (N, \*D), the input gradient g there, detached.

    Raises:
        TypeError: `model` is no module, `inputs` or `targets` no tensor, `inputs` not floating
            point, `loss_fn` not callable or without a loss for each sample, or a number of another
            type.
        ValueError: another method, h not positive and finite, `batch_size` below 1, no samples,
            `targets` of another length, or a network whose samples have no Hessian of their own.
        RuntimeError: method "exact" and a network without double backward.

    Example:
        >>> import torch
        >>> square = lambda outputs, targets: (outputs - targets).square().sum(1) / 2
        >>> inputs, targets = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> hessian = InputHessian(torch.nn.Identity(), inputs, targets, loss_fn=square)
        >>> hessian(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        loss_fn: SampleLoss = cross_entropies,
        method: str = "finite",
        h: float = 1.5,
        central: bool = False,
        batch_size: int = 256,
    ) -> None:
        _check(model, inputs, targets, loss_fn, method, h, batch_size)
        self._model, self._loss_fn, self._method = model, loss_fn, method
        self._h, self._central, self._batch_size = float(h), central, batch_size
        # Copies, for autograd cannot save what a caller's inference mode has made.
        with torch.inference_mode(False):
            self.inputs, self._targets = inputs.detach().clone(), targets.detach().clone()
            self.gradient = torch.cat(
                [self._gradient(x, y) for x, y in self._batches(self.inputs, self._targets)]
            )

    def __call__(self, vectors: Tensor) -> Tensor:
        r"""The products H_i v_i.

        Args:
            vectors: (N, \*D), of the shape, dtype and device of the inputs.

        Returns:
            (N, \*D), detached; zero where the vector is.

        Raises:
            TypeError: `vectors` is no tensor of the inputs' dtype.
            ValueError: another shape or device.
        """
        if not isinstance(vectors, Tensor) or vectors.dtype != self.inputs.dtype:
            came = vectors.dtype if isinstance(vectors, Tensor) else type(vectors).__name__
            raise TypeError(
                f"InputHessian: vectors must be a {self.inputs.dtype} tensor, got {came}"
            )
        if vectors.shape != self.inputs.shape or vectors.device != self.inputs.device:
            raise ValueError(
                f"InputHessian: vectors must have inputs' shape and device, got "
                f"{tuple(vectors.shape)} on {vectors.device} and "
                f"{tuple(self.inputs.shape)} on {self.inputs.device}"
            )
        rows = (self.inputs, self._targets, self.gradient, vectors)
        return torch.cat([self._products(*batch) for batch in self._batches(*rows)])

    def matrices(self, *, symmetric: bool = True) -> Iterator[Tensor]:
        """The Hessian of one sample after another, each in passes of `batch_size` columns.

        Args:
            symmetric: (H + H^T) / 2, or H as it is.

        Yields:
            (d, d), d the number of elements of an input; column j is the product with pixel j.
        """
        size = self.inputs[0].numel()
        for index in range(len(self.inputs)):
            rows = []
            for start in range(0, size, self._batch_size):
                count = min(self._batch_size, size - start)
                basis = self.inputs.new_zeros(count, size)
                basis.diagonal(start).fill_(1)
                x, targets, gradient = (
                    t[index : index + 1].expand(count, *t.shape[1:])
                    for t in (self.inputs, self._targets, self.gradient)
                )
                vectors = basis.view(count, *self.inputs.shape[1:])
                products = self._products(x, targets, gradient, vectors)
                rows.append(products.reshape(count, size))
            columns = torch.cat(rows).T
            yield (columns + columns.T) / 2 if symmetric else columns

    def dense(self, *, symmetric: bool = True) -> Tensor:
        """The Hessians of all samples: N d^2 numbers, so for small inputs.

        Args:
            symmetric: (H + H^T) / 2, or H as it is.

        Returns:
            (N, d, d), d the number of elements of an input.

        Example:
            >>> import torch
            >>> model, inputs = torch.nn.Linear(2, 2), torch.zeros(1, 2)
            >>> _ = model.weight.data.copy_(torch.eye(2)), torch.nn.init.zeros_(model.bias)
            >>> InputHessian(model, inputs, torch.tensor([0]), method="exact").dense()
            tensor([[[ 0.2500, -0.2500],
                     [-0.2500,  0.2500]]])
        """
        return torch.stack(list(self.matrices(symmetric=symmetric)))

    def _products(self, x: Tensor, targets: Tensor, gradient: Tensor, vectors: Tensor) -> Tensor:
        with torch.inference_mode(False):
            if self._method == "exact":
                return self._derivatives(x, targets, vectors.clone())
            unit, length = normalized(vectors)
            shifted = self._gradient(x + self._h * unit, targets)
            if not self._central:
                return length * ((shifted - gradient) / self._h)
            opposite = self._gradient(x - self._h * unit, targets)
            return length * ((shifted - opposite) / (2 * self._h))

    def _derivatives(self, x: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            _, gradient = self._differentiate(x, targets, create_graph=True)
            if not gradient.requires_grad:
                return torch.zeros_like(vectors)
            (product,) = torch.autograd.grad(gradient, x, vectors, materialize_grads=True)
        return product

    def _gradient(self, x: Tensor, targets: Tensor) -> Tensor:
        """The input gradient; at its first use, at construction, exact ones are tried twice."""
        twice = self._method == "exact"
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            loss, gradient = self._differentiate(x, targets, create_graph=twice)
            if twice and gradient.requires_grad:
                check_differentiable_twice(
                    "InputHessian", x, loss, gradient, instead='method="finite"'
                )
        return gradient.detach()

    def _differentiate(
        self, x: Tensor, targets: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """Of the sum of losses, whose rows are the samples' gradients."""
        check_network("InputHessian", self._model)
        losses = self._loss_fn(self._model(x), targets)
        if not isinstance(losses, Tensor) or losses.shape != x.shape[:1]:
            came = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"InputHessian: loss_fn must return the loss of each sample, ({len(x)},), as with "
                f'reduction="none", got {came}'
            )
        loss = losses.sum()
        if not loss.requires_grad:
            return loss, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(
            loss, x, create_graph=create_graph, materialize_grads=True
        )
        return loss, gradient

    def _batches(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(t, self._batch_size) for t in rows), strict=True)


def _check(
    model: object,
    inputs: object,
    targets: object,
    loss_fn: object,
    method: str,
    h: float,
    batch_size: int,
) -> None:
    caller = "InputHessian"
    check_inputs(caller, model, inputs, batch_size)
    assert isinstance(inputs, Tensor)
    if not isinstance(targets, Tensor):
        raise TypeError(f"{caller}: targets must be a tensor, got {type(targets).__name__}")
    if targets.dim() < 1 or len(targets) != len(inputs):
        raise ValueError(
            f"{caller}: targets must be as many as inputs, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not callable(loss_fn):
        raise TypeError(f"{caller}: loss_fn must be callable, got {type(loss_fn).__name__}")
    if method not in _METHODS:
        raise ValueError(f"{caller}: method must be one of {_METHODS}, got {method!r}")
    if isinstance(h, bool) or not isinstance(h, int | float):
        raise TypeError(f"{caller}: h must be a number, got {type(h).__name__}")
    if not 0 < h < math.inf:
        raise ValueError(f"{caller}: h must be positive and finite, got {h!r}")
