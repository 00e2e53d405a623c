"""`backward`, which takes the place of `loss.backward()`, and penalties as terms of a loss."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern.gradients import ranks
from robustkern.gradients.network import Inputs, LossFn, Network, check_penalty, is_compiled
from robustkern.gradients.passes import Grads, Passes, add, take
from robustkern.gradients.replay import Replay

if TYPE_CHECKING:
    from robustkern.penalties import Penalty

__all__ = ["Step", "backward", "known", "loss_term"]


@dataclass(frozen=True)
class Step:
    """What one call of `backward` computed; all detached.

    Attributes:
        loss: the training loss at the inputs; 0-dimensional.
        penalty: the penalty's value, its weight included; 0-dimensional.
        outputs: the network's outputs at the inputs, in training mode as the call found it.
        shift: root-mean-square displacement of the finite difference, per input element of the
            samples that moved, in input units; 0-dimensional, 0 where nothing moved.
    """

    loss: Tensor
    penalty: Tensor
    outputs: Tensor
    shift: Tensor


def backward(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    penalty: "Penalty",
    *,
    loss_fn: LossFn = F.cross_entropy,
    output: str | int | None = None,
    wrt: str | None = None,
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

    Where torch.distributed is initialized, all ranks must make the call, and their averaged
    gradients are those of one process that has all samples, whatever each rank's number. DDP
    reduces them once, after the last pass; FSDP2 in every pass, so that they stay sharded. The
    step of the finite difference, the Lipschitz maximum and covariances are those of all ranks; the
    loss and a penalty's mean that are returned are this rank's. If a rank raises before its last
    pass, all do: on the CPU and without FSDP2, otherwise and later they wait for the process
    group's timeout, as in any training. Under FSDP2 other leaves that the loss was made of get a
    gradient too, and an error inside a backward leaves FSDP itself as it fell.

    A CUDA graph can capture the call if nothing in the model draws random numbers.

    Args:
        model: the network. Run it inside `torch.autocast` as for a plain step.
        inputs: (N, \*D), floating, for which model(inputs) is called; or a mapping of names to
            entries, for which model(\**inputs) is.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        loss_fn: called as loss_fn(outputs, targets), returns the batch mean. If it is a module, its
            parameters get their gradients too.
        output: where the model returns a tuple, a dict or the like, the index or name of the
            outputs that the loss takes.
        wrt: where inputs is a mapping, the name of the entry, (N, \*D) and floating, whose gradient
            is penalized.
        shift: root-mean-square displacement of the finite difference, per input element, over the
            samples that move, in input units; met within a factor of 1.5. "auto" chooses it from
            the dtype of the computation and the standard deviation of the inputs.
        scaler: scales every loss; `.grad` is left scaled, for `scaler.step`. An overflow in any
            pass makes `.grad` non-finite, so the scaler sees it.
        batch_norm: "batch" normalizes each pass by its own batch; "eval" takes the penalty's passes
            in eval mode, as the authors of CURE do, at one pass more in training mode, whose random
            numbers are its own.

    Returns:
        The loss, the penalty and the outputs of the clean pass.

    Raises:
        TypeError: for an argument of another type, or a model, loss or penalty that returns no
            tensor of the right kind.
        ValueError: for inputs, targets and outputs of different lengths, an empty batch, an
            `output` or `wrt` that is not there, no parameter that requires grad, parameters on two
            devices or with post_accumulate_grad hooks, DDP without a process group, FSDP that does
            not reduce, an option or shift out of range, or a penalty whose `value` depends on other
            gradients for other values of them.
        RuntimeError: if another rank has failed, in inference mode, or while a CUDA graph is
            captured with dropout.

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
    device, sharded = _device_of(model)
    with ranks.agreement(device, sharded) as exchange:
        network = Network("backward", model, inputs, targets, loss_fn, output, wrt)
        check_penalty("backward", penalty)
        if batch_norm not in ("batch", "eval"):
            raise ValueError(f"backward: batch_norm must be 'batch' or 'eval', got {batch_norm!r}")
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(f"backward: scaler must be a GradScaler, got {type(scaler).__name__}")
        passes = Passes("backward", network, _check_shift("backward", shift), scaler, exchange)
        ranks.share_buffers(passes.replicas)
        modules = _modules(network, but=penalty)
        with _undone_on_error(passes, penalty, modules, reduced=bool(passes.replicas)) as replay:
            due = penalty.due()
            if due is None:
                passes.complete()
                loss, outputs = passes.plain()
                value, displacement = torch.zeros_like(loss), torch.zeros_like(loss)
            elif batch_norm == "eval" and any(m.training for m in modules):
                with passes.unreduced():
                    loss, outputs = passes.plain()
                passes.before_reduction.append(take(passes.parameters))
                with _eval_mode(modules):
                    again = Replay("backward", modules, network.inputs.device)
                    value, _, _, displacement = passes.penalized(due, again, with_loss=False)
            elif due.has_objective() and is_compiled(model):
                # Inductor's backward runs once, so that the loss needs a pass of its own.
                with passes.unreduced():
                    loss, outputs = passes.plain()
                passes.before_reduction.append(take(passes.parameters))
                replay.mark_buffers()
                replay.rewind()
                value, _, _, displacement = passes.penalized(due, replay, with_loss=False)
            else:
                value, loss, outputs, displacement = passes.penalized(due, replay, with_loss=True)
    return Step(loss, value, outputs, displacement)


def loss_term(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    penalty: "Penalty",
    *,
    loss_fn: LossFn = F.cross_entropy,
    output: str | int | None = None,
    wrt: str | None = None,
    shift: float | str = "auto",
    method: str = "double_backward",
) -> Tensor:
    r"""The penalty's value with a derivative in the parameters, to be added to a loss.

    Its passes leave the model's buffers, running statistics among them, as they are. Ranks of
    torch.distributed each take their own samples alone.

    Args:
        model: the network.
        inputs: (N, \*D), floating, or a mapping; as `backward`.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        loss_fn: called as loss_fn(outputs, targets), returns the batch mean.
        output: as `backward`.
        wrt: as `backward`.
        shift: of "first_order", as `backward`.
        method: "double_backward" is exact and keeps a graph for every point; "first_order" computes
            the gradient here, as `backward` does, and its backward hands it out.

    Returns:
        The value, 0-dimensional; differentiable once with respect to the parameters.

    Raises:
        TypeError: as `backward`.
        ValueError: as `backward`, for another method, or for "first_order" under DDP, which
            `backward` serves.
        RuntimeError: for double backward through what has no second derivative, such as a compiled
            model, fused attention, a cuDNN RNN or a once-differentiable function.
    """
    caller = type(penalty).__name__
    network = Network(caller, model, inputs, targets, loss_fn, output, wrt)
    check_penalty(caller, penalty)
    if method not in ("double_backward", "first_order"):
        raise ValueError(
            f"{caller}: method must be 'double_backward' or 'first_order', got {method!r}"
        )
    recorded = torch.is_grad_enabled()
    passes = Passes(caller, network, _check_shift(caller, shift), None, None)
    unable = "a compiled model" if is_compiled(model) else "FSDP2" if passes.shards else None
    if method == "double_backward" and unable:
        raise RuntimeError(
            f"{caller}: {unable} has no double backward; use robustkern.backward(model, "
            'inputs, targets, penalty) or method="first_order"'
        )
    if method == "first_order" and passes.replicas:
        raise ValueError(
            f"{caller}: method must be 'double_backward' under DistributedDataParallel, which "
            "would reduce the term's passes in place of the loss's; use robustkern.backward(model, "
            f"inputs, targets, penalty), got {method!r}"
        )
    modules = _modules(network, but=penalty)
    with _undone_on_error(passes, penalty, modules, reduced=False) as replay:
        due = penalty.due()
        if due is None:
            return torch.zeros((), dtype=network.inputs.dtype, device=network.inputs.device)
        if method == "double_backward" or not recorded:
            return passes.differentiable(due, replay, create_graph=recorded)
        value, *_ = passes.penalized(due, replay, with_loss=False)
        gradients = take(passes.parameters)
    return known(value, gradients, passes.parameters)


def known(value: Tensor, gradients: Grads, parameters: list[Tensor]) -> Tensor:
    """The value with the derivatives in the parameters that are known already."""
    term: Tensor = _Known.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call]
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


def _modules(network: Network, but: nn.Module) -> list[nn.Module]:
    """The modules of model and loss, without those of a penalty that they may hold."""
    without = set(_state_of(but))
    return [m for part in network.modules for m in part.modules() if m not in without]


def _state_of(penalty: nn.Module) -> Iterator[nn.Module]:
    """A penalty's modules, but for a network, which has parameters, that it may know."""
    yield penalty
    for child in penalty.children():
        if hasattr(child, "due") or next(child.parameters(), None) is None:
            yield from _state_of(child)


