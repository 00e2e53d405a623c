"""The command line."""

import json
import re
import subprocess
import sys

import pytest
import torch

import robustkern
from robustkern.cli import main
from robustkern.training.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def train_arguments(folder, *more):
    sizes = ["--train-size", "64", "--test-size", "30", "--epochs", "1", "--device", "cpu"]
    return ["train", "--output", str(folder), *sizes, *more]


def error_of(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_then_evaluate(tmp_path, capsys):
    penalties = ["--penalty", "cure", "--weight", "0.3", "--h", "0:0,5:0.5", "--norm"]
    penalties += ["--penalty", "tv", "--p", "1", "--weight", "0.01", "--every", "2"]
    assert main(train_arguments(tmp_path, *penalties, "--lr", "0:0.01,1:0", "--crop", "1")) == 0
    out = capsys.readouterr().out.splitlines()
    checkpoint = tmp_path / "checkpoint.pt"
    assert out[-1] == str(checkpoint)
    assert re.fullmatch(
        r"epoch 1: loss \d\.\d{4}, penalty \d+\.\d{4}, clean accuracy \d+\.\d%, "
        r"4\.0 forward and 4\.0 backward passes a step, \d+\.\d s",
        out[0],
    )
    options = load_checkpoint(checkpoint)["options"]
    assert options["penalties"] == [
        {"name": "cure", "weight": "0.3", "h": "0:0,5:0.5", "norm": True},
        {"name": "tv", "p": 1.0, "weight": "0.01", "every": 2},
    ]
    assert (options["lr"], options["crop"], options["flip"]) == ("0:0.01,1:0", 1, False)

    output = tmp_path / "evaluation"
    command = ["evaluate", str(checkpoint), "--eps", "0.05,51/255", "--radius", "51/255"]
    assert main([*command, "--test-size", "20", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "20 images of digits, changed by up to 0.2:"
    assert [line.split("|")[1].strip() for line in lines[1:4:2]] == ["network", tmp_path.name]
    assert lines[-1] == f"the whole report is in {output / 'report.html'}"
    assert json.loads((output / "report.json").read_text())["eps"] == [0.05, 0.2]


def test_resume_and_fine_tune(tmp_path, capsys):
    assert main(train_arguments(tmp_path / "a")) == 0
    assert main(train_arguments(tmp_path / "a", "--resume", "--epochs", "2")) == 0
    first = load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert len(first["log"]) == 2
    init = ["--init", str(tmp_path / "a" / "checkpoint.pt"), "--lr", "0"]
    assert main(train_arguments(tmp_path / "b", *init)) == 0
    second = load_checkpoint(tmp_path / "b" / "checkpoint.pt")
    for name, value in first["trainer"]["model"].items():
        assert torch.equal(second["trainer"]["model"][name], value), name
    capsys.readouterr()


def test_a_factory_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_networks_for_cli.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    assert main(train_arguments("run", "--model", "my_networks_for_cli:make")) == 0
    assert load_checkpoint("run/checkpoint.pt")["model"]["name"] == "my_networks_for_cli:make"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "none.npz"],
            "robustkern train: error: load: data file none.npz does not exist; give an .npz file "
            "with x_train, y_train, x_test, y_test, or a name: digits, mnist, cifar10, svhn",
        ),
        (
            ["--lr", "fast"],
            "robustkern train: error: Schedule: lr must be a number or "
            "EPOCH:VALUE,EPOCH:VALUE,... with rising epochs, finite and not negative, got fast",
        ),
        (
            ["--penalty", "gn", "--h", "1"],
            "robustkern train: error: ScheduledPenalty: penalty gn takes the options weight, "
            "every, got h",
        ),
        (
            ["--model", "nothing"],
            "robustkern train: error: build: model must be one of cnn, carlini, "
            "resnet18, wideresnet28x10, resnext34 or module:factory, got nothing",
        ),
        (
            ["--batch-size", "0"],
            "robustkern train: error: Trainer: batch_size must be at least 1 and crop at least "
            "0, got 0 and 0",
        ),
    ],
)
def test_errors_are_named_without_a_traceback(tmp_path, capsys, arguments, message):
    assert main(train_arguments(tmp_path, *arguments)) == 2
    assert error_of(capsys) == message


def test_sgr_learns_from_an_attack(tmp_path):
    sgr = ["--source", "pgd", "--attack-eps", "0.05", "--standardize", "data", "--weight", "0.5"]
    assert main(train_arguments(tmp_path, "--penalty", "sgr", *sgr)) == 0
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    (spec,) = content["options"]["penalties"]
    assert (spec["source"], spec["attack_eps"], spec["standardize"]) == ("pgd", 0.05, "data")
    assert 0 < content["trainer"]["penalty"]["covariance.average"][0, 0, 7, 7] < 0.05**2


def test_debug_raises_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^load: data file none.npz does not exist"):
        main(train_arguments(tmp_path, "--data", "none.npz", "--debug"))


def test_an_interruption_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("robustkern.cli.train", interrupt)
    assert main(train_arguments(tmp_path)) == 130
    assert error_of(capsys) == "robustkern train: interrupted"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--weight", "1"],
            "robustkern train: error: --weight must follow the --penalty that it belongs to",
        ),
        (
            ["train", "--penalty", "sgr", "--standardize", "0"],
            "robustkern train: error: argument --standardize: must be 'data' or a positive number, "
            "got 0",
        ),
        (
            ["evaluate", "x", "--eps", "a,b"],
            "robustkern evaluate: error: argument --eps: must be numbers or fractions, got a,b",
        ),
        (
            ["evaluate", "x", "--eps", "1/0"],
            "robustkern evaluate: error: argument --eps: must be numbers or fractions, got 1/0",
        ),
    ],
)
def test_misuse_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert error_of(capsys) == message


def test_an_unknown_penalty_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--penalty", "ridge"])
    error = error_of(capsys)
    assert "invalid choice: 'ridge'" in error
    assert "anchored-cure" in error


@pytest.mark.parametrize("command", ["demo", "train", "evaluate"])
def test_help_explains_every_option(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "show the traceback" in text
    # Every option has words of its own beside or below it.
    for entry in re.split(r"\n  (?=-)", text)[2:]:
        assert len(re.sub(r"[-A-Z_{},\[\]a-z0-9]+", "x", entry).split()) > 2, entry


def test_python_m_runs_the_same(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "robustkern", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout.strip()) == (0, robustkern.__version__)
