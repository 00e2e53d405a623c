"""What every penalty is, and how penalties combine."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkern import gradients

__all__ = ["Lazy", "Penalty", "Sum"]


class Penalty(nn.Module, ABC):
    r"""A scalar function R of input gradients; subclass it and define `value`.

    `robustkern.backward(model, inputs, targets, penalty)` trains with it at the cost of a few
    ordinary passes; called as a module it is a term of the loss.

    Example:
        A penalty of one's own, on how far the input gradients of a batch are from their mean:

        >>> import torch, robustkern
        >>> class Spread(robustkern.Penalty):
        ...     def value(self, gradient):
        ...         return (gradient - gradient.mean(0)).square().sum()
        >>> model = torch.nn.Linear(4, 3)
        >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 3
        >>> robustkern.backward(model, inputs, targets, Spread()).penalty.shape
        torch.Size([])
    """

    def points(self, inputs: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        r"""Further points at which the input gradient is needed.

        Called once a step, without autograd.

        Args:
            inputs: (N, \*D), detached.
            gradient: (N, \*D), the input gradient there.

        Returns:
            Points of the inputs' shape. None by default.
        """
        return ()

    @abstractmethod
    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        r"""R, its weight included.

        It must be differentiable, a pure function of its arguments, and may be called twice a step.
        A gradient that it detaches is held constant, which saves a pass. Ranks of
        torch.distributed average it, each weighted by its samples.

        Args:
            gradient: (N, \*D), the gradient of each sample's own loss at the inputs.
            *shifted: the same at each of the `points`; then, if it `takes_losses`, each sample's
                own loss, (N,), at the inputs and at each of the points.

        Returns:
            0-dimensional.
        """

    def takes_losses(self) -> bool:
        """Whether `value` is given the losses too, which `loss_fn` makes of each sample alone."""
        return False

    def search(
        self,
        inputs: Tensor,
        gradient: Tensor,
        loss: Tensor,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Sequence[Tensor]:
        r"""The `points` of a penalty that `takes_losses`, which may look for them with passes.

        Called once a step, without autograd.

        Args:
            inputs: (N, \*D), detached.
            gradient: (N, \*D), the input gradient there.
            loss: (N,), each sample's own loss there.
            evaluate: a pass at a point of the inputs' shape, with the random numbers of all others:
                gradient and losses there.

        Returns:
            Points of the inputs' shape.
        """
        return self.points(inputs, gradient)

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar of each sample, (N,), whose input gradient is meant, if not its loss.

        Random numbers drawn in it are the same in all passes of a step.

        Args:
            outputs: what the model returned.
            targets: the targets of the step.

        Raises:
            TypeError: if the penalty has none of its own; see `has_objective`.
        """
        raise TypeError(f"{type(self).__name__} has no objective but the training loss")

    def has_objective(self) -> bool:
        """Whether `objective` takes the place of the training loss."""
        return type(self).objective is not Penalty.objective

    def due(self) -> "Penalty | None":
        """The penalty that applies to this call, or None; asked once a step, before any pass."""
        return self

    def points_key(self) -> Hashable:
        """Terms of a sum whose keys are equal have the same points, and share them."""
        return id(self)

    def forward(
        self,
        model: nn.Module,
        inputs: Tensor | Mapping[str, Any],
        targets: Tensor,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        output: str | int | None = None,
        wrt: str | None = None,
        shift: float | str = "auto",
        method: str = "double_backward",
    ) -> Tensor:
        r"""The penalty as a term of the loss: `loss_fn(model(x), y) + penalty(model, x, y)`.

        Args:
            model: the network; its buffers stay as they are.
            inputs: (N, \*D), floating, or a mapping of names to entries, for model(\**inputs).
            targets: N of them, as `loss_fn` takes them.
            loss_fn: returns the batch mean.
            output: where the model returns a tuple, a dict or the like, the index or name of the
                outputs that the loss takes.
            wrt: where inputs is a mapping, the name of the entry whose gradient is penalized.
            shift: of "first_order": displacement of the finite difference, root-mean-square per
                element in input units, or "auto".
            method: "double_backward" (exact, by autograd) or "first_order".

        Returns:
            R, 0-dimensional, with its gradient in the parameters.
        """
        return gradients.loss_term(
            model,
            inputs,
            targets,
            self,
            loss_fn=loss_fn,
            output=output,
            wrt=wrt,
            shift=shift,
            method=method,
        )

    def __add__(self, other: "Penalty") -> "Sum":
        """The sum of two penalties."""
        return Sum(self, other)


