"""A model, its loss and a batch, as a function of the inputs whose gradient is meant."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustkern.gradients import ranks

if TYPE_CHECKING:
    from robustkern.penalties import Penalty

__all__ = ["Inputs", "LossFn", "Network", "check_penalty", "describe"]

Inputs = Tensor | Mapping[str, Any]
LossFn = Callable[[Tensor, Tensor], Tensor]
# Where torch.autograd.function.once_differentiable's wrapper is written.
_ONCE_DIFFERENTIABLE = (torch.autograd.function.__file__, "wrapper")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Network:
    """What a penalty's passes evaluate; the arguments are checked here.

    Attributes:
        inputs: (N, *D), the inputs whose gradient is meant.
        modules: the model, and the loss if it is a module.
        parameters: of the modules, those that require grad, each once.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        inputs: Inputs,
        targets: Tensor,
        loss_fn: LossFn,
        output: str | int | None,
        wrt: str | None,
    ) -> None:
        self._caller, self._model, self._loss_fn, self._output = caller, model, loss_fn, output
        self._wrt = wrt
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a Module, got {type(model).__name__}")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{caller}: gradients cannot be computed in inference mode")
        ranks.check_wrappers(caller, model.modules())
        ranks.reshard(model.modules())
        self._entries = _check_entries(caller, inputs, wrt)
        x = self._entries[wrt] if isinstance(inputs, Mapping) else inputs
        _check_batch(caller, x, targets)
        if not callable(loss_fn):
            raise TypeError(f"{caller}: loss_fn must be callable, got {type(loss_fn).__name__}")
        if output is not None and (isinstance(output, bool) or not isinstance(output, str | int)):
            raise TypeError(
                f"{caller}: output must be a str, an int or None, got {type(output).__name__}"
            )
        self.inputs, self.targets = _recordable(x), _recordable(targets).detach()
        self._entries = {name: _recordable(entry) for name, entry in self._entries.items()}
        self.modules = [model, loss_fn] if isinstance(loss_fn, nn.Module) else [model]
        parameters = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self.parameters: list[Tensor] = list(dict.fromkeys(parameters))  # once, where shared
        if not self.parameters and (caller == "backward" or torch.is_grad_enabled()):
            raise ValueError(f"{caller}: model must have a parameter that requires grad, got none")
        if any(p._post_accumulate_grad_hooks for p in self.parameters):
            raise ValueError(
                f"{caller}: model must have no post_accumulate_grad hooks, such as an optimizer's "
                "in backward, for they would run in every pass"
            )
        if ranks.shards(model.modules()) and not any(
            hasattr(p, "to_local") for p in self.parameters
        ):
            raise ValueError(
                f"{caller}: FSDP must have its parameters sharded, got a model whose last forward "
                "or backward did not come to its end"
            )
        devices = list(dict.fromkeys(str(p.device) for p in self.parameters))
        if len(devices) > 1:
            raise ValueError(
                f"{caller}: model must have its parameters on one device, "
                f"got {' and '.join(devices)}"
            )

    def evaluate(self, x: Tensor, penalty: "Penalty | None") -> tuple[Tensor, Tensor]:
        """Outputs at x, and the batch mean whose input gradient is meant."""
        with self._differentiable_rnn():
            if self._wrt is None:
                returned = self._model(x)
            else:
                returned = self._model(**{**self._entries, self._wrt: x})
        outputs = self._logits(returned)
        if penalty is None or not penalty.has_objective():
            return outputs, self.loss(outputs)
        return outputs, self._objective(outputs, penalty).mean()

    def losses(self, outputs: Tensor, penalty: "Penalty") -> Tensor:
        """What `evaluate` takes the mean of, of each sample alone: (N,)."""
        if penalty.has_objective():
            return self._objective(outputs, penalty)
        one_by_one = torch.vmap(self._loss_fn, randomness="different")
        return one_by_one(outputs[:, None], self.targets[:, None])

    def _objective(self, outputs: Tensor, penalty: "Penalty") -> Tensor:
        objective = penalty.objective(outputs, self.targets)
        if not isinstance(objective, Tensor) or objective.shape != self.inputs.shape[:1]:
            raise TypeError(
                f"{self._caller}: {type(penalty).__name__}.objective must return a Tensor of shape "
                f"({len(self.inputs)},), got {describe(objective)}"
            )
        return objective

    def loss(self, outputs: Tensor) -> Tensor:
        """The batch mean of the training loss."""
        loss = self._loss_fn(outputs, self.targets)
        if not isinstance(loss, Tensor) or loss.dim():
            raise TypeError(
                f"{self._caller}: loss_fn must return the batch mean, a 0-dimensional Tensor, "
                f"got {describe(loss)}"
            )
        return loss

    def _logits(self, returned: Any) -> Tensor:
        outputs = returned
        if self._output is not None:
            try:
                outputs = returned[self._output]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"{self._caller}: output must name a part of what model returns, "
                    f"got {self._output!r} and {_parts(returned)}"
                ) from error
        if not isinstance(outputs, Tensor):
            hint = "" if self._output is not None else "; output= picks one of its parts"
            raise TypeError(
                f"{self._caller}: model must return a Tensor, got {type(outputs).__name__}{hint}"
            )
        if not outputs.dim() or len(outputs) != len(self.inputs):
            raise ValueError(
                f"{self._caller}: model must return one row for each of {len(self.inputs)} "
                f"inputs, got {describe(outputs)}"
            )
        return outputs

    def _differentiable_rnn(self) -> AbstractContextManager[None]:
        """CuDNN keeps what its backward needs in training mode alone."""
        if self.inputs.is_cuda and any(
            isinstance(module, nn.RNNBase) and not module.training
            for module in self._model.modules()
        ):
            return without_cudnn()
        return nullcontext()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Torch's own kernels; unlike `torch.backends.cudnn.flags` it leaves other settings alone."""
    enabled = torch.backends.cudnn.enabled
    try:
        torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def check_differentiable_twice(
    caller: str,
    x: Tensor,
    potential: Tensor,
    gradient: Tensor,
    instead: str = 'robustkern.backward(model, inputs, targets, penalty) or method="first_order"',
) -> None:
    """Refuse what has no second derivative, which autograd would find late or not at all.

    A custom function whose backward leaves autograd without the decorator once_differentiable
    cannot be seen.

    Args:
        caller: whose name the error has.
        x: the inputs, a leaf.
        potential: the scalar whose gradient is meant.
        gradient: that gradient, with its graph.
        instead: what to use where there is none.

    Raises:
        RuntimeError: naming what has none.
    """
    behind = _nodes_behind(gradient.grad_fn)
    # Of the model, what the inputs go through.
    through = _nodes_between(potential.grad_fn, x)
    names = {node.name().split("::")[-1] for node in through}
    reason = None
    if "CompiledFunctionBackward" in names:
        reason = "a compiled model"
    elif any(name.startswith("CudnnRnnBackward") for name in names):
        reason = "a cuDNN RNN"
    elif any(_once_differentiable(node) for node in through):
        reason = "a once-differentiable function"
    elif any(node.name().endswith("NotImplemented") for node in behind):
        fused = any(name.startswith("ScaledDotProduct") for name in names)
        reason = "fused attention" if fused else "an operator of the model"
    if reason:
        raise RuntimeError(f"{caller}: {reason} has no double backward; use {instead}")


