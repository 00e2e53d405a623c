"""The Hessian of each sample's loss in its input, as an operator on all samples at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.analysis.samples import (
    check_count,
    check_inputs,
    check_length,
    check_network,
    normalized,
    repeatable,
)
from robustkern.gradients.network import check_differentiable_twice, describe

__all__ = ["InputHessian"]

SampleLoss = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor], Tensor]
_METHODS = ("finite", "exact")


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each sample, (N,)."""
    if not isinstance(outputs, Tensor) or targets.dtype != torch.int64:
        raise TypeError(
            "InputHessian: cross entropy takes a tensor of outputs and int64 targets, "
            f"got {describe(outputs)} and {describe(targets)}"
        )
    if outputs.dim() != 2 or targets.dim() != 1:
        raise ValueError(
            "InputHessian: cross entropy takes outputs (N, classes) and targets (N,), "
            f"got {describe(outputs)} and {describe(targets)}"
        )
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= outputs.shape[1]:
        raise ValueError(
            f"InputHessian: targets must lie in [0, {outputs.shape[1]}), the model's classes, "
            f"got values from {low} to {high}"
        )
    # In float64, because of a confident network's 1 - p float32 leaves nothing but rounding.
    return F.cross_entropy(outputs.double(), targets, reduction="none")


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
        model: maps (N, \*D) to outputs that `loss_fn` takes, each sample on its own and at each
            call alike: without batch norm, dropout or spectral norm in training mode.
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
            `targets` of another length or no labels, a network whose samples have no Hessian of
            their own, or gradients that are not finite.
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
        _check(model, inputs, targets, loss_fn, method, h, central, batch_size)
        self._model, self._loss_fn, self._method = model, loss_fn, method
        self._h, self._central, self._batch_size = float(h), central, batch_size
        # Copies, for autograd cannot save what a caller's inference mode has made.
        with torch.inference_mode(False):
            self.inputs, self._targets = inputs.detach().clone(), targets.detach().clone()
        # A graph is good for many products, but those of several batches might not fit.
        kept = method == "finite" or len(inputs) <= batch_size
        gradients, self._products = [], list[Product]()
        for x, y in self._batches(self.inputs, self._targets):
            gradient, product = self._around(x, y)
            gradients.append(gradient)
            if kept:
                self._products.append(product)
        self.gradient = torch.cat(gradients)

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
        products = self._products or (
            self._around(x, y)[1] for x, y in self._batches(self.inputs, self._targets)
        )
        rows = zip(products, self._batches(vectors), strict=True)
        return torch.cat([product(v) for product, (v,) in rows])

    def matrices(self, *, symmetric: bool = True) -> Iterator[Tensor]:
        """The Hessian of one sample after another, each in passes of `batch_size` columns.

        Args:
            symmetric: (H + H^T) / 2, or H as it is.

        Yields:
            (d, d), d the number of elements of an input; column j is the product with pixel j.
        """
        size = self.inputs[0].numel()
        count = min(self._batch_size, size)
        for sample, target in zip(self.inputs, self._targets, strict=True):
            _, product = self._around(
                sample.expand(count, *sample.shape), target.expand(count, *target.shape)
            )
            rows = []
            for start in range(0, size, count):
                basis = self.inputs.new_zeros(count, size)
                basis.diagonal(start).fill_(1)
                rows.append(product(basis.view(count, *sample.shape)).reshape(count, size))
            columns = torch.cat(rows)[:size].T
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

    def _around(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Product]:
        """The gradient at x, and the products with the Hessian around it."""
        exact = self._method == "exact"
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            with repeatable("InputHessian", self._model, x.device):
                loss, gradient = self._differentiate(leaf, targets, create_graph=exact)
            constant = not gradient.requires_grad
            if exact and not constant:
                check_differentiable_twice(
                    "InputHessian", leaf, loss, gradient, instead='method="finite"'
                )

        def derivative(vectors: Tensor) -> Tensor:
            if constant:
                return torch.zeros_like(vectors)
            (product,) = torch.autograd.grad(
                gradient, leaf, vectors, retain_graph=True, materialize_grads=True
            )
            return product

        def difference(vectors: Tensor) -> Tensor:
            unit, length = normalized(vectors)
            shifted = self._gradient(x + self._h * unit, targets)
            if not self._central:
                return length * ((shifted - gradient) / self._h)
            opposite = self._gradient(x - self._h * unit, targets)
            return length * ((shifted - opposite) / (2 * self._h))

        def product(vectors: Tensor) -> Tensor:
            with torch.inference_mode(False):
                found = (derivative if exact else difference)(vectors.detach().clone())
            return _finite("products", found)

        return gradient.detach(), product

    def _gradient(self, x: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._differentiate(x.requires_grad_(), targets, create_graph=False)[1]

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
        return loss, _finite("gradients", gradient)

    def _batches(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(t, self._batch_size) for t in rows), strict=True)


def _finite(what: str, found: Tensor) -> Tensor:
    if not found.isfinite().all():
        raise ValueError(
            f"InputHessian: model and loss_fn must have finite {what}, got infinite ones or NaN"
        )
    return found


def _check(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss_fn: SampleLoss,
    method: str,
    h: float,
    central: bool,
    batch_size: int,
) -> None:
    caller = "InputHessian"
    check_inputs(caller, model, inputs)
    check_count(caller, "batch_size", batch_size)
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
    check_length(caller, "h", h)
    if not isinstance(central, bool):
        raise TypeError(f"{caller}: central must be a bool, got {type(central).__name__}")
