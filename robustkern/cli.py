"""The command line: `robustkern demo`, `train`, `evaluate`, `analyze` and `covariance`."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import robustkern
from robustkern.evaluation.suites.runner import SUITES
from robustkern.training.adversarial import DEFAULTS as ADVERSARIAL
from robustkern.training.analysis import H, analysis_text, analyze
from robustkern.training.covariance import (
    DECAY_LENGTHS,
    EPS,
    covariance_report,
    covariance_table,
)
from robustkern.training.data import NAMES
from robustkern.training.demo import demo
from robustkern.training.evaluation import PAGE, evaluate, verdict_text
from robustkern.training.figures import FIGURES
from robustkern.training.models import MODELS
from robustkern.training.penalty import DEFAULTS, SOURCES
from robustkern.training.recipes import RECIPES, from_recipe
from robustkern.training.session import Options, train
from robustkern.training.trainer import OPTIMIZERS, PRECISIONS

_DATA_HELP = (
    f"{', '.join(NAMES)}, or the path of an .npz file with x_train, y_train, x_test, y_test"
)
# What the library raises, with a message that says what to do; anything else is a fault of its own.
_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_TRAIN_EPILOG = """
A schedule is a number, or EPOCH:VALUE,EPOCH:VALUE,... with straight lines between the points:
--h 0:0,5:1.5 rises from 0 to 1.5 over five epochs and then stays.

Options of a penalty follow its --penalty; several penalties are added:
  robustkern train --penalty cure --weight 0.3 --h 0:0,5:0.5 --penalty gn --weight 0.1 --every 2
Adversarial training, alone or with penalties, which are then taken at the attacked images:
  robustkern train --adversarial pgd --adversarial-eps 0.1 --penalty gn --weight 0.1
A recipe has the options of a paper's training. What else is given holds in their place, and
--penalty in place of all its penalties. To fine-tune, start from the network of the clean recipe:
  robustkern train --recipe clean-resnet18-cifar10 --output clean
  robustkern train --recipe cure-resnet18-cifar10 --init clean/checkpoint.pt --output cure
An interrupted run goes on with the same command and --resume.

