r"""The first-order engine: parameter gradients of penalties on input gradients, from plain passes.

A penalty is a function R of the input gradients g_j at a few points X_j. With V_j = dR/dg_j,

.. math:: \frac{dR}{d\theta} = \sum_j \frac{d}{d\theta} \langle V_j, g_j \rangle
    = \sum_j \lim_{e \to 0} \frac{G(X_j + e V_j) - G(X_j)}{e}

where G(X) is the parameter gradient of the summed loss at X. So the passes are ordinary ones:
one at each X_j, which gives g_j and G(X_j) at once, and one at each X_j + e V_j. One e serves the
whole batch, which makes the result a weighted sum of training gradients. Losses are batch means
here, so the weight is c = N / e; it is rounded to a power of two, for which scaling a loss is exact
in every dtype.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern import functional
from robustkern.reference.samples import widen

if TYPE_CHECKING:
    from robustkern.penalties import Penalty

__all__ = ["Step", "backward", "loss_term"]

LossFn = Callable[[Tensor, Tensor], Tensor]
Grads = list[Tensor | None]

# The automatic shift, in standard deviations of the inputs, by the dtype the network computes in:
# bench/bench_shift.py measures the agreement with double backward that it rests on.
_SHIFTS = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.bfloat16: 1e-2,
    torch.float16: 3e-3,
}
# A weight c below this adds nothing that float32 could hold, and N / c must not overflow.
_SMALLEST_WEIGHT = 1e-30


@dataclass(frozen=True)
class Step:
    """What one call of `backward` computed; all detached.

    Attributes:
        loss: the training loss at the inputs; 0-dimensional.
        penalty: the penalty's value, its weight included; 0-dimensional.
        outputs: the network's outputs at the inputs, in training mode as the call found it.
    """

    loss: Tensor
    penalty: Tensor
    outputs: Tensor


def backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    penalty: "Penalty",
    *,
    loss_fn: LossFn = F.cross_entropy,
    shift: float | str = "auto",
    scaler: torch.amp.GradScaler | None = None,
    batch_norm: str = "batch",
) -> Step:
    r"""Take the place of `loss.backward()`: add the gradient of loss + penalty to `.grad`.

    Ordinary forward and backward passes only, so it works wherever training does. Their number, in
    plain training steps: 2 for a penalty of g(x) alone, 4 for CURE, 3 for anchored CURE, and what
    the union of their points needs for a sum. One graph is alive at a time, and two copies of the
    parameter gradients at most besides what was in `.grad`. Random layers see the same random
    numbers in every pass; running statistics and the random state move as in one plain step. If
    anything raises, `.grad`, buffers, training mode, random state and the penalty's own state are
    as they were.

    Only the model's parameters, and those of a `loss_fn` that is a module, get gradients: not the
    inputs, and not what else the loss was made of. Hooks on parameters see the gradient of every
    pass. Checkpointing within the model must not be reentrant (`use_reentrant=False`).

    Args:
        model: the network. Run it inside `torch.autocast` as for a plain step.
        inputs: (N, \*D), floating.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        loss_fn: called as loss_fn(outputs, targets), returns the batch mean. If it is a module, its
            parameters get their gradients too.
        shift: root-mean-square displacement of the finite difference, per input element, over the
            samples that move, in input units; met within a factor of 1.5. "auto" chooses it from
            the dtype of the computation and the standard deviation of the inputs.
        scaler: scales every loss; `.grad` is left scaled, for `scaler.step`. An overflow in any
            pass makes `.grad` non-finite, so the scaler sees it.
        batch_norm: "batch" normalizes each pass by its own batch; "eval" takes the penalty's passes
            in eval mode, as the authors of CURE do, at one pass more in training mode.

    Returns:
        The loss, the penalty and the outputs of the clean pass.

    Raises:
        TypeError: for an argument of another type, or a model, loss or penalty that returns no
            tensor of the right kind.
        ValueError: for inputs and targets of different lengths, an empty batch, no parameter that
            requires grad, an option or shift out of range, or a penalty whose `value` depends on
            other gradients for other values of them.

    Example:
        >>> import torch
        >>> import robustkern
        >>> model = torch.nn.Linear(4, 3)
        >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 3
        >>> penalty = robustkern.GradientPenalty(weight=0.1)
        >>> step = robustkern.backward(model, inputs, targets, penalty)
        >>> step.loss.shape, step.outputs.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([8, 3]), torch.Size([3, 4]))
    """
    _check("backward", model, inputs, targets, penalty, loss_fn)
    if batch_norm not in ("batch", "eval"):
        raise ValueError(f"backward: batch_norm must be 'batch' or 'eval', got {batch_norm!r}")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"backward: scaler must be a GradScaler, got {type(scaler).__name__}")
    passes = _Passes("backward", model, inputs, targets, loss_fn, _check_shift(shift), scaler)
    with _undone_on_error(passes, penalty) as replay:
        due = penalty.due()
        if due is None:
            loss, outputs = passes.plain()
            value = torch.zeros_like(loss)
        elif batch_norm == "eval" and any(m.training for m in _modules(model, but=penalty)):
            loss, outputs = passes.plain()
            clean = _take(passes.parameters)
            with _eval_mode(_modules(model, but=penalty)):
                value, _, _ = passes.penalized(due, _Replay(passes, penalty), with_loss=False)
            _add(passes.parameters, clean)
        else:
            value, loss, outputs = passes.penalized(due, replay, with_loss=True)
    return Step(loss, value, outputs)


def loss_term(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    penalty: "Penalty",
    *,
    loss_fn: LossFn = F.cross_entropy,
    method: str = "double_backward",
) -> Tensor:
    r"""The penalty's value with a derivative in the parameters, to be added to a loss.

    Its passes leave the model's buffers, running statistics among them, as they are.

    Args:
        model: the network.
        inputs: (N, \*D), floating.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        loss_fn: called as loss_fn(outputs, targets), returns the batch mean.
        method: "double_backward" is exact and keeps a graph for every point; "first_order" computes
            the gradient here, as `backward` does, and its backward hands it out.

    Returns:
        The value, 0-dimensional; differentiable once with respect to the parameters.

    Raises:
        TypeError: as `backward`.
        ValueError: as `backward`, or for another method.
        RuntimeError: for double backward through a compiled model, which has no second derivative.
    """
    caller = type(penalty).__name__
    _check(caller, model, inputs, targets, penalty, loss_fn)
    if method not in ("double_backward", "first_order"):
        raise ValueError(
            f"{caller}: method must be 'double_backward' or 'first_order', got {method!r}"
        )
    if method == "double_backward" and _is_compiled(model):
        raise RuntimeError(
            f"{caller}: a compiled model has no double backward; use robustkern.backward(model, "
            'inputs, targets, penalty) or method="first_order"'
        )
    recorded = torch.is_grad_enabled()
    passes = _Passes(caller, model, inputs, targets, loss_fn, None, None)
    with _undone_on_error(passes, penalty) as replay:
        due = penalty.due()
        if due is None:
            return torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        if method == "double_backward" or not recorded:
            return passes.differentiable(due, replay, create_graph=recorded)
        value, _, _ = passes.penalized(due, replay, with_loss=False)
        gradients = _take(passes.parameters)
    term: Tensor = _Known.apply(value, gradients, *passes.parameters)  # type: ignore[no-untyped-call]
    return term


class _Known(torch.autograd.Function):
    """A scalar whose derivatives in the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Grads, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[None if g is None else grad * g for g in ctx.gradients]


