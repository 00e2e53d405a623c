"""Image data sets as tensors in memory: pixels in [0, 1], layout (N, C, H, W)."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustkern.training.extras import require

NAMES = ("digits", "mnist", "cifar10", "svhn")
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """Training and test images, (N, C, H, W) float32 in [0, 1], and their labels, (N,) int64."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return 1 + int(max(self.y_train.max(), self.y_test.max()))

    def first(self, train: int | None = None, test: int | None = None) -> Dataset:
        """Keep the first `train` training images and the first `test` test images.

        Args:
            train: at least 1; None keeps all.
            test: at least 1; None keeps all.

        Returns:
            The smaller data set.

        Raises:
            ValueError: a number below 1.
        """
        for size in (train, test):
            if size is not None and size < 1:
                raise ValueError(
                    f"Dataset.first: sizes must be at least 1, got train={train} and test={test}"
                )
        return Dataset(
            self.name,
            self.x_train[:train],
            self.y_train[:train],
            self.x_test[:test],
            self.y_test[:test],
        )


def load(name: str, folder: str | Path = "data") -> Dataset:
    """Load a data set by name, or from an `.npz` file.

    Args:
        name: `digits`, scikit-learn's 8x8 images, which it brings along (1,347 for training and 450
            for testing, drawn once and for all, by class); `mnist`, `cifar10` or `svhn`, which
            torchvision downloads; or the path of an `.npz` file with the arrays `x_train`,
            `y_train`, `x_test` and `y_test`. There x is (N, H, W), (N, C, H, W) or (N, H, W, C),
            the smaller of the second and last axis being the channels; uint8, which is divided by
            255, or floating point in [0, 1]. y is (N,) integers from 0.
        folder: where torchvision keeps its files.

    Returns:
        The images and labels.

    Raises:
        FileNotFoundError: there is no such file, or torchvision has none and cannot download any.
        ImportError: scikit-learn or torchvision is missing; the message says which extra installs
            it.
        ValueError: an unknown name, or a file that breaks the rules above; the message names file
            and rule.

    Example:
        >>> data = load("digits")
        >>> data.shape, data.classes, len(data.x_train), len(data.x_test)
        ((1, 8, 8), 10, 1347, 450)
    """
    if name == "digits":
        return _digits()
    if name in NAMES:
        return _torchvision(name, Path(folder))
    if not str(name).endswith(".npz"):
        raise ValueError(
            f"load: data must be one of {', '.join(NAMES)} or the path of an .npz file, got {name}"
        )
    return _npz(Path(name))


def _digits() -> Dataset:
    bunch = require("sklearn.datasets", "train").load_digits()
    x_train, x_test, y_train, y_test = require("sklearn.model_selection", "train").train_test_split(
        bunch.images / bunch.images.max(),
        bunch.target,
        test_size=450,
        random_state=0,
        stratify=bunch.target,
    )
    return _dataset(
        "digits", {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    )


def _torchvision(name: str, folder: Path) -> Dataset:
    """MNIST, CIFAR-10 or SVHN; for the last, torchvision's arguments and names are others."""
    datasets = require("torchvision.datasets", "data")
    arrays: dict[str, Any] = {}
    try:
        for split in ("train", "test"):
            if name == "svhn":
                source = datasets.SVHN(str(folder), split=split, download=True)
                arrays[f"x_{split}"], arrays[f"y_{split}"] = source.data, source.labels
            else:
                kind = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
                source = kind(str(folder), train=split == "train", download=True)
                arrays[f"x_{split}"], arrays[f"y_{split}"] = source.data, source.targets
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"load: data set {name} must lie in the folder {folder} or be downloadable, got: "
            f"{error}; put the files that torchvision wants there, or give the path of an .npz "
            f"file with {', '.join(_NPZ_KEYS)}"
        ) from error
    return _dataset(name, {key: np.asarray(array) for key, array in arrays.items()})


def _npz(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(
            f"load: data file {path} does not exist; give an .npz file with "
            f"{', '.join(_NPZ_KEYS)}, or a name: {', '.join(NAMES)}"
        )
    try:
        # Opened here, since np.load leaves a file open that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in _NPZ_KEYS if key not in archive]
            if missing:
                raise ValueError(
                    f"arrays {', '.join(_NPZ_KEYS)} are needed, {', '.join(missing)} missing"
                )
            return _dataset(path.stem, {key: archive[key] for key in _NPZ_KEYS})
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"load: data file {path}: {error}") from error


def _dataset(name: str, arrays: dict[str, Any]) -> Dataset:
    x_train, x_test = _images("x_train", arrays["x_train"]), _images("x_test", arrays["x_test"])
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"x_train and x_test must hold images of one shape (C, H, W), "
            f"got {tuple(x_train.shape[1:])} and {tuple(x_test.shape[1:])}"
        )
    y_train = _labels("y_train", arrays["y_train"], len(x_train))
    y_test = _labels("y_test", arrays["y_test"], len(x_test))
    return Dataset(name, x_train, y_train, x_test, y_test)


def _images(key: str, array: Any) -> Tensor:
    """(N, C, H, W) float32 in [0, 1] from any of the accepted layouts."""
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(
            f"{key} must be (N, H, W), (N, C, H, W) or (N, H, W, C), and not empty, "
            f"got {array.shape}"
        )
    if array.dtype == np.uint8:
        images = torch.from_numpy(array).float() / 255
    elif np.issubdtype(array.dtype, np.floating):
        images = torch.from_numpy(array.astype(np.float32))
    else:
        raise ValueError(f"{key} must be uint8 or floating point, got {array.dtype}")
    low, high = (bound.item() for bound in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{key} in floating point must lie in [0, 1], got values from {low:g} to {high:g}"
        )
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[3] < images.shape[1]:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def _labels(key: str, array: Any, length: int) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer) or array.shape != (length,):
        raise ValueError(f"{key} must be ({length},) integers, got {array.shape} {array.dtype}")
    if array.min() < 0:
        raise ValueError(f"{key} must hold labels from 0, got {array.min()}")
    return torch.from_numpy(array.astype(np.int64))
