"""The forward and backward passes of one step, and what is made of their gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from robustkern import functional
from robustkern.gradients import ranks
from robustkern.gradients.network import Network, check_differentiable_twice, describe
from robustkern.gradients.replay import RandomState, Replay
from robustkern.reference.samples import widen

if TYPE_CHECKING:
    from robustkern.penalties import Penalty

__all__ = ["Grads", "Passes", "add", "has_tf32", "take"]

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
class _Shift:
    """The step e along the cotangents and the weight c = N / e, a power of two; or 0 and 0.

    `displacement` is the root mean square of e V, per input element of the samples that move.
    """

    step: Tensor | float
    weight: Tensor | float
    displacement: Tensor | float


class Passes:
    """The passes of one call, on this rank's samples.

    Args:
        caller: whose name an error has.
        network: the model and the batch.
        shift: root-mean-square displacement, or None for the automatic one.
        scaler: of the losses, or None.
        exchange: what ranks agree on, or None for a call that they do not make together.
    """

    def __init__(
        self,
        caller: str,
        network: Network,
        shift: float | None,
        scaler: torch.amp.GradScaler | None,
        exchange: ranks.Agreement | None,
    ) -> None:
        self.caller, self.network, self._shift = caller, network, shift
        self.inputs, self.parameters = network.inputs, network.parameters
        modules = [part for module in network.modules for part in module.modules()]
        self.replicas, self.shards = ranks.replicas(caller, modules), ranks.shards(modules)
        self._compute_dtype = _compute_dtype(self.inputs, self.parameters, self.shards)
        # Gradients that must be in `.grad` when DDP reduces it.
        self.before_reduction: list[Grads] = []
        one = torch.ones((), device=self.inputs.device)
        self._scale: Tensor | float = 1.0 if scaler is None else scaler.scale(one)
        self._samples: Tensor | int = len(self.inputs)
        self._exchange = exchange
        # This rank's part of all samples. Ranks' gradients are averaged, so its loss counts by how
        # much more samples it has than the average rank.
        self._share: Tensor | None = None
        if exchange is not None and exchange.open:
            counts = ranks.gather(self.inputs.device, len(self.inputs))[:, 0]
            self._samples = counts.sum()
            self._share = (len(self.inputs) / self._samples).to(widen(self.inputs).dtype)
            self._scale = self._scale * (self._share * ranks.size())

    def plain(self) -> tuple[Tensor, Tensor]:
        """An ordinary training pass: its loss and outputs, detached."""
        outputs, loss = self.network.evaluate(self.inputs, None)
        self._backward(loss)
        return loss.detach(), outputs.detach()

    def complete(self) -> None:
        """Make ready for the last pass: all that DDP is to reduce comes into `.grad`, copied."""
        if self._exchange is not None:
            self._exchange.close()
        for grads in self.before_reduction:
            for parameter, grad in zip(self.parameters, grads, strict=True):
                if grad is not None:
                    parameter.grad = (
                        grad.clone() if parameter.grad is None else parameter.grad.add_(grad)
                    )

    def unreduced(self) -> AbstractContextManager[None]:
        """Passes inside leave the gradients of this rank's samples in `.grad`."""
        return ranks.unreduced(self.replicas)

    def penalized(
        self, penalty: "Penalty", replay: Replay, with_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leave in `.grad`, None until now, dR/dtheta, plus the loss's gradient if asked for.

        Two copies of the parameter gradients exist at most: `.grad`, which gathers the G(X_j) of
        the points that move and then the shifted passes; and `held`, the gradient of the loss,
        where it is not among them. DDP reduces `.grad` after the last pass alone.

        Returns:
            The penalty, the loss and the outputs at the inputs, detached, and the displacement.

        Raises:
            ValueError: if what the penalty depends on changes with the gradients' values.
        """
        held: Grads | None = None
        with self.unreduced():
            x = self.inputs.detach().requires_grad_()
            outputs, potential = self.network.evaluate(x, penalty)
            loss = potential
            if with_loss:
                replay.mark_buffers()
                if penalty.has_objective():
                    loss = self.network.loss(outputs)
                    self._backward(loss, retain_graph=True)
                    held = take(self.parameters)
            self._backward(potential, x)
            self._check_reduced()
            mixed = with_loss and held is None  # .grad is that of the loss and of the objective
            loss, outputs = loss.detach(), outputs.detach()
            gradients, losses = [self._input_gradient(x)], self._losses(outputs, penalty)
            points = self._points(penalty, gradients, losses, replay)
            replay.mark_random()
            if points:
                moves = self._dependence(penalty, gradients, losses, len(points))
                if mixed:
                    held = _copy(self.parameters) if moves[0] else take(self.parameters)
                    mixed = False
                elif not moves[0]:
                    take(self.parameters)
                for point, moved in zip(points, moves[1 : 1 + len(points)], strict=True):
                    gradient, loss_there = self._pass_at(point, penalty, replay, moved)
                    gradients.append(gradient)
                    losses += loss_there

            value, cotangents = self._cotangents(penalty, gradients + losses)
            found = [v is not None for v in cotangents]
            if points and found != moves:
                raise ValueError(
                    f"{self.caller}: {type(penalty).__name__}.value must depend on the same "
                    f"gradients whatever their values, got {moves} and {found}"
                )
            places = len(gradients)
            of_losses = cotangents[places:] or (None,) * places
            moving = [
                (point, v, w)
                for point, v, w in zip(
                    [self.inputs, *points], cotangents[:places], of_losses, strict=True
                )
                if v is not None or w is not None
            ]
            along = [v for _, v, _ in moving if v is not None]
            shift = self._shift_along(along)
            # So far .grad is the sum of the G(X_j). In the end: the loss's, and c (shifted - that).
            if along:
                _scale(self.parameters, float(mixed) - shift.weight)
            elif not mixed:
                take(self.parameters)
            if held is not None:
                add(self.parameters, held)
            del held
            if not moving and self.replicas:  # a pass of weight 0, for its reduction
                moving = [(self.inputs, torch.zeros_like(self.inputs), None)]
            for point, v, w in moving[:-1]:
                self._shifted(point, v, w, shift, penalty, replay)
            if len(moving) > 1 and self._share is not None:
                ranks.gather(self.inputs.device)  # have all come so far?
        self.complete()
        for point, v, w in moving[-1:]:
            self._shifted(point, v, w, shift, penalty, replay, last=True)
        replay.settle()
        displacement = torch.as_tensor(shift.displacement, dtype=loss.dtype, device=loss.device)
        return value.detach(), loss, outputs, displacement

    def differentiable(self, penalty: "Penalty", replay: Replay, create_graph: bool) -> Tensor:
        """The penalty's value with the graph of all its input gradients and losses."""
        losses: list[Tensor] = []

        def gradient_at(point: Tensor) -> Tensor:
            x = point.detach().requires_grad_()
            outputs, potential = self.network.evaluate(x, penalty)
            if penalty.takes_losses():
                found = self.network.losses(outputs, penalty)
                losses.append(found if create_graph else found.detach())
            with self._full_precision():
                (g,) = torch.autograd.grad(
                    potential, x, create_graph=create_graph, materialize_grads=True
                )
                if create_graph:
                    check_differentiable_twice(self.caller, x, potential, g)
                return len(self.inputs) * g

        gradients = [gradient_at(self.inputs)]
        points = self._points(
            penalty, [gradients[0].detach()], [loss.detach() for loss in losses], replay
        )
        replay.mark_random()
        for point in points:
            replay.rewind()
            gradients.append(gradient_at(point))
        replay.settle()
        with self._full_precision():
            return self._value(penalty, gradients + losses)

    def _pass_at(
        self, point: Tensor, penalty: "Penalty", replay: Replay, parameters: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """A pass at a further point: the input gradient there, and the losses if it takes them."""
        replay.rewind()
        x = point.detach().requires_grad_()
        outputs, potential = self.network.evaluate(x, penalty)
        self._backward(potential, x, parameters=parameters)
        return self._input_gradient(x), self._losses(outputs, penalty)

    def _losses(self, outputs: Tensor, penalty: "Penalty") -> list[Tensor]:
        if not penalty.takes_losses():
            return []
        with torch.no_grad():
            return [self.network.losses(outputs.detach(), penalty)]

    def _shifted(
        self,
        point: Tensor,
        cotangent: Tensor | None,
        loss_cotangent: Tensor | None,
        shift: _Shift,
        penalty: "Penalty",
        replay: Replay,
        last: bool = False,
    ) -> None:
        """The pass at X + e V, its loss weighted by c, and each sample's by dR/dl_i besides.

        That l_i is meant at X: to take it at X + e V errs by e, as the finite difference does.
        """
        replay.rewind()
        x, weight = point.detach(), shift.weight
        if cotangent is None:
            weight = 0.0
        else:
            x = (widen(x) + shift.step * widen(cotangent)).to(point.dtype)
        # A compiled model has one graph for inputs that require grad and another for those that
        # do not.
        outputs, potential = self.network.evaluate(x.requires_grad_(), penalty)
        potential = potential * weight
        if loss_cotangent is not None:
            losses = self.network.losses(outputs, penalty)
            potential = potential + self._samples * (loss_cotangent * losses).mean()
        if last and self.replicas:
            potential = potential + self._nothing(outputs, penalty)
        self._backward(potential)

    def _nothing(self, outputs: Tensor, penalty: "Penalty") -> Tensor | float:
        """Zero, but with a gradient in every parameter that DDP waits for in the last pass."""
        if all(replica.training for replica in self.replicas):
            return 0 * self.network.loss(outputs) if penalty.has_objective() else 0.0
        if all(replica.find_unused_parameters for replica in self.replicas):
            return 0.0
        # In eval mode a pass may leave out layers that training uses.
        return 0 * torch.stack([p.sum() for p in self.parameters]).sum()

    def _full_precision(self) -> torch.autocast:
        """Forward passes run under the caller's autocast, all else outside it."""
        return torch.autocast(self.inputs.device.type, enabled=False)

    def _backward(
        self,
        potential: Tensor,
        *points: Tensor,
        parameters: bool = True,
        retain_graph: bool = False,
    ) -> None:
        """Backward into the `.grad` of points and parameters, and of no other leaf."""
        leaves: list[Tensor] | None = [*points, *(self.parameters if parameters else [])]
        if self.shards and parameters:
            leaves = None  # FSDP's leaves are not the parameters but what it gathers of them
        with self._full_precision():
            torch.autograd.backward(
                potential * self._scale, inputs=leaves, retain_graph=retain_graph
            )

    def _input_gradient(self, x: Tensor) -> Tensor:
        """The gradient of the summed loss, from what `_backward` left at x."""
        if x.grad is None:  # the network does not look at its input
            return torch.zeros_like(x)
        return x.grad * (len(self.inputs) / self._scale)

    def _check_reduced(self) -> None:
        if self.shards and all(p.grad is None for p in self.parameters):
            raise ValueError(
                f"{self.caller}: FSDP must reduce gradients in every pass, got a model after "
                "set_requires_gradient_sync(False)"
            )

    def _points(
        self, penalty: "Penalty", gradients: list[Tensor], losses: list[Tensor], replay: Replay
    ) -> list[Tensor]:
        """The penalty's points, from the gradient at the inputs and, if it takes them, losses."""
        device = self.inputs.device
        autocast = torch.autocast(
            device.type,
            torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )

        def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
            random = RandomState.now(device)
            with torch.enable_grad(), autocast:
                gradient, (loss,) = self._pass_at(
                    self._laid_out(point), penalty, replay, parameters=False
                )
            random.restore(device)
            return gradient, loss

        x = self.inputs.detach()
        with self._full_precision(), torch.no_grad():
            if not losses:
                return self._checked(penalty, "points", penalty.points(x, gradients[0]))
            return self._checked(
                penalty, "search", penalty.search(x, gradients[0], losses[0], evaluate)
            )

    def _checked(self, penalty: "Penalty", method: str, points: Sequence[Tensor]) -> list[Tensor]:
        points = list(points)
        for point in points:
            if not isinstance(point, Tensor) or point.shape != self.inputs.shape:
                raise TypeError(
                    f"{self.caller}: {type(penalty).__name__}.{method} must return Tensors of the "
                    f"inputs' shape {tuple(self.inputs.shape)}, got {describe(point)}"
                )
        return [self._laid_out(point) for point in points]

    def _laid_out(self, point: Tensor) -> Tensor:
        """A point in the inputs' strides: a compiled model has a graph for each layout."""
        if point.stride() == self.inputs.stride():
            return point
        return torch.empty_like(self.inputs, dtype=point.dtype).copy_(point)

    def _value(self, penalty: "Penalty", arguments: list[Tensor]) -> Tensor:
        value = penalty.value(*arguments)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise TypeError(
                f"{self.caller}: {type(penalty).__name__}.value must return a 0-dimensional "
                f"floating Tensor, got {describe(value)}"
            )
        return value

    def _cotangents(
        self, penalty: "Penalty", arguments: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """R, and this rank's part of its derivative in each argument it depends on, else None."""
        with self._full_precision():
            leaves = [a.detach().requires_grad_() for a in arguments]
            value = self._value(penalty, leaves)
            if not value.requires_grad:
                return value, (None,) * len(leaves)
            share = None if self._share is None else self._share.to(value.dtype)
            return value, torch.autograd.grad(value, leaves, share, allow_unused=True)

    def _dependence(
        self, penalty: "Penalty", gradients: list[Tensor], losses: list[Tensor], points: int
    ) -> list[bool]:
        """What R depends on, found before the passes that need to know it."""
        _, cotangents = self._cotangents(penalty, gradients * (1 + points) + losses * (1 + points))
        return [v is not None for v in cotangents]

    def _shift_along(self, cotangents: list[Tensor]) -> _Shift:
        """The step for all samples of all ranks."""
        together = self._share is not None
        if not cotangents:
            if together:
                ranks.gather(self.inputs.device)
            return _Shift(0.0, 0.0, 0.0)
        with self._full_precision():
            norms = torch.cat([functional.gradient_norm(v, 2) for v in cotangents])
            moving, squares = (norms > 0).sum(), (norms * norms).sum()
            inputs = widen(self.inputs)
            shift: Tensor | float | None = self._shift
            # On a CPU torch.var_mean takes four times as long.
            variance = inputs.var(correction=0) if shift is None else inputs.new_zeros(())
            if together:
                found = ranks.gather(
                    self.inputs.device, moving, squares, len(inputs), inputs.mean(), variance
                )
                moving, squares = found[:, 0].sum(), found[:, 1].sum()
                variance = _pooled_variance(*found[:, 2:].unbind(1))
            length = (squares / (moving.clamp_min(1) * cotangents[0][0].numel())).sqrt()
            if shift is None:
                deviation = variance.sqrt()
                shift = _SHIFTS[self._compute_dtype] * torch.where(deviation > 0, deviation, 1)
            # Times sqrt(2), then down to a power of two: within a factor sqrt(2) of what was asked.
            weight = (2**0.5 * self._samples * length / shift).float()
            weight = (weight.view(torch.int32) & 0x7F800000).view(torch.float32)
            weight = torch.where(weight < _SMALLEST_WEIGHT, 0, weight)
            # float64's own: 1 - c must keep the 1.
            weight = weight.to(inputs.dtype)
            step = torch.where(weight > 0, self._samples / weight, 0)
            return _Shift(step.to(weight.dtype), weight, step * length)


def take(parameters: list[Tensor]) -> Grads:
    """Move the gradients out of `.grad`."""
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


@torch.no_grad()
def add(parameters: list[Tensor], grads: Grads) -> None:
    """Put gradients back into `.grad`, adding what has come there meanwhile."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            if parameter.grad is not None:
                grad += parameter.grad
            parameter.grad = grad


def _copy(parameters: list[Tensor]) -> Grads:
    return [None if p.grad is None else p.grad.clone() for p in parameters]


@torch.no_grad()
def _scale(parameters: list[Tensor], factor: Tensor | float) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor)


def _pooled_variance(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """The variance of all elements, from those of its parts."""
    mean = (counts * means).sum() / counts.sum()
    return (counts * (variances + (means - mean).square())).sum() / counts.sum()


def has_tf32() -> bool:
    """Whether convolutions or matrix products on a GPU may round float32 to TF32."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul
    return "tf32" in (convolutions.fp32_precision, products.fp32_precision)


def _compute_dtype(
    inputs: Tensor, parameters: list[Tensor], shards: list[nn.Module]
) -> torch.dtype:
    """The dtype whose rounding the shift must stand out from."""
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtypes = [t.dtype for t in (inputs, *parameters) if t.dtype in _SHIFTS]
    for module in shards:
        policy = module._get_fsdp_state()._mp_policy  # type: ignore[operator]
        dtypes += [policy.param_dtype] if policy.param_dtype in _SHIFTS else []
    if device == "cuda" and has_tf32():
        dtypes = [torch.float16 if d == torch.float32 else d for d in dtypes]  # TF32's significand
    return max(dtypes, key=_SHIFTS.__getitem__)