recipes:
"""
_TRAIN_EPILOG += "\n".join(f"  {name}" for name in RECIPES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. An error is named on stderr; with `--debug` it is raised.

    Args:
        arguments: of the command line; those of the process when None.

    Returns:
        The exit status: 0, 2 after an error, 130 when interrupted.
    """
    parser = _parser()
    if "" not in sys.path:  # so that module:factory is found in the working directory
        sys.path.insert(0, "")
    options = vars(parser.parse_args(arguments))
    command, run, debug = options.pop("command"), options.pop("run"), options.pop("debug")
    try:
        run(**options)
    except KeyboardInterrupt:
        print(f"robustkern {command}: interrupted", file=sys.stderr)
        return 130
    except _ERRORS as error:
        if debug:
            raise
        print(f"robustkern {command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(*, resume: bool, recipe: str | None, **given: Any) -> None:
    options = Options(**given) if recipe is None else from_recipe(recipe, given)
    print(train(options, resume=resume))


def _evaluate(*, output: str, **options: Any) -> None:
    print(verdict_text(evaluate(output=output, **options)))
    print(f"the whole report is in {Path(output) / PAGE}")


def _analyze(*, output: str, **options: Any) -> None:
    print(analysis_text(analyze(output=output, **options)))
    print(f"pictures and numbers are in {output}")


def _covariance(*, output: str, **options: Any) -> None:
    print(covariance_table(covariance_report(output=output, **options)))
    print(f"pictures and numbers are in {output}")


class _AddPenalty(argparse.Action):
    """Begin the options of a further penalty."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.penalties = [*getattr(namespace, "penalties", []), {"name": values}]


class _SetPenaltyOption(argparse.Action):
    """Set an option of the penalty named last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if "penalties" not in namespace:
            parser.error(f"{option_string} must follow the --penalty that it belongs to")
        namespace.penalties[-1][self.dest] = True if self.nargs == 0 else values


class _BeginAdversarial(argparse.Action):
    """Name the adversarial training."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.adversarial = {"name": values}


class _SetAdversarialOption(argparse.Action):
    """Set an option of the adversarial training."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if "adversarial" not in namespace:
            parser.error(f"{option_string} must follow --adversarial")
        namespace.adversarial[self.dest] = values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robustkern", description="Train image classifiers that small changes do not fool."
    )
    parser.add_argument("--version", action="version", version=robustkern.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, add, text in (
        ("demo", demo, _add_demo, "compare the methods on a small network, in minutes"),
        ("train", _train, _add_train, "train or fine-tune a network with penalties"),
        ("evaluate", _evaluate, _add_evaluate, "measure accuracy under attack"),
        (
            "analyze",
            _analyze,
            _add_analyze,
            "draw curvature, bounds and decision boundaries of networks, side by side",
        ),
        (
            "covariance",
            _covariance,
            _add_covariance,
            "draw the covariances of perturbations, and accuracy under correlated noise",
        ),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=_TRAIN_EPILOG if name == "train" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--data", "digits", _DATA_HELP)
    _add(parser, "--data-folder", "data", "where torchvision keeps its files")
    _add(parser, "--output", "robustkern-demo", "folder for demo.png and demo.json")
    _add(parser, "--seed", 0, "of the network and the batches")


def _add_train(parser: argparse.ArgumentParser) -> None:
    new = Options()
    # Only what is given, since all else may be a recipe's.
    add = functools.partial(_add, left_out=argparse.SUPPRESS)
    optional = functools.partial(_add_optional, left_out=argparse.SUPPRESS)
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="train as a paper does, where no other option says otherwise; all are named below",
    )
    group = parser.add_argument_group("data and network")
    add(group, "--data", new.data, _DATA_HELP)
    add(group, "--data-folder", new.data_folder, "where torchvision keeps its files")
    optional(group, "--train-size", int, "use the first so many training images")
    optional(group, "--test-size", int, "use the first so many test images")
    models = f"{', '.join(MODELS)}, or module:factory, called as factory((C, H, W), classes)"
    optional(group, "--model", str, f"{models} (default: cnn, or that of --init)")
    _add_switch(
        group,
        "--per-image",
        "standardize each image by itself, not by the training images' mean and deviation",
    )
    optional(group, "--init", str, "checkpoint to start from, for fine-tuning", "CHECKPOINT")
    _add_penalties(parser.add_argument_group("penalties"))
    _add_adversarial(parser.add_argument_group("adversarial training"))
    group = parser.add_argument_group("training")
    add(group, "--epochs", new.epochs, "passes over the training images")
    add(group, "--batch-size", new.batch_size, "images per step")
    add(group, "--optimizer", new.optimizer, "of the parameters", choices=OPTIMIZERS)
    add(group, "--lr", new.lr, "learning rate: a schedule", metavar="SCHEDULE")
    add(group, "--momentum", new.momentum, "of sgd")
    add(group, "--weight-decay", new.weight_decay, "L2, in the optimizer")
    add(group, "--crop", new.crop, "shift images by up to so many pixels, zeros coming in")
    _add_switch(group, "--flip", "mirror images at random")
    add(
        group,
        "--precision",
        new.precision,
        "bfloat16 and float16 by autocast, float16 with loss scaling",
        choices=tuple(PRECISIONS),
    )
    _add_switch(group, "--channels-last", "keep weights and activations in the order (N, H, W, C)")
    _add_switch(group, "--compile", "compile the network by torch.compile")
    add(
        group,
        "--batch-norm",
        new.batch_norm,
        "statistics of the penalty's passes: each batch's own, or the running ones",
        choices=("batch", "eval"),
    )
    add(
        group,
        "--shift",
        new.shift,
        "step of the finite differences, root mean square per pixel",
        type=_shift,
    )
    add(group, "--seed", new.seed, "of the network, the batches and all else that is random")
    add(group, "--device", new.device, "cpu, cuda, ...; auto takes an accelerator if there is one")
    group = parser.add_argument_group("results")
    add(group, "--output", new.output, "folder for checkpoint.pt and log.json")
    optional(
        group,
        "--curvature",
        float,
        "log after each epoch, for the first 64 test images, the curvature and the accuracy under "
        "PGD-10 of this L-infinity radius",
        "EPS",
    )
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint there")


def _add_penalties(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--penalty",
        dest="penalties",
        action=_AddPenalty,
        choices=tuple(DEFAULTS),
        default=argparse.SUPPRESS,
        help="add a penalty; give it again for a sum, each followed by its own options: "
        "cure, anchored-cure (curvature; anchored costs 3 plain steps, not 4), gn (squared "
        "gradient norm), tv (total variation), lipschitz (largest norm of the batch), "
        "llr (local linearity), sgr (structured gradient regularization)",
    )

    def option(flag: str, text: str, **more: Any) -> None:
        name = flag[2:].replace("-", "_")
        kept = {key: options[name] for key, options in DEFAULTS.items() if name in options}
        alike = len(set(kept.values())) == 1
        texts = [f"{value}" if alike else f"{key} {value}" for key, value in kept.items()]
        if more.get("nargs") != 0 and None not in kept.values():
            text += f" (default: {texts[0] if alike else ', '.join(texts)})"
        group.add_argument(
            flag, action=_SetPenaltyOption, default=argparse.SUPPRESS, help=text, **more
        )

    option("--weight", "factor of the penalty: a schedule", metavar="SCHEDULE")
    option("--h", "L2 length of CURE's step, in input units: a schedule", metavar="SCHEDULE")
    option("--direction", "of CURE's step", choices=("sign", "gradient", "gaussian"))
    option("--samples", "gaussian directions to average over", type=int)
    option("--norm", "CURE: the norm, as the authors' code has it, not its square", nargs=0)
    option("--p", "norm of tv and lipschitz: 1, 2 or inf", type=float)
    option("--mu", "factor of llr's predicted change", type=float)
    option("--eps", "largest change of a pixel by llr's ascent", type=float)
    option("--steps", "of llr's ascent", type=int)
    option(
        "--source",
        "of SGR's covariance: the gradients or their signs, at the true labels or predicted "
        "ones, or an attack at predicted labels",
        choices=SOURCES,
    )
    option("--attack-eps", "largest change of a pixel by the sources fgsm and pgd", type=float)
    option(
        "--standardize",
        "set the mean variance of SGR's covariance to a number, or to that of the training images "
        "(data): its weight is a noise-to-signal ratio then",
        type=_variance,
        metavar="VARIANCE",
    )
    option("--decay", "of SGR's running covariance", type=float)
    option("--update-every", "steps between updates of SGR's covariance", type=int)
    option("--every", "apply only at every K-th step, K times as strong", type=int, metavar="K")


def _add_adversarial(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adversarial",
        action=_BeginAdversarial,
        choices=tuple(ADVERSARIAL),
        default=argparse.SUPPRESS,
        help="train on attacked or noisy images, with any penalty or none: fgsm-rs (one step from "
        "a random start), pgd, deepfool (for fine-tuning), trades (clean images, and divergence of "
        "attacked ones), uniform or lrc (long-range-correlated) noise; its options follow it",
    )

    def option(key: str, kind: Any, text: str) -> None:
        kept = {name: options[key] for name, options in ADVERSARIAL.items() if key in options}
        known = [f"{name} {value:g}" for name, value in kept.items() if value is not None]
        group.add_argument(
            f"--adversarial-{key.replace('_', '-')}",
            dest=key,
            action=_SetAdversarialOption,
            default=argparse.SUPPRESS,
            type=kind,
            help=f"{text} (default: {', '.join(known)})" if known else text,
        )

    option("eps", _number, "largest change of a pixel, of lrc the deviation: as in 0.1 or 8/255")
    option("steps", int, "of the attack")
    option(
        "step_size",
        _number,
        "length of a step of the attack (default: 1.25 eps for fgsm-rs, else 2.5 eps / steps)",
    )
    option("beta", float, "weight of the divergence in trades")
    option("decay_length", float, "of lrc, in pixels")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="files that train wrote"
    )
    parser.add_argument(
        "--twins",
        metavar="CHECKPOINT",
        nargs="+",
        default=[],
        help="for each CHECKPOINT, in their order, one trained like it from another seed: its "
        "adversarial images are tried on that network",
    )
    parser.add_argument(
        "--suite",
        choices=tuple(SUITES),
        default="quick",
        help="quick: FGSM, PGD and Square; standard: every measure, the slow attacks on part of "
        "the images; full: all on all images, with AutoAttack and HopSkipJump (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--eps",
        type=_numbers,
        help="largest changes of a pixel, in [0, 1], for the curves: numbers or fractions as in "
        "0.1,0.2 or 2/255,8/255 (default: 0.05 to 0.3 for gray images, 1/255 to 8/255 for colour)",
    )
    parser.add_argument(
        "--radius",
        type=_number,
        help="largest change of a pixel where there is one only (default: 0.1 for gray images, "
        "8/255 for colour)",
    )
    _add_optional(parser, "--data", str, f"{_DATA_HELP} (default: the one trained on)")
    _add(parser, "--data-folder", "data", "where torchvision keeps its files")
    _add(
        parser,
        "--test-size",
        1000,
        "use the first so many test images; the detector and the universal perturbation are "
        "fitted to up to 500 after them, or where these are too few to the last tenth (at least "
        "19)",
    )
    _add(parser, "--batch-size", 256, "images per pass")
    _add(parser, "--seed", 0, "of the attacks")
    _add(parser, "--device", "auto", "cpu, cuda, ...; auto takes an accelerator if there is one")
    _add(
        parser,
        "--output",
        "robustkern-evaluation",
        "folder for report.html and report.json; until they are complete, of partial.json, from "
        "which the same command goes on",
    )


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="files that train wrote"
    )
    parser.add_argument(
        "--figures",
        type=lambda text: tuple(FIGURES) if text == "all" else text.split(","),
        default=tuple(FIGURES),
        metavar="NAMES",
        help=f"all, or some of {','.join(FIGURES)} (default: all)",
    )
    _add(parser, "--h", H, "L2 length of finite differences, in input units")
    _add_optional(parser, "--data", str, f"{_DATA_HELP} (default: the one trained on)")
    _add(parser, "--data-folder", "data", "where torchvision keeps its files")
    _add(
        parser,
        "--test-size",
        1000,
        "use the first so many test images; 100 at most for the profile, 200 where DeepFool runs",
    )
    _add(parser, "--seed", 0, "of random directions")
    _add(parser, "--device", "auto", "cpu, cuda, ...; auto takes an accelerator if there is one")
    _add(
        parser,
        "--output",
        "robustkern-analysis",
        "folder for the pictures, and for each figure its data as JSON: a figure whose data are "
        "there is not computed again",
    )


