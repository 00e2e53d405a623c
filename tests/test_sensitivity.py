"""Norms of input gradients over a data set."""

import pytest
import torch
from networks import linear, pixels
from torch import nn
from torch.nn import functional as F

from robustkern.evaluation import Detector, gradient_norms, gradient_statistics

WEIGHT = 3 * pixels(4, 6, seed=1) - 1


def gradients(inputs, targets):
    """Of the cross entropy: W^T (p - e_y)."""
    return ((inputs @ WEIGHT.T).softmax(1) - F.one_hot(targets, 4)) @ WEIGHT


@pytest.mark.parametrize("p", [1, 2, torch.inf])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_gradient_norms_of_a_linear_classifier(p, batch_size):
    inputs, targets = pixels(12, 6), torch.arange(12) % 4
    expected = torch.linalg.vector_norm(gradients(inputs, targets), p, dim=1)
    found = gradient_norms(linear(WEIGHT), inputs, targets, p=p, batch_size=batch_size)
    torch.testing.assert_close(found, expected)


def test_gradient_norms_are_at_the_predicted_label_when_no_targets_are_given():
    inputs = pixels(12, 6)
    predicted = (inputs @ WEIGHT.T).argmax(1)
    found = gradient_norms(linear(WEIGHT), inputs)
    torch.testing.assert_close(found, gradients(inputs, predicted).norm(dim=1))
    assert not found.requires_grad


def test_gradient_statistics_of_a_linear_classifier():
    inputs, targets = pixels(12, 6), torch.arange(12) % 4
    norms = gradients(inputs, targets).norm(dim=1)
    found = gradient_statistics(linear(WEIGHT), inputs, targets, batch_size=5)
    assert found.loss_mean == pytest.approx(norms.mean().item())
    assert found.loss_max == pytest.approx(norms.max().item())
    rows = WEIGHT.norm(dim=1)
    assert found.outputs_mean == found.outputs_max == pytest.approx(rows.max().item())


def test_outputs_gradient_is_that_of_each_sample():
    class Square(nn.Module):
        def forward(self, inputs):
            return torch.cat([inputs.square().sum(1, keepdim=True), inputs[:, :1]], 1)

    inputs = torch.tensor([[1.0, 0.5], [0.25, 0.0]])
    found = gradient_statistics(Square(), inputs, torch.tensor([0, 1]))
    largest = [2 * 1.25**0.5, 1.0]  # of 2x and of the unit vector
    assert found.outputs_mean == pytest.approx(sum(largest) / 2)
    assert found.outputs_max == pytest.approx(largest[0])


def test_outputs_that_do_not_depend_on_the_inputs_have_gradient_zero():
    class Constant(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.detach().round())

    for model in (Constant(6, 3), Constant(6, 3).requires_grad_(False)):
        found = gradient_statistics(model, pixels(4, 6, torch.float32), torch.arange(4) % 3)
        assert found.loss_max == found.outputs_max == 0


def test_low_precision_norms_are_taken_in_float32():
    inputs, targets = pixels(12, 6), torch.arange(12) % 4
    found = gradient_norms(linear(WEIGHT).bfloat16(), inputs, targets)
    assert found.dtype == torch.float32
    expected = gradients(inputs, targets).norm(dim=1).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_gradient_norms_name_another_p():
    with pytest.raises(ValueError, match=r"^gradient_norms: p must be 1, 2 or inf, got 3$"):
        gradient_norms(linear(WEIGHT), pixels(4, 6), p=3)


def test_gradients_that_are_not_finite_are_named():
    class Root(nn.Module):
        def forward(self, inputs):
            return inputs.sqrt()

    inputs = torch.tensor([[0.25, 0.5], [0.0, 0.5]])
    message = "model must have finite input gradients, got infinite ones or NaN"
    with pytest.raises(ValueError, match=f"^gradient_norms: {message}$"):
        gradient_norms(Root(), inputs)
    with pytest.raises(ValueError, match=f"^Detector.fit: {message}$"):
        Detector.fit(Root(), inputs, 0.5)


def test_inputs_take_the_type_of_a_parameter_that_is_no_integer():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.order = nn.Parameter(torch.arange(6).flip(0), requires_grad=False)
            self.linear = linear(WEIGHT)

        def forward(self, inputs):
            return self.linear(inputs[:, self.order])

    inputs = pixels(5, 6)
    found = gradient_norms(Indexed(), inputs.float())
    torch.testing.assert_close(found, gradient_norms(linear(WEIGHT), inputs.float().flip(1)))
