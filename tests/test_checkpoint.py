"""Checkpoints and the writing of files."""

import os
import pickle
import re

import pytest
import torch
from torch import nn

from robustkern.training.checkpoint import load_checkpoint, restore_model, save_checkpoint
from robustkern.training.files import atomic_path, output_folder, write_json
from robustkern.training.models import build

ARGUMENTS = {"name": "cnn", "shape": (1, 8, 8), "classes": 3, "mean": [0.5], "std": [0.2]}


@pytest.fixture
def content():
    torch.manual_seed(0)
    trainer = {"epoch": 2, "model": build(**ARGUMENTS).state_dict()}
    return {"options": {"lr": "0.1"}, "model": ARGUMENTS, "trainer": trainer, "log": []}


def test_round_trip(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content)
    loaded = load_checkpoint(path)
    assert loaded["options"] == {"lr": "0.1"}
    assert loaded["model"] == ARGUMENTS
    model = restore_model(loaded)
    assert not model.training
    for name, value in content["trainer"]["model"].items():
        assert torch.equal(model.state_dict()[name], value), name
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_restored_in_the_dtype_of_the_weights(content):
    state = content["trainer"]["model"]
    content["trainer"]["model"] = {name: value.double() for name, value in state.items()}
    assert restore_model(content)(torch.rand(2, 1, 8, 8).double()).dtype == torch.float64


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {**content, "log": [lambda: None]})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_incomplete_content_is_named(tmp_path, content):
    del content["trainer"], content["log"]
    message = (
        "save_checkpoint: content must hold options, model, trainer, log, trainer, log missing"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        save_checkpoint(tmp_path / "checkpoint.pt", content)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, content, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content)
    data = path.read_bytes()
    data = {
        "cut": data[: len(data) // 2],
        "flipped": data[:40] + bytes(byte ^ 255 for byte in data[40:800]) + data[800:],
        "text": b"hello",
        "empty": b"",
    }[damage]
    path.write_bytes(data)
    message = re.escape(f"load_checkpoint: checkpoint {path} cannot be read, got ") + r"\w+"
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_checkpoint(path)
    assert path.read_bytes() == data


def test_code_in_a_checkpoint_is_not_run(tmp_path, content):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {**content, "log": [Touch()]})
    message = f"load_checkpoint: checkpoint {path} cannot be read, got UnpicklingError"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path)
    assert not (tmp_path / "harm").exists()
    assert pickle.UnpicklingError.__name__ in message


@pytest.mark.parametrize("other", [{"weights": 1}, {"format": 0}, {"format": 1}, [1, 2]])
def test_another_file_of_torch_is_refused(tmp_path, other):
    path = tmp_path / "other.pt"
    torch.save(other, path)
    message = f"load_checkpoint: {path} must be a robustkern checkpoint of format 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    message = f"load_checkpoint: checkpoint {tmp_path / 'none.pt'} does not exist"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load_checkpoint(tmp_path / "none.pt")


def test_weights_of_another_network_are_named(content):
    content["trainer"]["model"] = nn.Linear(2, 2).state_dict()
    message = "restore_model: the weights must fit the model cnn, got "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        restore_model(content)


def test_atomic_path_replaces_only_after_success(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, {"a": 1})

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match=r"^half way$"):
        write_half()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_output_folder_is_made_and_left_empty(tmp_path):
    folder = output_folder(tmp_path / "a" / "b", "train")
    assert folder.is_dir()
    assert os.listdir(folder) == []


def test_output_folder_leaves_what_is_there(tmp_path):
    (tmp_path / "probe").write_text("mine")
    output_folder(tmp_path, "train")
    assert (tmp_path / "probe").read_text() == "mine"
    assert os.listdir(tmp_path) == ["probe"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "run"
    message = f"train: output folder {path} must be writable, got Not a directory"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        output_folder(path, "train")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("robustkern.training.files.tempfile.TemporaryFile", refuse)
    message = f"demo: output folder {tmp_path} must be writable, got Permission denied"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        output_folder(tmp_path, "demo")
    assert os.listdir(tmp_path) == ["file"]
