"""Carlini and Wagner's attack that evades the detector."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustkern.evaluation import evasive_carlini_wagner
from robustkern.evaluation.evasive import _score


@pytest.fixture(scope="module")
def trained():
    """A network that is sure of itself, so that its gradients are short away from the boundary."""
    torch.manual_seed(0)
    inputs = 0.25 + torch.rand(24, 20) / 2
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model.append(nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), inputs[:, :4].argmax(1)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, inputs, model(inputs).argmax(1)


def score(model, inputs):
    inputs = inputs.detach().requires_grad_()
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, outputs.argmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
    return gradient.norm(dim=1), inputs


def test_the_score_s_gradient_is_that_of_double_backward(trained):
    model, inputs, _ = trained
    model = model.double()
    expected, point = score(model, inputs.double())
    (slope,) = torch.autograd.grad(expected.sum(), point)
    outputs = model(point)
    found, shifted = _score(model, point, outputs, 1e-4)
    model.float()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shifted, slope, rtol=1e-4, atol=1e-6)


def test_no_gradient_no_score():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    point = torch.rand(4, 3, requires_grad=True)
    for value in _score(model, point, model(point), 0.01):
        assert (value == 0).all()


def test_it_is_not_flagged_and_pays_with_distance(trained):
    model, inputs, targets = trained
    options = {"steps": 100, "searches": 5}
    plain, evasive, known = (
        evasive_carlini_wagner(model, inputs, targets, weight=weight, threshold=limit, **options)
        for weight, limit in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    )
    for found in (plain, evasive, known):
        assert (model(found).argmax(1) != targets).all()
    scores = [score(model, found)[0].detach().median() for found in (plain, known, evasive)]
    lengths = [(found - inputs).norm(dim=1).median() for found in (plain, known, evasive)]
    assert scores[0] > 10 * scores[1]
    assert scores[1] > scores[2]
    assert scores[1] < 1.0
    assert lengths[0] < lengths[1] < lengths[2]
