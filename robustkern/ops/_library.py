"""How an op comes to be: schema, reference, shapes, derivative, compiled kernels."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Formula = Callable[..., tuple[Tensor | None, ...]]

LIBRARY = torch.library.Library("robustkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Formula,
    forward: Callable[..., tuple[Tensor, ...]] | None = None,
) -> None:
    """Make `torch.ops.robustkern.<name>`.

    The reference answers on every device that has no kernel of its own; compiled kernels register
    themselves per device. `save(ctx, arguments, output)` keeps what `backward(ctx, *cotangents)`
    needs; it returns one cotangent for each tensor argument, and None for each other argument.
    Where autograd records, `forward(*arguments)` may take the kernel's place: it returns the op's
    output and what it made on the way, and `save` is given all of it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"robustkern::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.robustkern, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]

    def below_autograd(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _BELOW_AUTOGRAD, *arguments)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
            made = forward(*arguments) if forward else below_autograd(keyset, arguments)
            # The dispatcher drops trailing arguments that have their default value.
            save(ctx, (*arguments, *defaults[len(arguments) :]), made)
            return made[0] if forward else made

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            cotangents_in = backward(ctx, *cotangents)
            return None, *cotangents_in[: len(ctx.needs_input_grad) - 1]

    # torch.library.register_autograd answers forward-mode differentiation with zeros, without a
    # word. A Function without a jvp refuses it, so every call under forward mode goes through one.
    def autograd(keyset: Any, *arguments: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if recorded or forward_ad._current_level >= 0:
            return Node.apply(keyset, *arguments)  # type: ignore[no-untyped-call]
        return below_autograd(keyset, arguments)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def save_arguments(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
    """Keep all tensor arguments."""
    ctx.save_for_backward(*[a for a in arguments if isinstance(a, Tensor)])


def save_nothing(ctx: Any, arguments: tuple[Any, ...], output: Any) -> None:
    """Keep nothing."""


def serve_by_triton(module: str, *names: str) -> None:
    """Let `robustkern.triton.<module>` answer CUDA tensors: for each op its function of that name.

    It is imported, and Triton with it, by the first call. Where Triton cannot work the reference
    answers.
    """
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    for name in names:

        def kernel(*arguments: Any, name: str = name) -> Any:
            return _triton_or_reference(module, name, arguments[0].device.index)(*arguments)

        LIBRARY.impl(name, kernel, "CUDA")  # type: ignore[no-untyped-call]


@functools.cache
def _triton_or_reference(module: str, name: str, device: int) -> Callable[..., Any]:
    room = f"robustkern.triton.{module}" if triton_works(device) else "robustkern.reference"
    found: Callable[..., Any] = getattr(importlib.import_module(room), name)
    return found


@functools.cache
def triton_works(device: int) -> bool:
    """Whether Triton can compile and launch kernels for a GPU; if not, the first call warns."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles what launches kernels, in C
        capability = torch.cuda.get_device_capability(device)
        reason = f"GPU {device} has compute capability {capability}, below (8, 0)"
        works = capability >= (8, 0)
    except Exception as error:  # whatever stops it here stops every kernel
        works, reason = False, str(error)
    if not works:
        warnings.warn(f"robustkern runs on its reference: Triton: {reason}", stacklevel=2)
    return works


def load_kernels(name: str) -> bool:
    """Load `librobustkern_<name>.so` from the package if it was built; say whether it was."""
    path = Path(__file__).parents[1] / f"librobustkern_{name}.so"
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        warnings.warn(f"robustkern runs on its reference: {path.name}: {error}", stacklevel=2)
        return False
    return True


def kernel_of(name: str, device: str) -> str:
    """What serves an op on "CPU" or "CUDA": C++, CUDA C++, Triton or the reference."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"robustkern::{name}", device):
        return "reference"
    if device == "CPU":
        return "C++"
    if importlib.util.find_spec(f"robustkern.triton.{name}") is None:
        return "CUDA C++"
    present = torch.cuda.is_available()
    return "Triton" if not present or triton_works(torch.cuda.current_device()) else "reference"


CPU_KERNELS = load_kernels("cpu")
# A build without CUDA lacks the symbols that the CUDA library needs.
CUDA_KERNELS = torch.version.cuda is not None and load_kernels("cuda")