class Sum(Penalty):
    """The sum of penalties, which share the gradient at the inputs and any points they have alike.

    Args:
        *terms: penalties, at least one; sums among them are taken apart.

    Raises:
        TypeError: for a term that is no penalty.
        ValueError: for no term, or terms with different objectives.
    """

    def __init__(self, *terms: Penalty) -> None:
        super().__init__()
        if not terms:
            raise ValueError("Sum: terms must be at least one, got none")
        for term in terms:
            if not isinstance(term, Penalty):
                raise TypeError(f"Sum: terms must be penalties, got {type(term).__name__}")
        self.terms = nn.ModuleList(
            [  # Dynamo cannot trace a generator here
                part
                for term in terms
                for part in (term._penalties() if isinstance(term, Sum) else [term])
            ]
        )
        self._where: dict[Hashable, slice] = {}
        objectives = {self._objective_of(term) for term in self._penalties()}
        if len(objectives) > 1:
            raise ValueError("Sum: terms must have one objective, got different ones")

    @staticmethod
    def _objective_of(term: Penalty) -> Hashable:
        while isinstance(term, Lazy):
            term = term.penalty
        if isinstance(term, Sum):
            return Sum._objective_of(term._penalties()[0])
        return term.objective if term.has_objective() else None

    def _penalties(self) -> list[Penalty]:
        return [term for term in self.terms if isinstance(term, Penalty)]

    def points(self, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """The union of the terms' points."""
        return self._union(lambda term: term.points(inputs, gradient))

    def search(
        self,
        inputs: Tensor,
        gradient: Tensor,
        loss: Tensor,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> list[Tensor]:
        """The union of what the terms find."""
        return self._union(lambda term: term.search(inputs, gradient, loss, evaluate))

    def _union(self, points_of: Callable[[Penalty], Sequence[Tensor]]) -> list[Tensor]:
        shared: dict[Hashable, Sequence[Tensor]] = {}
        for term in self._penalties():
            key = term.points_key()
            if key not in shared:
                shared[key] = points_of(term)
        self._where, start = {}, 0
        for key, points in shared.items():
            self._where[key] = slice(start, start + len(points))
            start += len(points)
        return [point for points in shared.values() for point in points]

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The sum of the terms, each from the gradients, and losses, at its own points."""
        values = []
        points = len(shifted) // 2 if self.takes_losses() else len(shifted)
        shifted, losses = shifted[:points], shifted[points:]
        for term in self._penalties():
            where = self._where[term.points_key()]
            own = (losses[0], *losses[1:][where]) if term.takes_losses() else ()
            values.append(term.value(gradient, *shifted[where], *own))
        return torch.stack(values).sum()

    def takes_losses(self) -> bool:
        """Whether any term does."""
        return any(term.takes_losses() for term in self._penalties())

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The objective that the terms have in common."""
        return self._penalties()[0].objective(outputs, targets)

    def has_objective(self) -> bool:
        """Whether the terms have an objective of their own."""
        return self._penalties()[0].has_objective()

    def due(self) -> Penalty | None:
        """The sum of the terms that are due."""
        due = [term.due() for term in self._penalties()]
        present = [term for term in due if term is not None]
        return Sum(*present) if present else None


class Lazy(Penalty):
    """A penalty applied on every k-th training call, multiplied by k; the others are plain steps.

    A lazy penalty within counts the calls it is asked on, and what it leaves out stays out.

    In eval mode (of this module) it is the penalty itself. The count is in `state_dict`.

    Args:
        penalty: the penalty to apply.
        every: k, at least 1.

    Raises:
        TypeError: for a penalty that is none, or `every` not an int.
        ValueError: for `every` below 1.
    """

    def __init__(self, penalty: Penalty, every: int) -> None:
        super().__init__()
        if not isinstance(penalty, Penalty):
            raise TypeError(f"Lazy: penalty must be a Penalty, got {type(penalty).__name__}")
        self.penalty = penalty
        self.every = check_every("Lazy", "every", every)
        self.calls = 0

    def due(self) -> Penalty | None:
        """The penalty times k, on every k-th call in training mode."""
        if self.training:
            self.calls += 1
            if self.calls % self.every:
                return None
        due = self.penalty.due()
        if due is self.penalty:
            return self
        if due is None:
            return None
        scaled = Lazy(due, self.every)
        scaled.training = self.training
        return scaled

    def points(self, inputs: Tensor, gradient: Tensor) -> Sequence[Tensor]:
        """The penalty's points."""
        return self.penalty.points(inputs, gradient)

    def takes_losses(self) -> bool:
        """Whether the penalty does."""
        return self.penalty.takes_losses()

    def search(
        self,
        inputs: Tensor,
        gradient: Tensor,
        loss: Tensor,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Sequence[Tensor]:
        """What the penalty finds."""
        return self.penalty.search(inputs, gradient, loss, evaluate)

    def value(self, gradient: Tensor, *shifted: Tensor) -> Tensor:
        """The penalty's value, times k in training mode."""
        factor = self.every if self.training else 1
        return factor * self.penalty.value(gradient, *shifted)

    def objective(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The penalty's objective."""
        return self.penalty.objective(outputs, targets)

    def has_objective(self) -> bool:
        """Whether the penalty has one."""
        return self.penalty.has_objective()

    def points_key(self) -> Hashable:
        """The penalty's."""
        return self.penalty.points_key()

    def get_extra_state(self) -> Tensor:
        """The count of training calls, for `state_dict`."""
        return torch.tensor(self.calls, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the count from a `state_dict`."""
        self.calls = int(state)


def check_every(function: str, argument: str, value: int) -> int:
    """An interval in calls: an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: {argument} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{function}: {argument} must be at least 1, got {value}")
    return value


def check_weight(function: str, argument: str, value: float) -> float:
    """A weight or a length: a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    if not 0 <= value < torch.inf:
        raise ValueError(f"{function}: {argument} must be finite and not negative, got {value!r}")
    return float(value)
