"""Curvature along training: its figures, its cost, and that training goes on as without it."""

import dataclasses
import json
import re

import pytest
import torch
from networks import batch, linear, pixels, smooth
from torch import nn

import robustkern
from robustkern.analysis import InputHessian
from robustkern.evaluation import accuracy, pgd
from robustkern.evaluation.counting import counted
from robustkern.training import CurvatureMonitor, Options, cnn, train
from robustkern.training.checkpoint import load_checkpoint


def test_figures_are_those_of_the_dense_hessian():
    model, inputs = linear([[1.0, -2.0, 0.5], [0.0, 1.0, 0.0]]).double(), pixels(16, 3)
    targets = torch.arange(16) % 2
    monitor = CurvatureMonitor(inputs, targets, eps=0.2, samples=12, h=1e-4, draws=500, steps=3)
    found = monitor(model)
    hessian = InputHessian(model, inputs[:12], targets[:12], method="exact")
    dense, signs = hessian.dense(), hessian.gradient.sign() / 3**0.5
    squared = dense.square().sum((1, 2)).mean().item()
    assert found.frobenius_squared == pytest.approx(squared, abs=5 * found.frobenius_error)
    assert found.frobenius_error < 0.1 * squared
    along = torch.einsum("nij,nj->ni", dense, signs).norm(dim=1).mean().item()
    assert found.sign_curvature == pytest.approx(along, rel=1e-3)
    attacked = accuracy(
        model, inputs[:12], targets[:12], attack=lambda *b: pgd(*b, eps=0.2, steps=3)
    )
    assert found.pgd_accuracy == attacked
    assert monitor(model) == found


def test_an_epoch_of_60000_images_costs_less_than_2_percent_more_passes():
    model = cnn((1, 28, 28), 10)
    monitor = CurvatureMonitor(torch.rand(100, 1, 28, 28), torch.arange(100) % 10, eps=0.1)
    with counted(model) as passes:
        monitor(model)
    assert (passes.forward, passes.backward) == (17 * 64, 16 * 64)
    assert max(passes.forward, passes.backward) < 0.02 * 60_000


def test_a_compiled_network_is_not_compiled_for_it():
    model, compiled = smooth(torch.float32), []
    inputs, targets = batch(torch.float32, samples=4)
    monitor = CurvatureMonitor(inputs, targets, eps=0.1, draws=2, steps=2)
    expected = monitor(model)
    network = torch.compile(model, backend=lambda graph, _: compiled.append(graph) or graph)
    assert monitor(network) == expected
    assert not compiled
    network(inputs)
    assert compiled


def test_training_with_it_is_bitwise_the_same():
    inputs, targets = batch(torch.float32, samples=12)
    monitor, trained = CurvatureMonitor(inputs, targets, eps=0.1, draws=2, steps=2), []
    for measured in (False, True):
        model = smooth(torch.float32)
        model[4].eval()  # one module in another mode than the rest
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            robustkern.backward(model, inputs, targets, robustkern.CURE(direction="gaussian"))
            if measured:
                gradients = [p.grad.clone() for p in model.parameters()]
                monitor(model)
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    assert torch.equal(p.grad, gradient)
            optimizer.step()
        assert [m.training for m in model] == [True] * 4 + [False] + [True] * 3
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_run_logs_it_and_trains_as_without(tmp_path):
    saved = {}
    for eps in (None, 0.1):
        run = Options(
            train_size=60, test_size=30, epochs=2, penalties=[{"name": "gn"}], device="cpu",
            output=str(tmp_path / str(eps)), curvature=eps,
        )  # fmt: skip
        saved[eps] = load_checkpoint(train(run))
    for a, b in zip(*(saved[eps]["trainer"]["model"].values() for eps in saved), strict=True):
        assert torch.equal(a, b)
    epochs = json.loads((tmp_path / "0.1" / "log.json").read_text())["epochs"]
    assert all(0 <= epoch["curvature"]["pgd_accuracy"] <= 1 for epoch in epochs)
    assert epochs[0]["curvature"]["frobenius_squared"] > 0
    assert "curvature" not in saved[None]["log"][0]
    train(dataclasses.replace(run, epochs=3, curvature=None), resume=True)


def test_a_network_that_fails_is_left_as_it_was():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("from inside the model")

    state, model = torch.get_rng_state(), Broken()
    with pytest.raises(KeyError, match="from inside the model"):
        CurvatureMonitor(pixels(4, 3), torch.arange(4), eps=0.1)(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs must be a floating-point tensor, got list"),
        (
            {"targets": torch.ones(4)},
            TypeError,
            "targets must be an int64 tensor, got torch.float32",
        ),
        (
            {"targets": torch.arange(3)},
            ValueError,
            "targets must be (N,), one for each of inputs, got (3,) and (4, 3)",
        ),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"h": "1"}, TypeError, "h must be a number, got str"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"draws": 1}, ValueError, "draws must be at least 2, got 1"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"inputs": pixels(4, 3), "targets": torch.arange(4), "eps": 0.1}
    with pytest.raises(error, match=f"^CurvatureMonitor: {re.escape(message)}$"):
        CurvatureMonitor(**{**arguments, **change})