def _device_of(model: Any) -> tuple[torch.device, bool]:
    """Of a model that has not been checked yet; and whether FSDP shards it."""
    if not isinstance(model, nn.Module):
        return torch.device("cpu"), False
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return device, bool(ranks.shards(model.modules()))


@contextmanager
def _undone_on_error(
    passes: Passes, penalty: "Penalty", modules: list[nn.Module], reduced: bool
) -> Iterator[Replay]:
    """Adds the gradients computed inside to `.grad`; after an error nothing has happened.

    What was in `.grad` is added before DDP's reduction, where there is one.

    Args:
        passes: whose parameters are meant.
        penalty: its state is taken back too.
        modules: their buffers as well.
        reduced: whether DDP reduces the gradients inside.

    Yields:
        The replay of the passes.
    """
    replay = Replay(passes.caller, modules, passes.inputs.device)
    state = copy.deepcopy(penalty.state_dict())
    held = take(passes.parameters)
    if any(replica.gradient_as_bucket_view for replica in passes.replicas):
        held = [None if grad is None else grad.clone() for grad in held]
    if reduced:
        passes.before_reduction.append(held)
    try:
        with torch.enable_grad():
            yield replay
    except BaseException:
        ranks.reshard(passes.shards, failed=True)
        for parameter, grad in zip(passes.parameters, held, strict=True):
            parameter.grad = grad
        replay.rewind()
        penalty.load_state_dict(state, strict=False)
        raise
    if not reduced:
        add(passes.parameters, held)


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


def _check_shift(caller: str, shift: float | str) -> float | None:
    """The shift as a number, or None for "auto"."""
    if shift == "auto":
        return None
    if isinstance(shift, bool) or not isinstance(shift, int | float):
        raise TypeError(f"{caller}: shift must be a number or 'auto', got {shift!r}")
    if not 0 < shift < torch.inf:
        raise ValueError(f"{caller}: shift must be positive and finite, got {shift!r}")
    return float(shift)
