"""Data, networks, training with checkpoints, and the demonstration behind the command line."""

from robustkern.training.data import Dataset, load
from robustkern.training.evaluation import evaluate
from robustkern.training.models import Normalize, ResNet, WideResNet, build, cnn
from robustkern.training.session import Options, train
from robustkern.training.trainer import Record, Trainer

__all__ = [
    "Dataset",
    "Normalize",
    "Options",
    "Record",
    "ResNet",
    "Trainer",
    "WideResNet",
    "build",
    "cnn",
    "evaluate",
    "load",
    "train",
]
