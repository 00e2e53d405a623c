"""Data, networks, training with checkpoints, and the demonstration behind the command line."""

from robustkern.training.analysis import analyze
from robustkern.training.curvature import Curvature, CurvatureMonitor
from robustkern.training.data import Dataset, load
from robustkern.training.evaluation import evaluate
from robustkern.training.models import (
    Normalize,
    PerImageStandardization,
    ResNet,
    ResNeXt,
    WideResNet,
    build,
    cnn,
)
from robustkern.training.session import Options, train
from robustkern.training.trainer import Record, Trainer

__all__ = [
    "Curvature",
    "CurvatureMonitor",
    "Dataset",
    "Normalize",
    "Options",
    "PerImageStandardization",
    "Record",
    "ResNeXt",
    "ResNet",
    "Trainer",
    "WideResNet",
    "analyze",
    "build",
    "cnn",
    "evaluate",
    "load",
    "train",
]
