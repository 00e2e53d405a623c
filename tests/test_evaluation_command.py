"""From checkpoints to a report, or as far as it came."""

import html
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkern.cli import main
from robustkern.training import evaluation
from robustkern.training.data import load
from robustkern.training.evaluation import evaluate, verdict_text
from robustkern.training.session import Options, train


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    options = {"train_size": 400, "test_size": 20, "epochs": 1, "device": "cpu"}
    return [
        train(Options(**options, seed=seed, output=str(folder / str(seed) / "run")))
        for seed in range(2)
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(folder):
    """The report, without what depends on the clock."""
    report = json.loads((folder / "report.json").read_text())
    for network in report["networks"].values():
        for item in network.values():
            del item["seconds"]
    return report


def test_a_report_is_written_whole_and_alone(tmp_path, checkpoints):
    report = evaluate(checkpoints, test_size=20, output=tmp_path)
    assert set(files(tmp_path)) == {"report.html", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["checkpoints"] == {"run": str(checkpoints[0]), "run-2": str(checkpoints[1])}
    assert (report["suite"], report["radius"]) == ("quick", 0.1)
    assert report["eps"] == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    assert report["data"] == {
        "name": "digits",
        "source": "digits",
        "folder": "data",
        "images": 20,
        "shape": [1, 8, 8],
        "classes": 10,
    }
    assert (tmp_path / "report.html").read_text().rstrip().endswith("</html>")
    lines = verdict_text(report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:5]] == ["run", "run-2"]


@pytest.fixture
def archive(tmp_path):
    """Writes test images and labels to an .npz file."""
    digits = load("digits")

    def write(labels=digits.y_test, start=0, count=60):
        path, kept = tmp_path / "images.npz", slice(start, start + count)
        x, y = digits.x_test[kept].numpy(), labels[kept].numpy()
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        return str(path)

    return write


def test_the_command_on_the_page_makes_the_report_again(tmp_path, checkpoints, archive):
    options = {"data": archive(), "eps": [2 / 255, 8 / 255], "radius": 8 / 255}
    evaluate(checkpoints[:1], twins=checkpoints[1:], **options, output=tmp_path / "a")
    page = (tmp_path / "a" / "report.html").read_text()
    command = shlex.split(html.unescape(re.search("<code>(.*)</code>", page)[1]))
    assert command[0] == "robustkern"
    assert main([*command[1:], "--output", str(tmp_path / "b")]) == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert "PGD-20 of the twin" in page


def test_a_run_does_not_go_on_with_other_labels_held_out_images_or_device(
    tmp_path, checkpoints, archive, monkeypatch
):
    def killed(*_, save, **__):
        save({"networks": {}})
        raise KeyboardInterrupt

    digits = load("digits")
    monkeypatch.setattr(evaluation, "evaluate_networks", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoints, data=archive(), test_size=20, output=tmp_path / "out")
    for changed in ({"labels": (digits.y_test + 1) % 10}, {"count": 50}):
        with pytest.raises(ValueError, match=r"to go on with, got another images; remove it"):
            evaluate(checkpoints, data=archive(**changed), test_size=20, output=tmp_path / "out")
    monkeypatch.setattr(evaluation, "find_device", lambda name: torch.device("meta"))
    with pytest.raises(ValueError, match=r"to go on with, got another device; remove it"):
        evaluate(checkpoints, data=archive(), test_size=20, output=tmp_path / "out")


def test_a_killed_run_leaves_no_report_and_goes_on(tmp_path, checkpoints, monkeypatch):
    options = {"test_size": 20, "output": tmp_path / "killed"}
    written = []

    def write_then_die(path, content):
        write_json(path, content)
        written.append(path.name)
        if len(written) == 5:
            raise KeyboardInterrupt

    write_json = evaluation.write_json
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_json", write_then_die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(checkpoints[:1], **options)
    before = files(tmp_path / "killed")
    assert set(before) == {"partial.json"}

    what = "must be of the same evaluation to go on with, got another"
    for other, name in (({"seed": 1}, "seed"), ({"eps": [0.3], "radius": 0.2}, "eps and radius")):
        with pytest.raises(ValueError, match=f"{what} {name}; remove it, or choose another"):
            evaluate(checkpoints[:1], **options, **other)
    with pytest.raises(ValueError, match=f"{what} checkpoints"):
        evaluate(checkpoints[1:], **options)
    assert files(tmp_path / "killed") == before

    evaluate(checkpoints[:1], **options)
    assert set(files(tmp_path / "killed")) == {"report.html", "report.json"}
    evaluate(checkpoints[:1], test_size=20, output=tmp_path / "whole")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_a_folder_whose_name_is_no_text_has_a_report(tmp_path, checkpoints):
    folder = tmp_path / os.fsdecode(b"run\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has names of text only")
    (folder / "checkpoint.pt").write_bytes(Path(checkpoints[0]).read_bytes())
    report = evaluate([folder / "checkpoint.pt"], test_size=20, output=tmp_path / "out")
    assert list(report["networks"]) == ["run?"]
    assert set(files(tmp_path / "out")) == {"report.html", "report.json"}


def test_a_report_that_cannot_be_written_leaves_the_partial_results(
    tmp_path, checkpoints, monkeypatch
):
    def fail(results):
        raise OSError("disk full")

    monkeypatch.setattr(evaluation, "report_page", fail)
    with pytest.raises(OSError, match=r"^disk full$"):
        evaluate(checkpoints[:1], test_size=20, output=tmp_path)
    assert set(files(tmp_path)) == {"partial.json"}


@pytest.mark.parametrize("content", ["{", "[]", '{"made_with": 1, "results": {}}'])
def test_damaged_partial_results_are_named(tmp_path, checkpoints, content):
    (tmp_path / "partial.json").write_text(content)
    message = f"{tmp_path / 'partial.json'} must hold results of an evaluation, got "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*remove it, or choose another"):
        evaluate(checkpoints, output=tmp_path)


def test_images_are_held_out_for_the_detector(checkpoints, tmp_path, archive):
    given = {}

    def spy(models, inputs, targets, *, calibration, **_):
        given.update(count=len(inputs), held_out=len(calibration[0]))
        raise KeyboardInterrupt

    for images, size, expected in (
        (450, 100, (100, 350)),
        (450, 440, (405, 45)),
        (450, 10_000, (405, 45)),
        (150, 1000, (131, 19)),
        (150, 131, (131, 19)),
        (150, 140, (131, 19)),
        (30, 1000, (15, 15)),
    ):
        data = archive(count=images)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "evaluate_networks", spy)
            with pytest.raises(KeyboardInterrupt):
                evaluate(checkpoints[:1], data=data, test_size=size, output=tmp_path)
        assert (given["count"], given["held_out"]) == expected


def test_misuse_is_named(tmp_path, checkpoints):
    with pytest.raises(ValueError, match=r"and twins as many or none, got 2 and 1$"):
        evaluate(checkpoints, twins=checkpoints[:1], output=tmp_path)
    message = f"evaluate: twins must be other networks than checkpoints, got {checkpoints[1]}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(checkpoints, twins=["other.pt", checkpoints[1]], output=tmp_path)
    with pytest.raises(ValueError, match=r"^evaluate: suite must be one of quick, standard, full"):
        evaluate(checkpoints, suite="slow", output=tmp_path)
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got .* test=0$"):
        evaluate(checkpoints, test_size=0, output=tmp_path)
    assert not files(tmp_path)


def test_images_that_the_network_does_not_take_are_refused(tmp_path, checkpoints):
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "colour.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    message = (
        "evaluate: data colour must fit the checkpoint's network, made for images of shape "
        "(1, 8, 8) and 10 classes, got (3, 8, 8) and 10"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(checkpoints, data=str(tmp_path / "colour.npz"), output=tmp_path / "out")
