"""Data sets: digits, torchvision's (by a stand-in) and .npz files."""

import re
import sys
import types

import numpy as np
import pytest
import torch

from robustkern.training.data import load


def arrays(shape=(8, 8), dtype=np.uint8, samples=6):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (samples, *shape)).astype(np.uint8)
    y = np.arange(samples) % 3
    if dtype != np.uint8:
        x = (x / 255).astype(dtype)
    return {"x_train": x, "y_train": y, "x_test": x[:4], "y_test": y[:4]}


def save(folder, content):
    path = folder / "images.npz"
    np.savez(path, **content)
    return path


def test_digits_are_the_same_every_time():
    data, again = load("digits"), load("digits")
    assert data.x_train.shape == (1347, 1, 8, 8)
    assert data.x_test.shape == (450, 1, 8, 8)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
    assert (data.shape, data.classes) == ((1, 8, 8), 10)
    assert torch.equal(data.x_test, again.x_test)
    assert data.y_test.bincount().min() >= 43  # every class has its share
    seen = {image.numpy().tobytes() for image in data.x_train}
    assert not any(image.numpy().tobytes() in seen for image in data.x_test)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((8, 9), None),
        ((3, 8, 9), (0, 1, 2, 3)),
        ((8, 9, 3), (0, 3, 1, 2)),
        ((5, 8, 5), (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_npz_layouts_and_dtypes(tmp_path, shape, axes, dtype):
    content = arrays(shape, dtype)
    data = load(str(save(tmp_path, content)))
    x = content["x_train"]
    expected = x[:, None] if axes is None else x.transpose(axes)
    expected = expected / 255 if dtype == np.uint8 else expected
    np.testing.assert_allclose(data.x_train.numpy(), expected, rtol=1e-6)
    assert data.x_train.dtype == torch.float32
    assert data.x_train.is_contiguous()
    assert data.name == "images"
    assert (len(data.x_test), data.classes) == (4, 3)


def test_first_keeps_a_prefix(tmp_path):
    data = load(str(save(tmp_path, arrays())))
    small = data.first(train=5, test=2)
    assert torch.equal(small.x_train, data.x_train[:5])
    assert len(small.y_test) == 2
    assert len(data.first().x_train) == 6
    message = "Dataset.first: sizes must be at least 1, got train=0 and test=None"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data.first(train=0)


def without(content, key):
    return {name: array for name, array in content.items() if name != key}


BAD = {
    "arrays x_train, y_train, x_test, y_test are needed, y_test missing": lambda c: without(
        c, "y_test"
    ),
    "x_train must be uint8 or floating point, got int64": lambda c: {
        **c,
        "x_train": c["x_train"].astype(np.int64),
    },
    "x_train in floating point must lie in [0, 1], got values from 0 to 2": lambda c: {
        **c,
        "x_train": np.linspace(0, 2, 6 * 64).reshape(6, 8, 8),
    },
    "x_test must be (N, H, W), (N, C, H, W) or (N, H, W, C), and not empty, got (4, 64)": (
        lambda c: {**c, "x_test": c["x_test"].reshape(4, 64)}
    ),
    "x_train must be (N, H, W), (N, C, H, W) or (N, H, W, C), and not empty, got (0, 8, 8)": (
        lambda c: {**c, "x_train": c["x_train"][:0]}
    ),
    "x_train and x_test must hold images of one shape (C, H, W), got (1, 8, 8) and (1, 8, 7)": (
        lambda c: {**c, "x_test": c["x_test"][:, :, :7]}
    ),
    "y_train must be (6,) integers, got (5,) int64": lambda c: {**c, "y_train": c["y_train"][:5]},
    "y_test must be (4,) integers, got (4,) float64": lambda c: {**c, "y_test": c["y_test"] / 1},
    "y_train must hold labels from 0, got -1": lambda c: {**c, "y_train": c["y_train"] - 1},
    "Object arrays cannot be loaded when allow_pickle=False": lambda c: {
        **c,
        "y_train": np.array([{}] * 6, dtype=object),
    },
}


@pytest.mark.parametrize("rule", BAD)
def test_npz_errors_name_file_and_rule(tmp_path, rule):
    path = save(tmp_path, BAD[rule](arrays()))
    with pytest.raises(ValueError, match=f"^{re.escape(f'load: data file {path}: {rule}')}$"):
        load(str(path))


def test_a_damaged_file_is_named(tmp_path):
    path = save(tmp_path, arrays())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"^{re.escape(f'load: data file {path}: ')}.+"):
        load(str(path))
    path.write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match=f"^{re.escape(f'load: data file {path}: ')}.+"):
        load(str(path))


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.npz"
    message = (
        f"load: data file {path} does not exist; give an .npz file with x_train, y_train, x_test, "
        "y_test, or a name: digits, mnist, cifar10, svhn"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load(str(path))


def test_an_unknown_name_is_named():
    message = (
        "load: data must be one of digits, mnist, cifar10, svhn or the path of an .npz file, "
        "got imagenet"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load("imagenet")


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in whose data sets record how they were asked for."""
    asked = []

    def mnist(root, train, download):
        asked.append(("MNIST", root, train, download))
        content = arrays((28, 28), samples=8 if train else 4)
        return types.SimpleNamespace(
            data=torch.from_numpy(content["x_train"]), targets=torch.from_numpy(content["y_train"])
        )

    def cifar10(root, train, download):
        asked.append(("CIFAR10", root, train, download))
        content = arrays((32, 32, 3), samples=8 if train else 4)
        return types.SimpleNamespace(data=content["x_train"], targets=content["y_train"].tolist())

    def svhn(root, split, download):
        asked.append(("SVHN", root, split, download))
        content = arrays((3, 32, 32), samples=8 if split == "train" else 4)
        return types.SimpleNamespace(data=content["x_train"], labels=content["y_train"])

    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST, datasets.CIFAR10, datasets.SVHN = mnist, cifar10, svhn
    package = types.ModuleType("torchvision")
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    return asked


@pytest.mark.parametrize(
    ("name", "shape", "splits"),
    [
        ("mnist", (1, 28, 28), (True, False)),
        ("cifar10", (3, 32, 32), (True, False)),
        ("svhn", (3, 32, 32), ("train", "test")),
    ],
)
def test_torchvision_data(torchvision, name, shape, splits, tmp_path):
    data = load(name, tmp_path)
    assert data.shape == shape
    assert (len(data.x_train), len(data.x_test)) == (8, 4)
    assert data.x_train.dtype == torch.float32
    assert 0.9 < data.x_train.max() <= 1
    assert [call[2] for call in torchvision] == list(splits)
    assert all(call[1] == str(tmp_path) and call[3] for call in torchvision)
    pixels = arrays(
        {"mnist": (28, 28), "cifar10": (32, 32, 3), "svhn": (3, 32, 32)}[name], samples=8
    )
    first = pixels["x_train"][0]
    first = (
        first[None] if name == "mnist" else first.transpose(2, 0, 1) if name == "cifar10" else first
    )
    np.testing.assert_allclose(data.x_train[0].numpy(), first / 255, rtol=1e-6)


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("not found")])
@pytest.mark.usefixtures("torchvision")
def test_data_that_cannot_be_downloaded_say_how_to_get_them(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["torchvision.datasets"], "SVHN", fail)
    message = (
        f"load: data set svhn must lie in the folder here or be downloadable, got: {error}; put "
        "the files that torchvision wants there, or give the path of an .npz file with x_train, "
        "y_train, x_test, y_test"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load("svhn", "here")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("mnist", "torchvision.datasets", "data"), ("digits", "sklearn.datasets", "train")],
)
def test_a_missing_package_names_its_extra(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    message = f'{module} cannot be imported; install it with: pip install "robustkern[{extra}]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        load(name)
