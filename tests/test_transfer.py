"""Attacks made against one network and tried on another."""

import re

import pytest
import torch
from networks import linear, pixels

from robustkern.evaluation import accuracy, fgsm, transfer_matrix

# Classifiers by x_0 and by x_1. An attack on one leaves the other's pixel as it is.
FIRST = linear([[-1.0, 0.0], [1.0, 0.0]], [1.0, 0.0])
SECOND = linear([[0.0, -1.0], [0.0, 1.0]], [1.0, 0.0])
BOTH = linear([[-1.0, -1.0], [1.0, 1.0]], [2.0, 0.0])


def data():
    inputs = pixels(200, 2, torch.float32)
    targets = (inputs[:, 0] > 0.5).long()
    inputs[:, 1] = torch.where(targets == 1, 0.5, 0.0) + inputs[:, 1] / 2
    return inputs, targets


def attack(model, inputs, targets):
    return fgsm(model, inputs, targets, 0.2)


def test_rows_classify_what_columns_were_attacked_for():
    inputs, targets = data()
    found = transfer_matrix({"first": FIRST, "both": BOTH}, inputs, targets, attack, batch_size=64)
    assert found.evaluated == found.sources == ("first", "both")
    for row, model in zip(found.accuracy, (FIRST, BOTH), strict=True):
        for cell, source in zip(row, (FIRST, BOTH), strict=True):
            expected = accuracy(model, attack(source, inputs, targets), targets)
            assert cell == expected
    (white, transferred), (weak, strong) = found.accuracy
    assert white == transferred == pytest.approx(0.6, abs=0.1)  # both move x_0 by 0.2
    assert strong < weak  # against x_0 + x_1, moving both is the stronger attack


def test_what_does_not_transfer_leaves_the_clean_accuracy():
    inputs, targets = data()
    found = transfer_matrix({"first": FIRST, "second": SECOND}, inputs, targets, attack)
    assert found.accuracy[0][1] == found.accuracy[1][0] == 1
    assert found.accuracy[0][0] < 1
    assert found.accuracy[1][1] < 1


def test_twins_are_further_columns():
    inputs, targets = data()
    models = {"first": FIRST}
    found = transfer_matrix(models, inputs, targets, attack, sources={**models, "twin": BOTH})
    assert found.evaluated == ("first",)
    assert found.sources == ("first", "twin")
    assert len(found.accuracy) == 1
    assert len(found.accuracy[0]) == 2


def test_batches_are_reported():
    sizes = []
    models = {"first": FIRST, "second": SECOND}
    transfer_matrix(models, *data(), attack, advance=sizes.append)
    assert sum(sizes) == 200 * 2 * 3


@pytest.mark.parametrize("name", ["models", "sources"])
def test_transfer_needs_networks(name):
    networks = {"models": {"first": FIRST}, "sources": {"first": FIRST}, name: {}}
    message = f"transfer_matrix: {name} must hold at least one network, got none"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        transfer_matrix(networks["models"], *data(), attack, sources=networks["sources"])
