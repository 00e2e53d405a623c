"""`check`: does a penalty train this network, how exactly, and at what cost."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from robustkern.analysis.cost import Passes, memory, seconds
from robustkern.analysis.trial import Gradients, Trial, eager, twice_differentiable
from robustkern.gradients.passes import has_tf32
from robustkern.gradients.replay import RandomState, is_random
from robustkern.penalties import Penalty

__all__ = ["CheckReport", "check"]

# An error as long as what was meant, and at right angles to it, makes 0.71 of the longer.
_LOST = 0.7
# The cosine at twice the shift that is left by kinks alone is 0.71, by rounding alone 0.5.
_TURNED = 0.7
# Gradients below this part of the whole are zero but for the rounding of float64.
_ZERO = 1e-7
_NAMED = 6  # in one row of the table
# ClampMin is that of normalizations, whose kink is at zero.
_KINKS = re.compile(
    r"(\w*(?:Relu|Prelu|Hard|Threshold|Clamp(?!Min)|MaxPool|^Abs|^A?[Mm]ax|^A?[Mm]in|Sort)\w*?)"
    r"(?:With\w*)?Backward\d*"
)


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `print` shows it as a table.

    What could not be found is None, and `notes` says why.

    Attributes:
        dtype: what the network computes in.
        parameters: how many tensors require grad.
        unmoved: names of those that the loss moves and the penalty does not.
        unused: names of those that neither moves.
        strength: length of the penalty's parameter gradient, in lengths of the loss's; None if the
            loss has none.
        shift: root-mean-square displacement per input element that was taken, in input units.
        rounding: error of the penalty's gradient against the same finite difference in float64,
            the length of their difference over that of the longer: what cancellation leaves.
        truncation: error of that one against double backward in float64: of the shift's length,
            and of kinks.
        doubled: cosine of the penalty's gradients at the shift and at twice the shift.
        cosine: of the penalty's gradient to that by double backward in float64.
        length: of the penalty's gradient, in lengths of that by double backward in float64.
        kinks: the piecewise-linear operations of the network, whose kinks the first-order gradient
            sees and double backward does not.
        forward: forward passes of a step.
        backward: backward passes of a step.
        seconds: of a step in which the penalty applies; median.
        plain_seconds: of a step of `robustkern.backward` in which none applies; median.
        memory: peak bytes of a step above those before it: allocated on a CUDA device, elsewhere
            saved for backward.
        plain_memory: the same of a step in which none applies.
        notes: what else is to be known.
    """

    dtype: str
    parameters: int
    unmoved: tuple[str, ...]
    unused: tuple[str, ...]
    strength: float | None
    shift: float | None
    rounding: float | None
    truncation: float | None
    doubled: float | None
    cosine: float | None
    length: float | None
    kinks: tuple[str, ...]
    forward: int
    backward: int
    seconds: float
    plain_seconds: float
    memory: int
    plain_memory: int
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Says "fine", or what is wrong: its first word names it."""
        if self.strength is not None and not self.strength < torch.inf:
            return "overflow: the penalty's gradient is not finite"
        if self.rounding is not None and self.rounding > _LOST:
            return (
                f"noisy: the penalty's gradient is mostly rounding in {self.dtype}; take a longer "
                "shift or more precision"
            )
        if self.strength == 0:
            return "idle: the penalty moves no parameter; does its value depend on the gradient?"
        if self.rounding is None and self.doubled is not None and self.doubled < _TURNED:
            return (
                f"noisy: in {self.dtype}, the penalty's gradient turns when the shift doubles, by "
                "rounding or kinks; take a longer shift or a larger batch"
            )
        if self.truncation is not None and self.truncation > _LOST and not self.kinks:
            return "coarse: far from double backward; take a shorter shift"
        if self.unmoved:
            return f"partial: the penalty does not move {_names(self.unmoved)}"
        return "fine"

    def __str__(self) -> str:
        """The verdict, and a table of the rest."""
        moved = self.parameters - len(self.unmoved) - len(self.unused)
        times = f"({1e3 * self.seconds:.3g} ms, plain {1e3 * self.plain_seconds:.3g} ms)"
        sizes = f"({self.memory / 1e6:.3g} MB, plain {self.plain_memory / 1e6:.3g} MB)"
        rows = [
            ("verdict", self.verdict),
            ("moves", f"{moved} of {self.parameters} parameters"),
            ("only the loss does", _names(self.unmoved)),
            ("neither does", _names(self.unused)),
            ("strength", _number("{:.3g} of the loss's gradient", self.strength)),
            ("computed in", self.dtype),
            ("shift", _number("{:.2g} in input units", self.shift)),
            ("rounding", _number("{:.2g} relative error", self.rounding)),
            ("truncation", _number("{:.2g} relative error", self.truncation)),
            ("at twice the shift", _number("cosine {:.5f}", self.doubled)),
            ("double backward", _number("cosine {:.5f}, length {:.4f}", self.cosine, self.length)),
            ("kinks", ", ".join(self.kinks)),
            ("passes", f"{self.forward} forward, {self.backward} backward"),
            ("time", f"{self.seconds / self.plain_seconds:.2f} plain steps {times}"),
            ("memory", f"{self.memory / max(self.plain_memory, 1):.2f} plain steps {sizes}"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<20}{value}" for name, value in rows if value)


def check(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    targets: Tensor,
    penalty: Penalty,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    output: str | int | None = None,
    wrt: str | None = None,
    shift: float | str = "auto",
    batch_norm: str = "batch",
) -> CheckReport:
    r"""Try a penalty on a network and a batch: whether it trains, how exactly, at what cost.

    It runs `robustkern.backward` as training does, within the caller's autocast, and compares the
    gradient with the same finite difference and with double backward on a copy of the network in
    float64, on the same device. That takes many plain steps and the memory of double backward, so
    let the batch be small where that is scarce. Lazy penalties are tried as on the calls on which
    they apply, without their factor.

    `.grad`, buffers, training modes, the random state and the penalty's own state are afterwards
    as they were; PyTorch's peak of allocated CUDA memory is not. Where float64 would draw other
    random numbers, dropout and the dropout of attention and recurrent layers are left out while
    gradients are compared. Compiled models run eagerly while passes and saved bytes are counted and
    in float64.

    Args:
        model: this and all that follows as `robustkern.backward` takes it.
        inputs: (N, \*D), floating, or a mapping with such an entry.
        targets: N of them, as `loss_fn` takes them.
        penalty: see `robustkern.penalties`.
        loss_fn: called as loss_fn(outputs, targets), returns the batch mean.
        output: picks the logits from what the model returns.
        wrt: the entry of a mapping whose gradient is penalized.
        shift: in input units, or "auto".
        batch_norm: "batch" or "eval".

    Returns:
        A report: print it, or read its `verdict` and its figures.

    Raises:
        TypeError: as `robustkern.backward`.
        ValueError: as `robustkern.backward`.

    Example:
        >>> import torch, robustkern
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> inputs, targets = torch.rand(16, 4), torch.arange(16) % 3
        >>> report = robustkern.check(model, inputs, targets, robustkern.CURE())
        >>> print(report)
        verdict             fine
        moves               4 of 4 parameters
        ...
        passes              4 forward, 4 backward
        ...
        >>> report.cosine > 0.999
        True
    """
    options = {"output": output, "wrt": wrt, "batch_norm": batch_norm}
    trial = Trial(model, inputs, targets, penalty, loss_fn, options)
    random = _draws(trial, shift)
    with trial.untouched(), eager(), Passes(trial) as passes:
        displacement = float(trial.penalized(shift).shift)
    taken = displacement if 0 < displacement < torch.inf else None
    with _without_dropout(model) if random else nullcontext():
        random = random and _draws(trial, shift)
        plain = trial.gradients(trial.plain)
        found = trial.penalty_gradients(shift, plain)
        doubled = None if taken is None else trial.penalty_gradients(2 * taken, plain)
        truth = _in_float64(trial, taken if shift == "auto" and taken else shift, random)

    by_loss = _moved(truth.plain or plain)
    by_penalty = _moved(truth.shifted) if truth.shifted else [bool(g.any()) for g in found]
    notes = truth.notes
    if not truth.shifted:
        notes += ("a parameter that the penalty moves by rounding alone counts as moved",)
    moves = list(zip(trial.parameters(), by_loss, by_penalty, strict=True))
    dtype = _dtype(trial)
    comparable = truth.shifted is not None and not random and dtype != "float64"
    step_seconds, plain_seconds = seconds(trial, shift)
    return CheckReport(
        dtype=dtype,
        parameters=len(moves),
        unmoved=tuple(name for name, loss, penalty in moves if loss and not penalty),
        unused=tuple(name for name, loss, penalty in moves if not loss and not penalty),
        strength=_strength(found, plain),
        shift=taken,
        rounding=_distance(found, truth.shifted) if comparable else None,
        truncation=_distance(truth.shifted, truth.exact),
        doubled=_cosine(found, doubled),
        cosine=_cosine(found, truth.exact),
        length=_length(found, truth.exact),
        kinks=truth.kinks,
        forward=passes.forward,
        backward=passes.backward,
        seconds=step_seconds,
        plain_seconds=plain_seconds,
        memory=memory(trial, lambda: trial.penalized(shift)),
        plain_memory=memory(trial, trial.plain),
        notes=notes,
    )


@dataclass(frozen=True)
class _Truth:
    """Gradients in float64: a plain step's, the penalty's at the shift and by double backward."""

    plain: Gradients | None = None
    shifted: Gradients | None = None
    exact: Gradients | None = None
    kinks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _in_float64(trial: Trial, shift: float | str, random: bool) -> _Truth:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Truth(notes=("not compared with float64: the gradient is that of all processes",))
    kinks: set[str] = set()
    try:
        double = trial.in_float64()
        with twice_differentiable(trial.device()):
            watch = double.model.register_forward_hook(
                lambda model, args, outputs: kinks.update(_kinks(double.logits(outputs)))
            )
            plain = double.gradients(double.plain)
            watch.remove()
            shifted = double.penalty_gradients(shift, plain)
    except Exception as error:  # whatever the user's code says to being copied, or to float64
        return _Truth(notes=(f"not compared with float64: {_first_line(error)}",))
    truth = _Truth(plain, shifted, kinks=tuple(sorted(kinks)))
    if random:
        note = "not compared with float64: it draws other random numbers"
        return replace(truth, notes=(note,))
    try:
        with twice_differentiable(trial.device()):
            exact = double.exact_gradients()
    except Exception as error:  # it has no second derivative, for one reason of many
        return replace(truth, notes=(f"no double backward: {_first_line(error)}",))
    note = "first order sees kinks and double backward does not, so these two may differ"
    return replace(truth, exact=exact, notes=(note,) if kinks else ())


def _draws(trial: Trial, shift: float | str) -> bool:
    """Whether a step draws random numbers."""
    device = trial.device()
    with trial.untouched():
        before = RandomState.now(device)
        trial.penalized(shift)
        return not before.equals(RandomState.now(device))


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Eval mode of torch's random layers; others may return something else in it."""
    modules = [m for m in model.modules() if is_random(m)]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def _kinks(outputs: Tensor) -> set[str]:
    """The piecewise-linear operations in the graph of a network's outputs."""
    found, seen, todo = set(), set(), [outputs.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if kink := _KINKS.fullmatch(node.name()):
            found.add(kink[1])
        todo += [following for following, _ in node.next_functions]
    return found


def _dtype(trial: Trial) -> str:
    parameter = next(iter(trial.parameters().values()))
    dtype, device = parameter.dtype, parameter.device.type
    if torch.is_autocast_enabled(device):
        return f"{torch.get_autocast_dtype(device)} by autocast".removeprefix("torch.")
    tf32 = device == "cuda" and dtype == torch.float32 and has_tf32()
    return f"{dtype}{' with TF32' if tf32 else ''}".removeprefix("torch.")


def _moved(gradients: Gradients) -> list[bool]:
    whole = _norm(gradients)
    return [bool(g.norm() > _ZERO * whole) for g in gradients]


def _norm(gradients: Gradients) -> float:
    return float(torch.cat(gradients).norm())


def _strength(found: Gradients, plain: Gradients) -> float | None:
    length, unit = _norm(found), _norm(plain)
    return length / unit if unit else None if length else 0.0


def _distance(found: Gradients | None, truth: Gradients | None) -> float | None:
    """Over the longer of the two."""
    if found is None or truth is None:
        return None
    longer = max(_norm(found), _norm(truth))
    return float((torch.cat(found) - torch.cat(truth)).norm()) / longer if longer else None


def _cosine(found: Gradients, other: Gradients | None) -> float | None:
    lengths = 0.0 if other is None else _norm(found) * _norm(other)
    return float(torch.cat(found) @ torch.cat(other or [])) / lengths if lengths else None


def _length(found: Gradients, truth: Gradients | None) -> float | None:
    unit = 0.0 if truth is None else _norm(truth)
    return _norm(found) / unit if unit else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _names(names: tuple[str, ...]) -> str:
    few = ", ".join(names[:_NAMED])
    return few if len(names) <= _NAMED else f"{few} and {len(names) - _NAMED} more"


def _number(form: str, *values: float | None) -> str:
    return "" if None in values else form.format(*values)