class _Passes:
    """The forward and backward passes of one call."""

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss_fn: LossFn,
        shift: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.caller, self.model, self.loss_fn = caller, model, loss_fn
        self.inputs, self.targets, self.samples = inputs, targets, inputs.shape[0]
        self.modules = [model, loss_fn] if isinstance(loss_fn, nn.Module) else [model]
        parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.parameters: list[Tensor] = list(dict.fromkeys(parameters))  # once, where shared
        if not self.parameters and torch.is_grad_enabled():
            raise ValueError(f"{caller}: model must have a parameter that requires grad, got none")
        self.shift, self.compute_dtype = shift, _compute_dtype(inputs)
        one = torch.ones((), device=inputs.device)
        self.scale: Tensor | float = 1.0 if scaler is None else scaler.scale(one)

    def plain(self) -> tuple[Tensor, Tensor]:
        """An ordinary training pass: its loss and outputs, detached."""
        outputs, loss = self._evaluate(self.inputs, None)
        self._backward(loss)
        return loss.detach(), outputs.detach()

    def penalized(
        self, penalty: "Penalty", replay: "_Replay", with_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leave in `.grad`, None until now, dR/dtheta, plus the loss's gradient if asked for.

        Two copies of the parameter gradients exist at most: `.grad`, which gathers the G(X_j) of
        the points that move and then the shifted passes; and `held`, the gradient of the loss,
        wherever it may not be mixed with the other.

        Returns:
            The penalty, the loss and the outputs at the inputs, detached.

        Raises:
            ValueError: if what the penalty depends on changes with the gradients' values.
        """
        held: Grads | None = None
        x = self.inputs.detach().requires_grad_()
        outputs, potential = self._evaluate(x, penalty)
        loss = potential
        if with_loss:
            replay.mark_buffers()
            if penalty.has_objective():
                loss = self._loss(outputs)
                self._backward(loss, retain_graph=True)
                held = _take(self.parameters)
        self._backward(potential, x)
        mixed = with_loss and held is None  # .grad is that of the loss and of the objective
        loss, outputs = loss.detach(), outputs.detach()
        gradients = [self._input_gradient(x)]
        points = self._points(penalty, gradients[0])
        replay.mark_random()
        if points:
            moves = self._dependence(penalty, gradients[0], len(points))
            if mixed:
                held = _copy(self.parameters) if moves[0] else _take(self.parameters)
                mixed = False
            elif not moves[0]:
                _take(self.parameters)
            for point, moved in zip(points, moves[1:], strict=True):
                replay.rewind()
                x = point.detach().requires_grad_()
                _, potential = self._evaluate(x, penalty)
                self._backward(potential, x, parameters=moved)
                gradients.append(self._input_gradient(x))

        value, cotangents = self._cotangents(penalty, gradients)
        found = [v is not None for v in cotangents]
        if points and found != moves:
            raise ValueError(
                f"{self.caller}: {type(penalty).__name__}.value must depend on the same gradients "
                f"whatever their values, got {moves} and {found}"
            )
        moving = [
            (point, v)
            for point, v in zip([self.inputs, *points], cotangents, strict=True)
            if v is not None
        ]
        step, weight = self._step([v for _, v in moving])
        # So far .grad is the sum of the G(X_j). In the end: the loss's, and c (shifted - that sum).
        if moving:
            _scale(self.parameters, float(mixed) - weight)
        elif not mixed:
            _take(self.parameters)
        if held is not None:
            _add(self.parameters, held)
        del held
        for point, v in moving:
            replay.rewind()
            shifted = (widen(point) + step * widen(v)).to(point.dtype)
            _, potential = self._evaluate(shifted, penalty)
            self._backward(potential * weight)
        replay.settle()
        return value.detach(), loss, outputs

    def differentiable(self, penalty: "Penalty", replay: "_Replay", create_graph: bool) -> Tensor:
        """The penalty's value with the graph of all its input gradients."""

        def gradient_at(point: Tensor) -> Tensor:
            x = point.detach().requires_grad_()
            _, potential = self._evaluate(x, penalty)
            with self._full_precision():
                (g,) = torch.autograd.grad(
                    potential, x, create_graph=create_graph, materialize_grads=True
                )
                return self.samples * g

        gradients = [gradient_at(self.inputs)]
        points = self._points(penalty, gradients[0].detach())
        replay.mark_random()
        for point in points:
            replay.rewind()
            gradients.append(gradient_at(point))
        replay.settle()
        with self._full_precision():
            return self._value(penalty, gradients)

    def _full_precision(self) -> torch.autocast:
        """Forward passes run under the caller's autocast, all else outside it."""
        return torch.autocast(self.inputs.device.type, enabled=False)

    def _evaluate(self, x: Tensor, penalty: "Penalty | None") -> tuple[Tensor, Tensor]:
        """Outputs at x, and the batch mean whose input gradient is meant."""
        outputs = self.model(x)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{self.caller}: model must return a Tensor, got {type(outputs).__name__}"
            )
        if penalty is None or not penalty.has_objective():
            return outputs, self._loss(outputs)
        objective = penalty.objective(outputs, self.targets)
        if not isinstance(objective, Tensor) or objective.shape != (self.samples,):
            raise TypeError(
                f"{self.caller}: {type(penalty).__name__}.objective must return a Tensor of shape "
                f"({self.samples},), got {_describe(objective)}"
            )
        return outputs, objective.mean()

    def _loss(self, outputs: Tensor) -> Tensor:
        loss = self.loss_fn(outputs, self.targets)
        if not isinstance(loss, Tensor) or loss.dim():
            raise TypeError(
                f"{self.caller}: loss_fn must return the batch mean, a 0-dimensional Tensor, "
                f"got {_describe(loss)}"
            )
        return loss

    def _backward(
        self,
        potential: Tensor,
        *points: Tensor,
        parameters: bool = True,
        retain_graph: bool = False,
    ) -> None:
        """Backward into the `.grad` of points and parameters, and of no other leaf."""
        with self._full_precision():
            torch.autograd.backward(
                potential * self.scale,
                inputs=[*points, *(self.parameters if parameters else [])],
                retain_graph=retain_graph,
            )

    def _input_gradient(self, x: Tensor) -> Tensor:
        """The gradient of the summed loss, from what `_backward` left at x."""
        if x.grad is None:  # the network does not look at its input
            return torch.zeros_like(x)
        return x.grad * (self.samples / self.scale)

    def _points(self, penalty: "Penalty", gradient: Tensor) -> list[Tensor]:
        with self._full_precision(), torch.no_grad():
            points = list(penalty.points(self.inputs.detach(), gradient))
        for point in points:
            if not isinstance(point, Tensor) or point.shape != self.inputs.shape:
                raise TypeError(
                    f"{self.caller}: {type(penalty).__name__}.points must return Tensors of the "
                    f"inputs' shape {tuple(self.inputs.shape)}, got {_describe(point)}"
                )
        return points

    def _value(self, penalty: "Penalty", gradients: list[Tensor]) -> Tensor:
        value = penalty.value(*gradients)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise TypeError(
                f"{self.caller}: {type(penalty).__name__}.value must return a 0-dimensional "
                f"floating Tensor, got {_describe(value)}"
            )
        return value

    def _cotangents(
        self, penalty: "Penalty", gradients: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """R and V_j = dR/dg_j; None where R does not depend on g_j at all."""
        with self._full_precision():
            leaves = [g.detach().requires_grad_() for g in gradients]
            value = self._value(penalty, leaves)
            if not value.requires_grad:
                return value, (None,) * len(leaves)
            return value, torch.autograd.grad(value, leaves, allow_unused=True)

    def _dependence(self, penalty: "Penalty", gradient: Tensor, points: int) -> list[bool]:
        """Which gradients R depends on, found before the passes that need to know it."""
        _, cotangents = self._cotangents(penalty, [gradient] * (1 + points))
        return [v is not None for v in cotangents]

    def _step(self, cotangents: list[Tensor]) -> tuple[Tensor | float, Tensor | float]:
        """The step e along the cotangents and the weight c = N / e, a power of two; or 0 and 0."""
        if not cotangents:
            return 0.0, 0.0
        with self._full_precision():
            norms = torch.cat([functional.gradient_norm(v, 2) for v in cotangents])
            moving = (norms > 0).sum().clamp_min(1) * cotangents[0][0].numel()
            length = (norms * norms).sum().div(moving).sqrt()
            shift: Tensor | float | None = self.shift
            if shift is None:
                deviation = widen(self.inputs).std(correction=0)
                shift = _SHIFTS[self.compute_dtype] * torch.where(deviation > 0, deviation, 1)
            # Times sqrt(2), then down to a power of two: within a factor sqrt(2) of what was asked.
            weight = (2**0.5 * self.samples * length / shift).float()
            weight = (weight.view(torch.int32) & 0x7F800000).view(torch.float32)
            weight = torch.where(weight < _SMALLEST_WEIGHT, 0, weight)
            return torch.where(weight > 0, self.samples / weight, 0), weight


class _Replay:
    """Makes every pass see what the first one saw, and leaves what the first one left.

    That is the random state, and the buffers of model and loss: running statistics move once, and a
    buffer that enters the computation (spectral norm's) is the same in all passes. A penalty that
    the model holds is left alone.
    """

    def __init__(self, passes: _Passes, penalty: "Penalty") -> None:
        self.device = passes.inputs.device
        self.modules = [m for part in passes.modules for m in _modules(part, but=penalty)]
        if not any(module.training for module in self.modules):
            self.modules = []
        self.buffers_before = self.buffers_after = self._buffers()
        self.random_before = self.random_after = _random_state(self.device)

    def mark_buffers(self) -> None:
        """These buffers are the ones to leave."""
        self.buffers_after = self._buffers()

    def mark_random(self) -> None:
        """This random state is the one to leave."""
        self.random_after = _random_state(self.device)

    def rewind(self) -> None:
        """Back to the state before the first pass."""
        self._set(self.buffers_before, self.random_before)

    def settle(self) -> None:
        """On to the state that was marked."""
        self._set(self.buffers_after, self.random_after)

    def _buffers(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """Each buffer's place, the tensor that is there, and a copy of its values."""
        return [
            (module, name, buffer, buffer.clone())
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _set(
        self, buffers: list[tuple[nn.Module, str, Tensor, Tensor]], random: list[Tensor]
    ) -> None:
        for module, name, buffer, value in buffers:
            # .data: a graph of the caller's may have saved the buffer, and its value is given back.
            buffer.data.copy_(value)
            module._buffers[name] = buffer
        torch.set_rng_state(random[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(random[1], self.device)


def _modules(model: nn.Module, but: nn.Module) -> list[nn.Module]:
    """The model's modules, without those of a penalty that it may hold."""
    without = set(but.modules())
    return [module for module in model.modules() if module not in without]


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def _undone_on_error(passes: _Passes, penalty: "Penalty") -> Iterator[_Replay]:
    """Adds the gradients computed inside to `.grad`; after an error nothing has happened."""
    replay = _Replay(passes, penalty)
    state = copy.deepcopy(penalty.state_dict())
    held = _take(passes.parameters)
    try:
        with torch.enable_grad():
            yield replay
    except BaseException:
        for parameter, grad in zip(passes.parameters, held, strict=True):
            parameter.grad = grad
        replay.rewind()
        penalty.load_state_dict(state, strict=False)
        raise
    _add(passes.parameters, held)


@contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _take(parameters: list[Tensor]) -> Grads:
    """Move the gradients out of `.grad`."""
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def _copy(parameters: list[Tensor]) -> Grads:
    return [None if p.grad is None else p.grad.clone() for p in parameters]


@torch.no_grad()
def _scale(parameters: list[Tensor], factor: Tensor | float) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor)


@torch.no_grad()
def _add(parameters: list[Tensor], grads: Grads) -> None:
    """Put gradients back into `.grad`, adding what has come there meanwhile."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            if parameter.grad is not None:
                grad += parameter.grad
            parameter.grad = grad


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and any(
        isinstance(m, dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in model.modules()
    )


def _check_shift(shift: float | str) -> float | None:
    """The shift as a number, or None for "auto"."""
    if shift == "auto":
        return None
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise TypeError(f"backward: shift must be a number or 'auto', got {shift!r}")
    if not 0 < shift < torch.inf:
        raise ValueError(f"backward: shift must be positive and finite, got {shift!r}")
    return float(shift)


def _compute_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype whose rounding the shift must stand out from."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if device == "cuda" and inputs.dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
        return torch.float16  # TF32 has its significand
    return inputs.dtype


def _check(
    caller: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    penalty: "Penalty",
    loss_fn: LossFn,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a Module, got {type(model).__name__}")
    if not isinstance(inputs, Tensor) or inputs.dtype not in _SHIFTS or inputs.dim() < 2:
        raise TypeError(
            f"{caller}: inputs must be a floating Tensor (N, *D), got {_describe(inputs)}"
        )
    if not inputs.numel():
        raise ValueError(f"{caller}: inputs must not be empty, got {tuple(inputs.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"{caller}: targets must be a Tensor, got {type(targets).__name__}")
    if targets.dim() == 0 or targets.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"{caller}: targets must be as many as inputs, "
            f"got {tuple(inputs.shape)} and {tuple(targets.shape)}"
        )
    if not isinstance(penalty, nn.Module) or not hasattr(penalty, "due"):
        raise TypeError(f"{caller}: penalty must be a Penalty, got {type(penalty).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"{caller}: loss_fn must be callable, got {type(loss_fn).__name__}")


def _describe(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"a {thing.dtype} Tensor of shape {tuple(thing.shape)}"
    return type(thing).__name__