def _add_covariance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="files that train wrote"
    )
    _add_optional(parser, "--data", str, f"{_DATA_HELP} (default: the one trained on)")
    _add(parser, "--data-folder", "data", "where torchvision keeps its files")
    _add(parser, "--test-size", 500, "use the first so many test images")
    _add_optional(
        parser,
        "--attack-eps",
        float,
        "largest change of a pixel by FGSM and PGD (default: 0.1 for gray images, 2/255 for "
        "colour)",
    )
    shown = "numbers or fractions, separated by commas (default: "
    for flag, values, text in (
        ("--eps", EPS, "standard deviations of the noise: "),
        ("--decay-lengths", DECAY_LENGTHS, "of the noise, in pixels: "),
    ):
        listed = ",".join(f"{value:g}" for value in values)
        parser.add_argument(flag, type=_numbers, default=values, help=f"{text}{shown}{listed})")
    _add(parser, "--draws", 100, "of the noise for each image; the worst counts")
    _add(parser, "--batch-size", 256, "images per pass")
    _add(parser, "--seed", 0, "of the noise")
    _add(parser, "--device", "auto", "cpu, cuda, ...; auto takes an accelerator if there is one")
    _add(parser, "--output", "robustkern-covariance", "folder for the pictures and covariance.json")


def _add(group: Any, flag: str, default: Any, text: str, left_out: Any = None, **more: Any) -> None:
    """Add an option with a default, whose type it has; `left_out` takes the default's place."""
    more.setdefault("type", type(default))
    if left_out is None:
        left_out = default
    group.add_argument(flag, default=left_out, help=f"{text} (default: {default})", **more)


def _add_optional(
    group: Any,
    flag: str,
    kind: type,
    text: str,
    metavar: str | None = None,
    left_out: Any = None,
) -> None:
    """Add an option that may be left out."""
    group.add_argument(flag, type=kind, help=text, metavar=metavar, default=left_out)


def _add_switch(group: Any, flag: str, text: str) -> None:
    """Add an option of `train` that is on or off, and off by default."""
    group.add_argument(
        flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(Fraction(part)) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be numbers or fractions, got {text}") from error


def _number(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a number or a fraction, got {text}") from error


def _variance(text: str) -> float | str:
    return text if text == "data" else _positive(text, "'data'")


def _shift(text: str) -> float | str:
    return text if text == "auto" else _positive(text, "'auto'")


def _positive(text: str, word: str) -> float:
    """A positive number, where a word may stand as well."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {word} or a positive number, got {text}")
    return number
