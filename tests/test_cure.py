"""The naive CURE of the benchmarks is the same penalty, by another road."""

import pytest
import torch
from networks import batch, gradient, smooth

import robustkern
from robustkern.reference import authors_cure_backward


def test_authors_structure_has_the_gradient_of_the_norm_and_adds_it():
    model, (inputs, targets) = smooth(dropout=0.0, batch_norm=False), batch()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss = authors_cure_backward(model, inputs, targets, weight=0.7, h=0.9)
    found = gradient(model) - 1
    model.zero_grad()
    penalty = robustkern.CURE(0.7, h=0.9, squared=False)
    step = robustkern.backward(model, inputs, targets, penalty)
    torch.testing.assert_close(loss, step.loss)
    torch.testing.assert_close(found, gradient(model), rtol=1e-3, atol=1e-6)
    assert step.penalty > 1e-3


def test_authors_structure_moves_running_statistics_once_and_trains_on():
    model, (inputs, targets) = smooth(), batch()
    calls = []
    model.register_forward_hook(lambda module, *_: calls.append(module.training))
    authors_cure_backward(model, inputs, targets, weight=0.7, h=0.9)
    assert model[1].num_batches_tracked == 1
    assert calls == [True, False, False, False, False]
    assert all(module.training for module in model.modules())
    assert gradient(model).norm().item() != pytest.approx(0)
