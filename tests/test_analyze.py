"""From checkpoints to the papers' figures, or as far as it came."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robustkern.cli import main
from robustkern.training import analysis
from robustkern.training.analysis import analysis_text, analyze
from robustkern.training.checkpoint import load_checkpoint, restore_model
from robustkern.training.figures import FIGURES
from robustkern.training.session import Options, train

pytest.importorskip("matplotlib")
pytest.importorskip("foolbox")

ROOT = Path(__file__).resolve().parent.parent
FEW = ["alignment", "images", "saliency"]


@pytest.fixture(autouse=True)
def path_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    sizes = {"train_size": 400, "test_size": 20, "epochs": 2, "device": "cpu"}
    return [
        train(Options(**sizes, **more, output=str(folder / name / "run")))
        for name, more in (("plain", {"curvature": 0.1}), ("noisy", {"seed": 1}))
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data(folder):
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: content["data"] for name, content in found.items()}


def test_every_figure_has_data_and_pictures(checkpoints, tmp_path, capsys):
    command = ["analyze", *map(str, checkpoints), "--test-size", "12", "--device", "cpu"]
    assert main([*command, "--figures", "all", "--output", str(tmp_path)]) == 0
    made = contents(tmp_path)
    assert {name for name in made if name.endswith(".json")} == {f"{n}.json" for n in FIGURES}
    pictures = {name.split(".")[0] for name in made if name.endswith(".png")}
    assert pictures >= {"sections", "profile-finite", "profile-exact", "bounds-margin"}
    for name in FIGURES:
        assert any(picture == name or picture.startswith(f"{name}-") for picture in pictures)
    found = data(tmp_path)
    for view in ("finite", "exact"):
        profile = found["profile.json"][view]
        assert list(profile) == ["run", "run-2"]
        assert (len(profile["run"]["mean"]), profile["run"]["samples"]) == (64, 12)
    assert found["profile.json"]["exact"]["run"]["mean"][20] == 0  # of rank 9 at most
    assert found["evolution.json"]["networks"]["run"]["epochs"] == [1, 2]
    assert found["evolution.json"]["without"] == ["run-2"]
    for network in found["bounds.json"]["margin"].values():
        assert sum(network["included"]) + network["excluded"] == 12
        assert len(network["distances"]) == len(network["lower"]) == sum(network["included"])
    printed = capsys.readouterr().out
    assert "largest eigenvalue" in printed
    assert "evolution is without run-2" in printed


def test_the_page_of_the_docs_has_a_section_for_each_figure(checkpoints, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    page = importlib.import_module("analysis_page")
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    assert {made() for made in page.SECTIONS.values()} == {page.NOT_MEASURED}
    analyze(checkpoints, test_size=12, output=tmp_path, device="cpu")
    made = {name: made() for name, made in page.SECTIONS.items()}
    assert made["analysis_setting"].startswith("Networks: run, run-2; 12 test images of digits")
    shown = []
    for name in FIGURES:
        text = made[f"analysis_{name.replace('-', '_')}"]
        pictures = re.findall(r"!\[(.+)\]\(\.\./bench/results/.*/(.+)\.png\)", text)
        assert all(described != stem for described, stem in pictures)
        shown += [stem for _, stem in pictures]
        assert not re.search(r"\bnan\b", text)
    assert sorted(shown) == sorted(path.stem for path in tmp_path.glob("*.png"))
    assert shown.index("bounds-margin") < shown.index("bounds-curves")
    assert "with the paper: it is greater after robust training" in made["analysis_alignment"]
    assert "no network to compare run with" in made["analysis_evolution"]
    courses = {"run": [2.0, 3.0, 1.0], "run-2": [1.0, 0.5, 1.5]}
    networks = {
        name: {"frobenius_squared": course, "sign_curvature": course, "accuracy": [0.5] * 3}
        for name, course in courses.items()
    }
    text = page.evolution({"networks": networks})
    assert "From the first epoch to the last it fell in: run." in text
    # Where nothing is found within most subspaces, and where nothing is to be divided by.
    found = {"networks": {"run": {"dims": [2, 4], "ratios": [[0.9, None, None], [1.0, 1.1, 1.2]]}}}
    assert "| run | inf | 1.10 |" in page.subspace(found)
    assert "204 times" in page.compared({"run": 204.0, "run-2": 1.0}, "", smaller=True)
    assert page.compared({"run": 0.987, "run-2": 0.992}, "", smaller=False).startswith("Does not")
    heights = [[0.5, 0.8, 1.0, 0.6, None], [None] * 5, [1.0, 1.2, 1.0, 1.2, 1.4]]
    sections = {"run": {"offsets": [-2.0, -1.0, 0.0, 1.0, 2.0], "heights": heights}}
    text = page.normal_sections({"networks": sections})
    assert "| run | 1 | 1 of 2 | 0.05 |" in text
    assert "Does not agree with the curved model" in text
    assert "run-2 by no finite factor" in page.compared(
        {"run": 0.0, "run-2": 1.0}, "", smaller=False
    )


def test_a_killed_run_goes_on_and_computes_nothing_twice(checkpoints, tmp_path, monkeypatch):
    options = {"figures": FEW, "test_size": 12, "device": "cpu"}
    written = []

    def write_then_die(path, content, **how):
        write_json(path, content, **how)
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt

    write_json = analysis.write_json
    with monkeypatch.context() as patch:
        patch.setattr(analysis, "write_json", write_then_die)
        with pytest.raises(KeyboardInterrupt):
            analyze(checkpoints[:1], **options, output=tmp_path / "killed")
    before = contents(tmp_path / "killed")
    assert set(before) == {"alignment.json", "alignment.png", "images.json"}

    analyze(checkpoints[:1], **options, output=tmp_path / "killed")
    after = contents(tmp_path / "killed")
    assert {name: after[name] for name in before} == before
    analyze(checkpoints[:1], **options, output=tmp_path / "whole")
    assert contents(tmp_path / "whole") == after

    for other, name in (({"seed": 1}, "seed"), ({"test_size": 9, "h": 1.0}, "h and test_size")):
        message = f"must be of the same analysis to go on with, got another {name}.*; remove it"
        with pytest.raises(ValueError, match=message):
            analyze(checkpoints[:1], **{**options, **other}, output=tmp_path / "killed")
    assert contents(tmp_path / "killed") == after


def test_networks_keep_their_order(checkpoints, tmp_path):
    first = tmp_path / "first" / "checkpoint.pt"
    first.parent.mkdir()
    first.write_bytes(checkpoints[1].read_bytes())
    options = {"figures": ["alignment"], "test_size": 12, "output": tmp_path / "out"}
    found = analyze([first, checkpoints[0]], **options)["figures"]["alignment"]
    assert list(found["networks"]) == ["first", "run"]
    with pytest.raises(ValueError, match="got another checkpoints"):
        analyze([checkpoints[0], first], **options)


def test_a_data_set_of_few_images(checkpoints, tmp_path):
    x, y = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10
    for count in (1, 3):
        few = x[:count], y[:count]
        np.savez(tmp_path / f"{count}.npz", x_train=x, y_train=y, x_test=few[0], y_test=few[1])
    options = {"figures": ["alignment"], "output": tmp_path / "out"}
    analyze(checkpoints[:1], data=str(tmp_path / "3.npz"), **options)
    content = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert content["made_with"]["test_size"] == 3
    with pytest.raises(ValueError, match="data 1 must hold at least 2 test images, got 1"):
        analyze(checkpoints[:1], data=str(tmp_path / "1.npz"), **options)


def test_the_table_has_medians_and_says_what_bounds_are():
    margin = {"distances": [1.0, 4.0, None, 2.0], "lower": [0.5] * 4, "upper": [3.0] * 4}
    report = {
        "networks": {"net": "net/checkpoint.pt"},
        "figures": {"bounds": {"margin": {"net": {**margin, "excluded": 1}}}},
        "left_out": {},
    }
    *_, row, label = analysis_text(report).splitlines()
    assert row == "| net     |               3 |         50.0% |             1 |"
    assert label == "bounds are a local quadratic estimate, not a certificate"


def test_what_networks_do_not_have_is_left_out_with_a_reason(checkpoints, tmp_path, monkeypatch):
    report = analyze(checkpoints[1:], figures=["evolution"], test_size=12, output=tmp_path)
    assert report["figures"] == {}
    assert analysis_text(report) == (
        "evolution is left out: no log has curvature; train with --curvature EPS"
    )
    # Where every image is misclassified, there is no boundary to look at.
    wrong = analysis.load("digits").first(test=12)
    model = restore_model(load_checkpoint(checkpoints[0]))
    wrong.y_test.copy_((model(wrong.x_test).argmax(1) + 1) % 10)
    monkeypatch.setattr(analysis, "load", lambda *_: wrong)
    names = ["bounds", "sections", "normals", "subspace"]
    report = analyze(checkpoints[:1], figures=names, test_size=12, output=tmp_path / "wrong")
    assert list(report["left_out"]) == ["sections", "normals", "subspace"]
    assert report["figures"]["bounds"]["margin"]["run"]["excluded"] == 12
    assert "bounds.json" in contents(tmp_path / "wrong")
    assert not contents(tmp_path / "wrong").keys() & {"sections.json", "normals.json"}
    assert "| run     |            none |          none |            12 |" in analysis_text(report)


def test_the_law_of_subspaces_is_measured_where_images_are_moved(
    checkpoints, tmp_path, monkeypatch
):
    model = restore_model(load_checkpoint(checkpoints[0]))
    images = analysis.load("digits").first(test=70)
    # The first sixty are misclassified.
    images.y_test.copy_(model(images.x_test).argmax(1))
    images.y_test[:60] = (images.y_test[:60] + 1) % 10
    monkeypatch.setattr(analysis, "load", lambda *_: images)
    report = analyze(checkpoints[:1], figures=["subspace"], test_size=70, output=tmp_path)
    law = report["figures"]["subspace"]["networks"]["run"]
    assert law["excluded"] == 0
    assert all(distance > 0 for distance in law["measured"])


def test_a_network_that_is_not_piecewise_linear_is_looked_at_too(tmp_path, monkeypatch):
    (tmp_path / "smooth.py").write_text(
        "from torch import nn\n"
        "def net(shape, classes):\n"
        "    layers = nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"train_size": 200, "test_size": 20, "epochs": 1, "device": "cpu"}
    path = train(Options(**options, model="smooth:net", output=str(tmp_path / "smooth-run")))
    figures = ["profile", "alignment"]
    report = analyze([path], figures=figures, test_size=4, output=tmp_path / "out")
    values = report["figures"]["profile"]["exact"]["smooth-run"]["mean"]
    assert values[-1] < 0 < values[0]
    assert len(report["figures"]["alignment"]["networks"]["smooth-run"]["cosines"]) == 4


def test_misuse_is_named(checkpoints, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"figures must be of {', '.join(FIGURES)}, got pie$"):
        analyze(checkpoints, figures=["profile", "pie"], output=tmp_path)
    with pytest.raises(ValueError, match="checkpoints must hold at least one, got none"):
        analyze([], output=tmp_path)
    for wrong, error, message in (
        ({"test_size": 1}, ValueError, "test_size must be at least 2, got 1"),
        ({"test_size": 2.5}, TypeError, "test_size must be an int, got float"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
        ({"h": 0.0}, ValueError, r"h must be positive and finite, got 0\.0"),
        ({"h": float("nan")}, ValueError, "h must be positive and finite, got nan"),
        ({"figures": "profile"}, TypeError, "figures must be a sequence, got 'profile'"),
    ):
        with pytest.raises(error, match=f"^analyze: {message}$"):
            analyze(checkpoints, **{"figures": ["alignment"], **wrong}, output=tmp_path)
    with pytest.raises(TypeError, match=r"^analyze: checkpoints must be a sequence, got .*Path"):
        analyze(checkpoints[0], output=tmp_path)
    for module, extra in (("matplotlib.figure", "plots"), ("foolbox", "eval")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=re.escape(f"robustkern[{extra}]")):
                analyze(checkpoints, figures=["alignment", "bounds"], output=tmp_path)
    assert not contents(tmp_path)
    (tmp_path / "images.json").write_text("{")
    with pytest.raises(ValueError, match=r"images\.json must hold results of an analysis, got"):
        analyze(checkpoints, figures=["images"], output=tmp_path)


def test_what_does_not_fit_is_refused(checkpoints, tmp_path):
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "colour.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ValueError, match=r"^analyze: data colour must fit the checkpoint's netw"):
        analyze(checkpoints, data=str(tmp_path / "colour.npz"), output=tmp_path / "out")
    content = torch.load(checkpoints[0], weights_only=True)
    for weights in content["trainer"]["model"].values():
        weights.fill_(torch.nan)
    torch.save(content, tmp_path / "diverged.pt")
    with pytest.raises(ValueError, match=f"^analyze: network {tmp_path.name} must have finite out"):
        analyze([checkpoints[0], tmp_path / "diverged.pt"], output=tmp_path / "out")
    content["model"]["name"] = "linear"
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must"):
        analyze([tmp_path / "other.pt"], output=tmp_path / "out")
    assert not contents(tmp_path / "out")
