"""Each figure draws what its data say."""

import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from networks import linear, pixels
from torch import nn

from robustkern import analysis
from robustkern.analysis import figures, plain

pytest.importorskip("matplotlib")

NETWORKS = {
    name: nn.Sequential(nn.Flatten(), linear(pixels(3, 16, seed=seed) - 0.5))
    for seed, name in enumerate(("clean", "robust"))
}
IMAGES = pixels(4, 16, seed=9).view(4, 1, 4, 4)
TARGETS = NETWORKS["clean"](IMAGES).argmax(1)
NU = [0.0, 1.0, 2.0]


def each(data):
    """For each network what is found of it, through JSON."""
    found = {name: plain(data(model)) for name, model in NETWORKS.items()}
    return json.loads(json.dumps(found, allow_nan=False))


def sections(model):
    return analysis.plane_sections(model, IMAGES, TARGETS, IMAGES, radius=4.0, points=9)


def boundaries(model):
    return analysis.normal_sections(
        model, IMAGES, IMAGES, torch.ones(1, 4, 4), radius=4.0, points=5
    )


def bounds(model):
    c = torch.tensor([0.5, -1.0, 2.0])
    return analysis.robustness_bounds(c, torch.ones(3), torch.ones(3), torch.zeros(3))


def of_networks(distances):
    return {name: {**data, "distances": distances} for name, data in each(bounds).items()}


def law(model):
    distances = torch.tensor([1.0, 2.0, torch.inf])
    measured = torch.tensor([[4.0, 8.0, 3.0], [torch.inf, torch.inf, 3.0]])
    return analysis.subspace_law(16, [1, 4], distances, measured)


def curvature(model):
    return analysis.shared_curvature(lambda v: 2 * v, torch.eye(16), 3)


def changed():
    moved = {name: IMAGES.flip(3) for name in NETWORKS}
    found = analysis.perturbed_images(NETWORKS, IMAGES, moved)
    return {name: plain(result) for name, result in found.items()}


def maps():
    found = {n: analysis.saliency(model, IMAGES, TARGETS) for n, model in NETWORKS.items()}
    return {name: result.tolist() for name, result in found.items()}


def twice(**data):
    return dict.fromkeys(NETWORKS, data)


# Its drawing, its number of axes, and a label of its axes.
FIGURES = {
    "profile": (
        lambda: figures.profile(twice(mean=[3, 1, 0], low=[2, 0, 0], high=[4, 2, 0])),
        2, "mean eigenvalue\n(loss per squared input unit)",
    ),
    "evolution": (
        lambda: figures.evolution(
            twice(epochs=[1, 2], frobenius_squared=[9, 4], sign_curvature=[2, 1], accuracy=[0, 0.5])
        ),
        3, "adversarial accuracy (%)",
    ),
    "alignments": (
        lambda: figures.alignments(twice(cosines=[0.5, 0.9], undefined=1), size=16),
        1, "samples (%)",
    ),
    "bound_curves": (
        lambda: figures.bound_curves(plain(analysis.bounds_against_curvature(NU)), NU),
        1, r"$\|r^*\|_2$ (input units)",
    ),
    "loss_parabolas": (lambda: figures.loss_parabolas(analysis.losses_along_line(NU)), 1, "loss"),
    "network_bounds": (
        lambda: figures.network_bounds(of_networks([0.5, 1.0])),
        4, "bound (input units)",
    ),
    "cross_sections": (
        lambda: figures.cross_sections(each(sections)), 2, "along the normal r (input units)",
    ),
    "loss_surfaces": (
        lambda: figures.loss_surfaces(each(sections), sample=1), 2, "r (input units)",
    ),
    "normal_sections": (
        lambda: figures.normal_sections(each(boundaries)), 2, "along v (input units)",
    ),
    "normal_spectra": (
        lambda: figures.normal_spectra(each(lambda model: analysis.normal_spectrum(IMAGES))),
        1, "singular value, by rank",
    ),
    "shared_curvatures": (
        lambda: figures.shared_curvatures(each(curvature)), 1, "direction, most curved first",
    ),
    "subspace_laws": (
        lambda: figures.subspace_laws(each(law)), 2, "median distance (input units)",
    ),
    "image_grid": (lambda: figures.image_grid(changed()), 4 * 5, None),
    "saliency_maps": (lambda: figures.saliency_maps(IMAGES.tolist(), maps()), 4 * 3, None),
}  # fmt: skip


def test_every_figure_is_tried():
    assert sorted(FIGURES) == figures.__all__


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_and_label_their_axes(name):
    draw, count, label = FIGURES[name]
    pyplot = "matplotlib.pyplot" in sys.modules
    figure = draw()
    assert len(figure.axes) == count
    labels = {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}
    assert label is None or label in labels
    picture = io.BytesIO()
    figure.savefig(picture, dpi=20)
    assert picture.getvalue().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


