"""One network, batch and penalty: the gradients that training would see, and nothing moved."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustkern.gradients import Step, backward
from robustkern.gradients.network import without_cudnn
from robustkern.gradients.replay import RandomState
from robustkern.penalties import Lazy, Penalty

__all__ = ["Gradients", "Trial", "eager", "twice_differentiable"]

Inputs = Tensor | Mapping[str, Any]
Gradients = list[Tensor]  # float64 vectors, one per parameter


@dataclass(frozen=True)
class Trial:
    """The arguments of a step, the penalty's with them."""

    model: nn.Module
    inputs: Inputs
    targets: Tensor
    penalty: Penalty
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any]  # output, wrt and batch_norm, as `backward` takes them

    def parameters(self) -> dict[str, Tensor]:
        """Those that require grad, by name, once where they are shared."""
        named = list(self.model.named_parameters())
        if isinstance(self.loss_fn, nn.Module):
            named += [(f"loss_fn.{name}", p) for name, p in self.loss_fn.named_parameters()]
        names: dict[Tensor, str] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                names.setdefault(parameter, name)
        return {name: parameter for parameter, name in names.items()}

    def device(self) -> torch.device:
        """That of the parameters."""
        parameters = (p for part in self._parts() for p in part.parameters())
        return next((p.device for p in parameters), torch.device("cpu"))

    def _parts(self) -> list[nn.Module]:
        """What has a state of its own."""
        things = (self.model, self.penalty, self.loss_fn)
        return [thing for thing in things if isinstance(thing, nn.Module)]

    def plain(self) -> Step:
        """A step on which the penalty is not due."""
        return self._backward(Lazy(self.penalty, every=2), "auto")

    def penalized(self, shift: float | str) -> Step:
        """A step with the penalty."""
        return self._backward(self.penalty, shift)

    def _backward(self, penalty: Penalty, shift: float | str) -> Step:
        return backward(
            self.model,
            self.inputs,
            self.targets,
            penalty,
            loss_fn=self.loss_fn,
            shift=shift,
            **self.options,
        )

    def logits(self, outputs: Any) -> Any:
        """What `output` picks from what the model returned."""
        output = self.options["output"]
        return outputs if output is None else outputs[output]

    def gradients(self, step: Callable[[], object]) -> Gradients:
        """What a step leaves in `.grad`, which is then put back."""
        with self.untouched():
            step()
            return [_gradient(p) for p in self.parameters().values()]

    def penalty_gradients(self, shift: float | str, plain: Gradients) -> Gradients:
        """dR/dtheta: what the penalty adds to the gradients of a plain step."""
        found = self.gradients(lambda: self.penalized(shift))
        return [f - p for f, p in zip(found, plain, strict=True)]

    def exact_gradients(self) -> Gradients:
        """dR/dtheta by double backward."""
        options = {key: self.options[key] for key in self.options if key != "batch_norm"}

        def step() -> None:
            if self.options["batch_norm"] == "eval":
                self.model.eval()
            with torch.enable_grad():
                self.penalty(
                    self.model, self.inputs, self.targets, loss_fn=self.loss_fn, **options
                ).backward()  # not autograd.grad: its short cut avoids once_differentiable's error

        return self.gradients(step)

    def in_float64(self) -> "Trial":
        """The same on a copy of the network in float64, not compiled."""
        compiled_from = getattr(self.model, "_orig_mod", self.model)
        model, loss_fn = copy.deepcopy((compiled_from, self.loss_fn))  # together: they may share
        if isinstance(loss_fn, nn.Module):
            loss_fn.double()
        inputs: Inputs
        if isinstance(self.inputs, Mapping):
            inputs = {key: _double(value) for key, value in self.inputs.items()}
        else:
            inputs = _double(self.inputs)
        return replace(
            self,
            model=model.double(),
            inputs=inputs,
            targets=_double(self.targets),
            loss_fn=loss_fn,
        )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, `.grad` is None and lazy penalties always apply; afterwards all is as it was."""
        parts = self._parts()
        modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
        modes = [(module, module.training) for module in modules]
        buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in modules
            for name, buffer in module._buffers.items()
        ]
        extras = [
            (module, copy.deepcopy(module.get_extra_state()))
            for module in modules
            if type(module).get_extra_state is not nn.Module.get_extra_state
        ]
        parameters = [p for part in parts for p in part.parameters()]
        grads = [(p, p.grad) for p in parameters]
        states = [
            (part, copy.deepcopy(part.state_dict())) for part in parts if part is self.penalty
        ]
        random = RandomState.now(self.device())
        try:
            for parameter in parameters:
                parameter.grad = None
            for module in modules:
                if isinstance(module, Lazy):
                    module.training = False
            yield
        finally:
            random.restore(self.device())
            for module, training in modes:
                module.training = training
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None:
                    buffer.data.copy_(value)
                module._buffers[name] = buffer
            for module, state in extras:
                module.set_extra_state(state)
            for part, state in states:
                part.load_state_dict(state)
            for parameter, grad in grads:
                parameter.grad = grad


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """The kernels that have a second derivative, wherever there is a choice."""
    with (
        eager(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        without_cudnn(),
    ):
        yield


def eager() -> AbstractContextManager[Any]:
    """Runs compiled models as they are written, so that hooks are not compiled into them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if hasattr(gradient, "full_tensor"):  # FSDP2's are sharded
        gradient = gradient.full_tensor()
    return gradient.double().flatten()


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
