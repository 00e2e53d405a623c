"""Epochs of training with a penalty on images in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustkern import gradients
from robustkern.evaluation import accuracy
from robustkern.evaluation.counting import counted
from robustkern.training.adversarial import Augmentation, divergence
from robustkern.training.data import Dataset
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.schedules import Schedule

Advance = Callable[[int], object]
# What autocast computes in; None leaves it off.
PRECISIONS = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": None,
}
OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Record:
    """One epoch: means over the training samples, accuracy on the test images, training time.

    The passes are those of the network per training sample, those of attacks and penalties among
    them: plain training makes one forward and one backward.
    """

    epoch: int
    loss: float
    penalty: float
    clean_accuracy: float
    forward_passes: float
    backward_passes: float
    seconds: float


class Trainer:
    """Trains `model` on `data` and carries all the state that the next epoch depends on.

    Batches come from a generator of their own, so the global random state (dropout, Gaussian
    directions) and the order of the samples do not disturb each other. An epoch given its state is
    deterministic on a CPU.

    Args:
        model: maps (N, C, H, W) in [0, 1] to (N, classes); moved to `device` and, for float64, to
            that dtype.
        data: the images.
        penalty: what is added to the cross entropy, with its schedules.
        optimizer: `adam` or `sgd`.
        lr: learning rate.
        momentum: of `sgd`.
        weight_decay: L2, in the optimizer.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        crop: shift each training image by up to this many pixels, zeros coming in.
        flip: mirror each training image left to right with probability one half.
        augmentation: `augmentation(model, inputs, targets)` gives the images to train on, after
            crop and flip; see `robustkern.training.adversarial`. Loss and penalty are taken there.
        trades_beta: with it loss and penalty are taken at the images before the augmentation, and
            trades_beta KL(f(x) || f(augmented x)) is added to the loss (TRADES, Zhang et al. 2019),
            at one more pass each way, beside a penalty two; batch norm's running statistics see
            them too.
        precision: `float32`, `float64`, or autocast to `bfloat16` or `float16`, the last with a
            `GradScaler`.
        batch_norm: `batch` or `eval`; see `robustkern.backward`.
        shift: see `robustkern.backward`.
        seed: of the order of the samples and their augmentation.
        device: where to train.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        penalty: ScheduledPenalty,
        *,
        optimizer: str = "adam",
        lr: Schedule = Schedule(((0, 1e-3),)),  # noqa: B008  (frozen)
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        batch_size: int = 64,
        crop: int = 0,
        flip: bool = False,
        augmentation: Augmentation | None = None,
        trades_beta: float | None = None,
        precision: str = "float32",
        batch_norm: str = "batch",
        shift: float | str = "auto",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"Trainer: optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer}"
            )
        if precision not in PRECISIONS:
            raise ValueError(
                f"Trainer: precision must be one of {', '.join(PRECISIONS)}, got {precision}"
            )
        if batch_size < 1 or crop < 0:
            raise ValueError(
                "Trainer: batch_size must be at least 1 and crop at least 0, "
                f"got {batch_size} and {crop}"
            )
        if trades_beta is not None and not 0 <= trades_beta < math.inf:
            raise ValueError(
                f"Trainer: trades_beta must be finite and not negative, got {trades_beta}"
            )
        if trades_beta is not None and augmentation is None:
            raise ValueError("Trainer: augmentation must be given with trades_beta, got None")
        self.device = torch.device(device)
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = model.to(self.device, dtype)
        self.data = data
        self._x = data.x_train.to(self.device, dtype)
        self._y = data.y_train.to(self.device)
        self.penalty = penalty
        if penalty.penalty is not None:
            penalty.penalty.to(self.device)
        self.lr = lr
        self.optimizer = _optimizer(optimizer, self.model, lr(0), momentum, weight_decay)
        self.batch_size, self.crop, self.flip = batch_size, crop, flip
        self.augmentation, self.trades_beta = augmentation, trades_beta
        self._autocast = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.batch_norm, self.shift = batch_norm, shift
        self.batches = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def run_epoch(self, advance: Advance | None = None) -> Record:
        """Train for one epoch, then measure the accuracy on the test images.

        Args:
            advance: called with the number of samples after each step.

        Returns:
            What happened.

        Raises:
            FloatingPointError: the loss or the network is no longer finite.
        """
        start = time.perf_counter()
        self.model.train()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        order = torch.randperm(len(self._x), generator=self.batches)
        batches = torch.split(order, self.batch_size)
        with counted(self.model) as passes:
            for number, index in enumerate(batches):
                self._set_schedules(self.epoch + number / len(batches))
                total += len(index) * self.step(index.to(self.device))
                if advance is not None:
                    advance(len(index))
        loss, penalty = (total / len(self._x)).tolist()
        # The last step has been taken since the last loss.
        state = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        norm = float(nn.utils.get_total_norm(state))
        if not math.isfinite(loss + penalty + norm):
            raise FloatingPointError(
                "Trainer: loss, penalty and the norm of the network must stay finite, got "
                f"{loss}, {penalty} and {norm} in epoch {self.epoch + 1}; try a smaller learning "
                "rate or weight"
            )
        seconds = time.perf_counter() - start
        self.epoch += 1
        # A compiled network would be compiled again for each size of batch here.
        with torch.compiler.set_stance("force_eager"):
            clean = accuracy(self.model, self.data.x_test, self.data.y_test)
        forward, backward = passes.forward / len(self._x), passes.backward / len(self._x)
        return Record(self.epoch, loss, penalty, clean, forward, backward, seconds)

    def step(self, index: Tensor) -> Tensor:
        """Take one optimizer step on the samples `index`, (N,) int64.

        Returns:
            (2,): loss and penalty, detached.
        """
        clean, targets = augment(self._x[index], self.crop, self.flip, self.batches), self._y[index]
        augmented = clean
        if self.augmentation is not None:
            # Autocast of its own: torch 2.10 may reuse casts that were made without gradients.
            with self._seeded(), self._precision():
                augmented = self.augmentation(self.model, clean, targets)
        self.optimizer.zero_grad()
        with self._precision():
            if self.trades_beta is None:
                loss, penalty = self.backward(augmented, targets)
            else:
                loss, penalty = self._trades(clean, augmented, targets, self.trades_beta)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.double(), penalty.double()])

    def backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Put the gradient of loss and penalty, scaled by `scaler`, into `.grad`.

        Args:
            inputs: (N, C, H, W).
            targets: (N,) int64.

        Returns:
            Loss and penalty: scalars, detached.
        """
        if self.penalty.penalty is None:
            loss = F.cross_entropy(self.model(inputs), targets)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            return loss.detach(), torch.zeros_like(loss)
        step = gradients.backward(
            self.model,
            inputs,
            targets,
            self.penalty.penalty,
            shift=self.shift,
            scaler=self.scaler if self.scaler.is_enabled() else None,
            batch_norm=self.batch_norm,
        )
        if not self.scaler.is_enabled():
            return step.loss, step.penalty
        # Where the scaled gradients overflowed, the scaler skips the step; its value is unknown.
        return step.loss, torch.where(step.penalty.isfinite(), step.penalty, 0)

    def _trades(
        self, clean: Tensor, attacked: Tensor, targets: Tensor, beta: float
    ) -> tuple[Tensor, Tensor]:
        """As `backward`, at the clean images, with the divergence of the attacked as a term."""
        if self.penalty.penalty is None:  # one pass at the clean images serves both terms
            outputs = self.model(clean)
            loss = F.cross_entropy(outputs, targets)
            loss = loss + beta * divergence(outputs, self.model(attacked))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            return loss.detach(), torch.zeros_like(loss)
        loss, penalty = self.backward(clean, targets)
        term = beta * divergence(self.model(clean), self.model(attacked))
        self.scaler.scale(term).backward()  # type: ignore[no-untyped-call]
        return loss + term.detach(), penalty

    def state_dict(self) -> dict[str, Any]:
        """Everything but the options: tensors and plain data, the global random state included."""
        penalty = self.penalty.penalty
        random = {"cpu": torch.get_rng_state()}
        if self.device.type != "cpu":
            random["device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": None if penalty is None else penalty.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.get_state(),
            "random": random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave, and with it the global random state.

        Args:
            state: of a trainer with the same model and options.
        """
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.penalty.penalty is not None:
            self.penalty.penalty.load_state_dict(state["penalty"])
        self.scaler.load_state_dict(state["scaler"])
        self.batches.set_state(state["batches"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(
                state["random"]["device"], self.device
            )

    def _set_schedules(self, epoch: float) -> None:
        self.penalty.set_epoch(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(epoch)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Inside, the global random state follows from that of `batches`; then it is put back."""
        seed = int(torch.randint(2**62, (), generator=self.batches))
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type):
            if devices:
                torch.manual_seed(seed)
            else:  # the same on a CPU in none of the time, most of a millisecond
                torch.default_generator.manual_seed(seed)
            yield

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None)


def augment(inputs: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `crop` pixels, zeros coming in, and mirror half of them.

    Args:
        inputs: (N, C, H, W).
        crop: largest shift in pixels, each way; 0 for none.
        flip: mirror left to right with probability one half.
        generator: on the CPU.

    Returns:
        Images of the same shape and dtype.

    Example:
        >>> augment(torch.ones(1, 1, 2, 2), 0, True, torch.Generator())
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    samples, _, height, width = inputs.shape
    if crop:
        shifts = torch.randint(2 * crop + 1, (2, samples, 1), generator=generator)
        rows, columns = (shifts[0] + torch.arange(height)), (shifts[1] + torch.arange(width))
        padded = F.pad(inputs, (crop,) * 4).permute(0, 2, 3, 1)
        sample = torch.arange(samples)[:, None, None]
        inputs = (
            padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
        )
    if flip:
        mirrored = torch.rand(samples, generator=generator) < 0.5
        inputs = torch.where(
            mirrored.to(inputs.device)[:, None, None, None], inputs.flip(3), inputs
        )
    return inputs


def _optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay)
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