@pytest.mark.parametrize("name", ["profile", "evolution", "normal_spectra", "subspace_laws"])
def test_networks_differ_in_more_than_colour(name):
    lines = [line for line in FIGURES[name][0]().axes[0].lines if line.get_color()[0] == "#"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines) > 1
    assert len({look[1:] for look in looks}) == len(looks)


def test_four_networks_of_two_kinds_each_differ():
    names = [f"{name}, {kind}" for name in "abcd" for kind in ("shared", "random")]
    lines = {name: {"mean": [2.0, 1.0], "error": [0.1, 0.1]} for name in names}
    containers = figures.shared_curvatures(lines).axes[0].containers
    looks = {(line[0].get_linestyle(), line[0].get_marker()) for line in containers}
    assert len(looks) == len(containers) == 8


def test_names_are_no_formulas_and_stand_in_legends():
    figure = figures.profile({"_a$b^$": {"mean": [3, 1], "low": [2, 0], "high": [4, 2]}})
    (_, found), *_ = maps().items()
    for drawn in (figure, figures.saliency_maps(IMAGES.tolist(), {"a$b^$": found})):
        drawn.savefig(io.BytesIO(), dpi=20)
    (text,) = figure.axes[1].get_legend().get_texts()
    assert text.get_text().strip() == r"_a\$b^\$"


def test_lines_hold_the_data():
    whole, _ = FIGURES["profile"][0]().axes
    assert whole.lines[0].get_xdata().tolist() == [1, 2]
    assert whole.lines[0].get_ydata().tolist() == [3, 1]
    assert whole.get_title() == "all but 1, which are zero"
    accuracy = FIGURES["evolution"][0]().axes[2]
    assert accuracy.lines[0].get_ydata().tolist() == [0, 50]
    (axes,) = FIGURES["bound_curves"][0]().axes
    assert axes.lines[0].get_ydata()[0] == 2


def test_class_map_shows_half_a_plane():
    data = {"offsets": [-1, 0, 1], "classes": [[[0, 0, 1]] * 3], "targets": [0]}
    (axes,) = figures.cross_sections({"net": data}).axes
    first, second = (np.asarray(image.get_array())[..., 3] > 0 for image in axes.images)
    assert first.tolist() == [[True, True, False]] * 3
    assert (first ^ second).all()
    assert sorted(text.get_text() for text in axes.texts) == ["0", "1"]


def test_surface_points_down_where_the_loss_is_high():
    data = {"offsets": [-1, 0, 1], "losses": [[[0, 1, 4]] * 3], "targets": [0]}
    (axes,) = figures.loss_surfaces({"net": data}).axes
    assert axes.get_zlim() == (-4, 0)
    flat = {**data, "losses": [[[0, 0, 0]] * 3]}
    figures.loss_surfaces({"net": flat}).savefig(io.BytesIO(), dpi=20)


def test_sections_are_drawn_from_their_tangent_and_the_others_are_counted():
    data = {"offsets": [-1, 0, 1], "heights": [[1.5, 2.0, None], [None, None, None]]}
    (axes,) = figures.normal_sections({"net": data}).axes
    assert axes.get_title() == "net: 1 of 2 inputs"
    np.testing.assert_equal(axes.lines[0].get_ydata(), [-0.5, 0, np.nan])


def test_bounds_say_what_they_are():
    figure = FIGURES["network_bounds"][0]()
    assert figure.get_suptitle() == "local quadratic estimate, not a certificate"
    assert "1 beyond the threshold" in figure.axes[0].get_title()
    assert FIGURES["bound_curves"][0]().axes[0].get_title() == figure.get_suptitle()


def test_colour_images_are_shown_in_colour():
    image = torch.rand(1, 3, 4, 4).tolist()
    axes = figures.saliency_maps(image, {"net": torch.zeros(1, 4, 4).tolist()}).axes
    assert np.asarray(axes[0].images[0].get_array()).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: figures.profile([]), TypeError, "profile: networks must be a mapping, got list"),
        (lambda: figures.profile({}), ValueError, "profile: networks must hold at least one"),
        (
            lambda: figures.profile({"net": {"mean": [1]}}), ValueError,
            "profile: networks['net'] must hold mean, low, high, got none of the name low, high",
        ),
        (
            lambda: figures.cross_sections(each(sections), sample=4), ValueError,
            "cross_sections: sample must be from 0 to 3 for 'clean', got 4",
        ),
        (
            lambda: figures.saliency_maps(IMAGES.tolist(), {}), ValueError,
            "saliency_maps: maps must hold at least one network",
        ),
    ],
)  # fmt: skip
def test_bad_data_is_named(draw, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        draw()


def test_missing_matplotlib_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = (
        'profile: matplotlib cannot be imported; install it with: pip install "robustkern[plots]"'
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        FIGURES["profile"][0]()