def _nodes_behind(node: Any) -> set[Any]:
    """The nodes of autograd's graph behind one, and itself."""
    found: set[Any] = set()
    left = [node]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return found


def _nodes_between(node: Any, leaf: Tensor) -> set[Any]:
    """Those behind a node that lead to a leaf."""
    behind = _nodes_behind(node)
    after: dict[Any, list[Any]] = {}
    for found in behind:
        for before, _ in found.next_functions:
            after.setdefault(before, []).append(found)
    between: set[Any] = set()
    left = [found for found in behind if getattr(found, "variable", None) is leaf]
    while left:
        found = left.pop()
        if found not in between:
            between.add(found)
            left += after.get(found, [])
    return between


def _once_differentiable(node: Any) -> bool:
    """Whether a node is a custom Function's whose backward has torch's decorator."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and (code.co_filename, code.co_name) == _ONCE_DIFFERENTIABLE


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been applied to the model or a part of it."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and any(
        isinstance(m, dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in model.modules()
    )


def check_penalty(caller: str, penalty: Any) -> None:
    """Refuse what is no penalty."""
    if not isinstance(penalty, nn.Module) or not hasattr(penalty, "due"):
        raise TypeError(f"{caller}: penalty must be a Penalty, got {type(penalty).__name__}")


def describe(thing: object) -> str:
    """A tensor's dtype and shape, or a type's name."""
    if isinstance(thing, Tensor):
        return f"a {thing.dtype} Tensor of shape {tuple(thing.shape)}"
    return type(thing).__name__


def _check_entries(caller: str, inputs: Any, wrt: Any) -> dict[Any, Any]:
    """The entries of a mapping; none for a Tensor."""
    if isinstance(inputs, Mapping):
        if wrt not in inputs:
            names = ", ".join(map(repr, inputs))
            raise ValueError(f"{caller}: wrt must be one of inputs' names {names}, got {wrt!r}")
        return dict(inputs)
    if wrt is not None:
        raise ValueError(
            f"{caller}: wrt must be None unless inputs is a mapping, got {wrt!r} and "
            f"{type(inputs).__name__}"
        )
    return {}


def _check_batch(caller: str, inputs: Any, targets: Any) -> None:
    if not isinstance(inputs, Tensor) or inputs.dtype not in _FLOATING or inputs.dim() < 2:
        raise TypeError(
            f"{caller}: inputs must be a floating Tensor (N, *D), got {describe(inputs)}"
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


def _recordable(thing: Any) -> Any:
    """What autograd can save: a tensor of inference mode is copied."""
    return thing.clone() if isinstance(thing, Tensor) and thing.is_inference() else thing


def _parts(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"a {type(returned).__name__} of {', '.join(map(repr, returned))}"
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    return type(returned).__name__
