"""A training run, from options to checkpoint and log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustkern.training.adversarial import adversarial_training
from robustkern.training.checkpoint import load_checkpoint, restore_model, save_checkpoint
from robustkern.training.curvature import CurvatureMonitor
from robustkern.training.data import Dataset, load
from robustkern.training.files import output_folder, write_json
from robustkern.training.models import build, pixel_statistics
from robustkern.training.penalty import ScheduledPenalty
from robustkern.training.report import percent, progress_bar, versions
from robustkern.training.schedules import Schedule
from robustkern.training.trainer import Trainer

CHECKPOINT, LOG = "checkpoint.pt", "log.json"
# Radii, in input units, at which gray images and colour images are usually attacked.
_EPS_GRAY = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_EPS_COLOUR = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
# Options that a resumed run may change: they do not touch what an epoch computes.
_FREE = ("epochs", "output", "data_folder", "init", "device", "curvature")


@dataclass(frozen=True)
class Options:
    """Options of a run, plain data; `robustkern train --help` explains each."""

    data: str = "digits"
    data_folder: str = "data"
    train_size: int | None = None
    test_size: int | None = None
    model: str | None = None
    per_image: bool = False
    init: str | None = None
    penalties: Sequence[Mapping[str, Any]] = ()
    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adam"
    lr: str = "0.001"
    momentum: float = 0.9
    weight_decay: float = 0.0
    crop: int = 0
    flip: bool = False
    adversarial: Mapping[str, Any] | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    batch_norm: str = "batch"
    shift: float | str = "auto"
    curvature: float | None = None
    seed: int = 0
    device: str = "auto"
    output: str = "robustkern-run"


def train(
    options: Options,
    *,
    resume: bool = False,
    seconds: float = math.inf,
    trainer_type: type[Trainer] = Trainer,
) -> Path:
    """Train as `options` say; after every epoch write `checkpoint.pt` and `log.json`.

    The global random state is seeded. On a CPU, the result of a run that was interrupted and
    resumed is that of an uninterrupted one to the last bit.

    Args:
        options: of the run.
        resume: go on from the checkpoint in the output folder. The options must be those it was
            made with, and `trainer_type`; `epochs` may be raised.
        seconds: of the call. Once there is an epoch, begin none that would last beyond that, if it
            took as long as the longest before it; `resume` goes on with the rest.
        trainer_type: what takes the steps, such as `robustkern.training.naive.NaiveCURETrainer`.

    Returns:
        The checkpoint.

    Raises:
        OSError: the output folder cannot be written to.
        TypeError: `trainer_type` is no kind of `Trainer`.
        ValueError: an option out of range, a damaged file, or, without `resume`, an output folder
            that already holds a run.
    """
    begin = time.perf_counter()
    if not (isinstance(trainer_type, type) and issubclass(trainer_type, Trainer)):
        raise TypeError(f"train: trainer_type must be Trainer or a kind of it, got {trainer_type}")
    if options.epochs < 1:
        raise ValueError(f"train: epochs must be at least 1, got {options.epochs}")
    folder = output_folder(options.output, "train")
    path = folder / CHECKPOINT
    saved = load_checkpoint(path) if resume else None
    if saved is None and path.exists():
        raise ValueError(
            f"train: output folder {folder} must not hold a run, got {CHECKPOINT}; "
            "choose another, or --resume"
        )
    if saved is not None:
        _check_same(options, saved["options"])
        made_by = saved.get("trainer_type", trainer_type.__name__)  # older ones do not say
        if trainer_type.__name__ != made_by:
            raise ValueError(
                f"train: trainer_type must be what the resumed run was made with, {made_by}, "
                f"got {trainer_type.__name__}"
            )
    data = load(options.data, options.data_folder).first(options.train_size, options.test_size)
    torch.manual_seed(options.seed)
    arguments, model = _network(options, data, saved)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.compile:
        # In place, for the names of the weights to stay; each shape by itself, which is faster.
        model.compile(dynamic=False)
    augmentation, trades_beta = adversarial_training(options.adversarial, data.shape)
    trainer = trainer_type(
        model,
        data,
        ScheduledPenalty(options.penalties, data.shape, model=model, images=data.x_train),
        optimizer=options.optimizer,
        lr=Schedule.parse("lr", options.lr),
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        batch_size=options.batch_size,
        crop=options.crop,
        flip=options.flip,
        augmentation=augmentation,
        trades_beta=trades_beta,
        precision=options.precision,
        batch_norm=options.batch_norm,
        shift=options.shift,
        seed=options.seed,
        device=find_device(options.device),
    )
    monitor = None
    if options.curvature is not None:
        monitor = CurvatureMonitor(data.x_test, data.y_test, options.curvature)
    log: list[dict[str, Any]] = []
    if saved is not None:
        try:
            trainer.load_state_dict(saved["trainer"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"train: checkpoint {path} must hold the state of this run, got {error!r}"
            ) from error
        log = saved["log"]
    plain = dataclasses.asdict(options)
    longest = max((record["seconds"] for record in log), default=0.0)
    while trainer.epoch < options.epochs:
        started = time.perf_counter()
        if longest and started + longest > begin + seconds:
            break
        with progress_bar(len(data.x_train), f"epoch {trainer.epoch + 1}/{options.epochs}") as bar:
            record = trainer.run_epoch(bar.update)
        log.append(dataclasses.asdict(record))
        if monitor is not None:
            log[-1]["curvature"] = dataclasses.asdict(monitor(model))
        content = {
            "options": plain,
            "model": arguments,
            "trainer": trainer.state_dict(),
            "trainer_type": trainer_type.__name__,
            "log": log,
        }
        save_checkpoint(path, content)
        write_json(folder / LOG, {"options": plain, "versions": versions(), "epochs": log})
        print(
            f"epoch {record.epoch}: loss {record.loss:.4f}, penalty {record.penalty:.4f}, "
            f"clean accuracy {percent(record.clean_accuracy)}, "
            f"{record.forward_passes:.1f} forward and {record.backward_passes:.1f} backward "
            f"passes a step, {record.seconds:.1f} s",
            flush=True,
        )
        longest = max(longest, time.perf_counter() - started)
    return path


def usual_eps(data: Dataset) -> tuple[float, ...]:
    """Radii, in input units, at which images like these are usually attacked.

    Args:
        data: gray images, one channel, or colour images.

    Returns:
        0.05 to 0.3 for gray images, 1/255 to 8/255 for colour.
    """
    return _EPS_GRAY if data.shape[0] == 1 else _EPS_COLOUR


def usual_radius(data: Dataset) -> float:
    """The one at which such images are compared: 0.1 for gray images, 8/255 for colour.

    Args:
        data: gray images, one channel, or colour images.

    Returns:
        A radius among `usual_eps`.
    """
    return 0.1 if data.shape[0] == 1 else 8 / 255


def find_device(name: str) -> torch.device:
    """Find a device by name.

    Args:
        name: as `torch.device` takes it; `auto` is the accelerator if there is one, else the CPU.

    Returns:
        The device.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"find_device: device {name} must be usable here, got: {reason}"
        ) from error
    return device


