"""The report page: one file for people, of whatever was measured."""

import copy
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from reports import NAMES, results

from robustkern.evaluation.report.page import report_page
from robustkern.evaluation.report.verdict import verdict

VOID = {"meta", "img", "br", "link", "input", "hr", "base"}
EVIL = '<script>alert("x")</script> & $\\alpha$'


class Page(HTMLParser):
    """The elements of a page, every one of which must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def made():
    return json.loads(json.dumps(results()))


@pytest.fixture(scope="module")
def page(made):
    return report_page(made)


def small(name="one", items=("clean", "attacks", "pgd_curve"), **more):
    """Results of one network, of which few things were measured."""
    made = results((name,), shape=(1, 4, 4))
    network = made["networks"][name]
    return {
        **made,
        "networks": {name: {item: network[item] for item in items}},
        "transfer": None,
        **more,
    }


def test_it_is_well_formed(page):
    parsed = Page(page)
    assert parsed.open == []
    assert page.startswith("<!DOCTYPE html>")
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]*)', page)
    assert set(used) <= set(ids)


def test_it_loads_nothing_and_runs_nothing(page):
    parsed = Page(page)
    assert not {"script", "link", "iframe", "base", "object"} & set(parsed.tags)
    for name in ("src", "href", "xlink:href", "srcset", "data"):
        assert all(
            value.startswith(("#", "data:image/png;base64,")) for value in parsed.values(name)
        )
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_it_speaks_to_readers_of_screens_and_phones(page):
    parsed = Page(page)
    assert "width=device-width, initial-scale=1" in parsed.values("content")
    assert parsed.tags.count("h1") == 1
    assert parsed.tags.count("svg") == len(re.findall(r'<svg role="img" aria-label="[^"]+"', page))
    assert parsed.tags.count("img") == len([alt for alt in parsed.values("alt") if alt])
    assert parsed.tags.count("table") == page.count('<div class="scroll"')


def test_it_opens_with_the_verdict(made, page):
    top = html.unescape(page[: page.index("<nav")])
    assert "6 networks on 1,000 images of mnist (1 x 16 x 16, 10 classes)" in top
    for found in verdict(made):
        assert found.network in top
        assert f"{100 * found.clean:.1f}%" in top
        assert f"{100 * found.worst:.1f}%" in top
        assert f"{found.strongest}, {100 * found.strongest_accuracy:.1f}%" in top
    assert top.count("That proves nothing") == len(NAMES)


def test_each_item_has_its_place(made, page):
    text = "".join(Page(page).text)
    for title in (
        "Accuracy against eps", "Attacks at the radius", "Attack ladder", "Failure indicators",
        "Gradient masking", "Transfer", "Adversarial distances", "Detection", "Gradient norms",
        "Noise", "Softmax along segments", "Subspaces", "Images", "Cost", "What this does not show",
    ):  # fmt: skip
        assert title in text
    for item in made["networks"]["CURE"]:
        assert item in text, "its cost"
    assert "robustkern evaluate runs/clean/best.pt" in text
    assert "--eps 0.02,0.04,0.06,0.08,0.1" in text


def test_it_is_light(page):
    assert len(page.encode()) < 1_500_000


def test_warnings_stand_in_the_verdict():
    made = small()
    made["networks"]["one"]["attacks"]["value"]["accuracy"]["Square"] = 0.0
    page = report_page(made)
    assert "Signs of hidden gradients" in page
    assert "Square asks the network for no gradient and leaves 0.0% right" in page
    assert "That proves nothing" not in page


def test_where_no_check_was_made_none_is_claimed():
    assert "Nothing looked for hidden gradients" in report_page(small(items=("clean",)))


@pytest.mark.parametrize("name", [EVIL, "_hidden", "網路"])
def test_names_are_escaped(name):
    made = small(name)
    made["data"] = {**made["data"], "name": EVIL}
    made["checkpoints"] = {name: f"{EVIL}.pt"}
    made["versions"] = {EVIL: EVIL}
    page = report_page(made)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert name in "".join(parsed.text)
    drawn = [html.unescape(text).strip() for text in re.findall(r"<text[^>]*>([^<]*)", page)]
    assert any(text.startswith(name[:20]) for text in drawn)


@pytest.mark.parametrize("item", list(results(("one",), (1, 2, 2))["networks"]["one"]))
def test_whatever_is_missing_is_left_out(item):
    made = small(items=(item,))
    page = Page(report_page(made))
    assert page.open == []
    assert "nan" not in "".join(page.text).lower()


def test_what_does_not_exist_is_a_dash():
    made = small(items=("distances", "detection", "deepfool_robustness", "subspace"))
    items = made["networks"]["one"]
    for attack in items["distances"]["value"].values():
        attack |= {"median": None, "mean": None, "standing": 985}
    items["deepfool_robustness"]["value"]["rho"] = None
    items["subspace"]["value"]["median_distance"] = [None] * 4
    nothing = {"fooled": 0, "flagged": None, "auc": None, "median_distance": None}
    detection = items["detection"]["value"]
    detection["attacks"] = dict.fromkeys(detection["attacks"], nothing)
    detection["roc"] = dict.fromkeys(detection["attacks"])
    text = "".join(Page(report_page(made)).text)
    assert "half or more stand (mean -)" in text
    assert "985 of 985" in text
    assert "- (n 0)" in text


def test_it_is_the_same_each_time():
    made = small(items=("clean", "pgd_curve", "masking", "images"))
    before = copy.deepcopy(made)
    assert report_page(made) == report_page(made)
    assert made == before


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_images_of_any_channels_and_one_network(channels):
    made = results(("one",), shape=(channels, 4, 4))
    assert Page(report_page(made)).open == []


def test_where_none_was_right_there_is_no_distance():
    made = small(items=("distances",))
    for attack in made["networks"]["one"]["distances"]["value"].values():
        attack |= {"median": None, "mean": None, "standing": 0, "misclassified": 1000}
    text = "".join(Page(report_page(made)).text)
    assert "stand (mean" not in text
    assert "0 of 0" in text


def test_the_radius_is_given_in_grey_levels_where_it_is_one():
    assert "0.0314 (8/255)" in report_page(small(items=("clean",), radius=0.0313725))


def test_other_results_are_refused():
    with pytest.raises(ValueError, match="report_page: results must be of format 1, got None"):
        report_page({})


def test_without_matplotlib_the_extra_is_named():
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from robustkern.evaluation.report.page import report_page\n"
        "from reports import results\n"
        "report_page(results(('one',), (1, 2, 2)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )  # fmt: skip
    assert (
        'report_page: matplotlib cannot be imported; install it with: pip install "robustkern'
        in run.stderr
    )