def check_fits(command: str, arguments: Mapping[str, Any], data: Dataset) -> None:
    """See that a checkpoint's network takes these images.

    Args:
        command: named in the message.
        arguments: of `models.build`, as the checkpoint has them.
        data: the images.

    Raises:
        ValueError: images of another shape, or of more classes.
    """
    shape, classes = tuple(arguments["shape"]), arguments["classes"]
    if data.shape != shape or data.classes > classes:
        raise ValueError(
            f"{command}: data {data.name} must fit the checkpoint's network, made for images of "
            f"shape {shape} and {classes} classes, got {data.shape} and {data.classes}"
        )


def _network(
    options: Options, data: Dataset, saved: dict[str, Any] | None
) -> tuple[dict[str, Any], nn.Module]:
    """The arguments of `models.build` and the network: new, resumed, or from another checkpoint."""
    source = saved
    if source is None and options.init is not None:
        source = load_checkpoint(options.init)
    if source is not None:
        arguments = source["model"]
        if options.model not in (None, arguments["name"]):
            raise ValueError(
                f"train: model must be that of the checkpoint, {arguments['name']}, "
                f"got {options.model}"
            )
        if options.per_image and not arguments.get("per_image", False):
            raise ValueError(
                "train: per_image must be as the network of the checkpoint was made, False, "
                "got True"
            )
        check_fits("train", arguments, data)
        return arguments, restore_model(source)
    mean, std = pixel_statistics(data.x_train)
    arguments = {
        "name": options.model or "cnn",
        "shape": data.shape,
        "classes": data.classes,
        "mean": mean,
        "std": std,
        "per_image": options.per_image,
    }
    return arguments, build(**arguments)


def _check_same(options: Options, saved: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(Options)}
    unknown = [name for name in saved if name not in known]
    if unknown:
        raise ValueError(
            "train: the resumed run must be of options that this version has, "
            f"got {', '.join(unknown)}"
        )
    # An option that is newer than the checkpoint was at its default.
    made_with = {**dataclasses.asdict(Options()), **saved}
    for name, value in dataclasses.asdict(options).items():
        same = made_with[name] == value
        if name == "penalties":  # of any sequence: that of none has been a list and a tuple
            same = list(made_with[name]) == list(value)
        if name not in _FREE and not same:
            raise ValueError(
                f"train: {name} must be what the resumed run was made with, {made_with[name]}, "
                f"got {value}"
            )
