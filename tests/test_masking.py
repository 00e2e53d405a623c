"""Signs of masked gradients, on a network that hides them and on the same one that does not."""

import math
import re

import pytest
import torch
from networks import linear, pixels
from torch import nn

from robustkern.evaluation import (
    Indicator,
    LabelLeaking,
    adversarial_inputs,
    failure_indicators,
    fgsm,
    label_leaking,
    masking_scatter,
    pgd,
    softmax_along_segment,
)

OPEN = linear([[2.0, -2.0], [-2.0, 2.0]])


class Quantized(nn.Module):
    """`OPEN` behind pixels of seventeen values: its gradient is zero everywhere."""

    def __init__(self):
        super().__init__()
        self.linear = OPEN

    def forward(self, inputs):
        return self.linear((16 * inputs).round() / 16)


def data(samples=100):
    inputs = pixels(samples, 2, torch.float32)
    inputs = inputs[(inputs[:, 0] - inputs[:, 1]).abs() > 0.1]  # right for both networks
    return inputs, (inputs[:, 1] > inputs[:, 0]).long()


def white(model, inputs, targets, eps=0.2):
    return pgd(model, inputs, targets, eps, steps=5, random_start=False)


def black(model, inputs, targets):
    """The strongest of the four corners of the ball: no gradient is asked for."""
    best, lowest = inputs, torch.full(targets.shape, torch.inf)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        corner = (inputs + 0.2 * torch.tensor(signs)).clamp(0, 1)
        outputs = model(corner)
        gap = (outputs[:, 0] - outputs[:, 1]) * (1 - 2 * targets)
        best = torch.where((gap < lowest)[:, None], corner, best)
        lowest = lowest.minimum(gap)
    return best


def indicators(model, inputs, targets):
    found = {
        name: adversarial_inputs(model, inputs, targets, attack, batch_size=32)
        for name, attack in (
            ("white_box", white),
            ("black_box", black),
            ("large", lambda *batch: white(*batch, eps=1.0)),
        )
    }
    return failure_indicators(model, inputs, targets, **found, batch_size=32)


def test_a_quantized_network_raises_every_indicator():
    found = indicators(Quantized(), *data())
    assert found.raised == (
        "zero_gradients", "flat_loss", "black_box_stronger", "robust_at_large_eps",
    )  # fmt: skip
    assert found.zero_gradients == found.flat_loss == Indicator(True, 1.0)
    assert found.robust_at_large_eps == Indicator(True, 1.0)
    assert 0.3 < found.black_box_stronger.value < 0.7


def test_the_same_network_without_quantization_raises_none():
    found = indicators(OPEN, *data())
    assert found.raised == ()
    assert all(indicator == Indicator(False, 0.0) for indicator in vars(found).values())


def test_samples_misclassified_from_the_start_raise_no_indicator():
    inputs, targets = data()
    targets[:5] = 1 - targets[:5]
    moved = inputs.clone()
    moved[5:] = white(OPEN, inputs, targets, eps=1.0)[5:]  # an attack that skips them
    found = failure_indicators(OPEN, inputs, targets, white_box=moved, black_box=moved, large=moved)
    assert found.raised == ()
    targets = 1 - (inputs[:, 1] > inputs[:, 0]).long()
    moved = inputs
    found = failure_indicators(OPEN, inputs, targets, white_box=moved, black_box=moved, large=moved)
    assert found.raised == ()


def test_one_sample_in_a_hundred_is_put_down_to_chance():
    inputs = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(100, 1)
    targets, moved = torch.tensor([0, 1]).repeat(100), inputs.flip(1)

    def stronger(samples):
        black = inputs.clone()
        black[:samples] = moved[:samples]
        return failure_indicators(
            OPEN, inputs, targets, white_box=inputs, black_box=black, large=moved
        ).black_box_stronger

    assert stronger(2) == Indicator(False, pytest.approx(0.01))
    assert stronger(3) == Indicator(True, pytest.approx(0.015))


def test_shares_are_of_the_samples_that_are_right_before():
    inputs, targets = data()
    targets[:5] = 1 - targets[:5]
    moved = inputs.flip(1)
    moved[5:8] = inputs[5:8]
    found = failure_indicators(OPEN, inputs, targets, white_box=moved, black_box=moved, large=moved)
    assert found.flat_loss.value == pytest.approx(3 / (len(inputs) - 5))


def test_one_sample_in_a_hundred_may_stray():
    inputs = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(100, 1)
    targets = torch.arange(200) % 2
    for still, raised in ((2, ()), (3, ("flat_loss",))):
        moved = inputs.flip(1)
        moved[:still] = inputs[:still]
        found = failure_indicators(
            OPEN, inputs, targets, white_box=moved, black_box=moved, large=inputs.flip(1)
        )
        assert found.raised == raised
        assert found.flat_loss.value == still / 200


def test_scatter_holds_the_gaps_of_both_attacks():
    inputs, targets = data()
    for model, below in ((OPEN, 0.0), (Quantized(), 1.0)):
        pgd_inputs, search_inputs = white(model, inputs, targets), black(model, inputs, targets)
        found = masking_scatter(model, inputs, targets, pgd_inputs, search_inputs, batch_size=32)
        for gaps, moved in ((found.white_box, pgd_inputs), (found.black_box, search_inputs)):
            outputs = model(moved)
            expected = (outputs[:, 0] - outputs[:, 1]) * (1 - 2 * targets)
            torch.testing.assert_close(gaps, expected)
        assert found.below == pytest.approx(below, abs=0.05)


def test_gap_is_to_the_largest_other_logit():
    logits = torch.tensor([[0.5, 0.25, 0.375], [0.5, 0.25, 0.375], [0.5, 0.25, 0.375]])
    found = masking_scatter(nn.Identity(), logits, torch.arange(3), logits, logits)
    torch.testing.assert_close(found.white_box, torch.tensor([0.125, -0.25, -0.125]))
    assert found.below == 0


def test_gaps_of_low_precision_outputs_are_taken_in_float32():
    inputs, targets = data()
    model = linear([[2.0, -2.0], [-2.0, 2.0]]).bfloat16()
    found = masking_scatter(model, inputs, targets, inputs, inputs)
    assert found.white_box.dtype == torch.float32


@pytest.mark.parametrize(
    ("accuracies", "leaks"),
    [
        ((0.9, 0.5, 0.5), False),
        ((0.9, 0.505, 0.5), False),  # by chance
        ((0.9, 0.95, 0.97), True),
        ((0.9, 0.6, 0.5), True),
    ],
)
def test_a_label_leaks_where_attacks_at_true_labels_are_easier(accuracies, leaks):
    assert LabelLeaking(*accuracies).leaks == leaks


def test_label_leaking_of_a_linear_classifier():
    inputs, targets = data()
    targets[:10] = 1 - targets[:10]
    found = label_leaking(
        OPEN, inputs, targets, lambda *batch: fgsm(*batch, eps=0.1), batch_size=32
    )
    distances = (inputs[:, 0] - inputs[:, 1]).abs() / 2
    standing = distances > 0.1
    assert found.clean == pytest.approx(1 - 10 / len(inputs))
    assert found.true_labels == pytest.approx(standing[10:].sum().item() / len(inputs))
    # At the predicted, wrong label the attack corrects those near the boundary.
    corrected = (~standing[:10]).sum()
    expected = (standing[10:].sum() + corrected).item() / len(inputs)
    assert found.predicted_labels == pytest.approx(expected)
    assert not found.leaks


def test_label_leaking_tells_the_attack_the_right_labels():
    inputs, targets = data()
    targets[:10] = 1 - targets[:10]
    told = []

    def attack(model, batch, labels):
        told.append(labels)
        return batch

    label_leaking(OPEN, inputs, targets, attack)
    assert torch.equal(told[0], targets)
    assert torch.equal(told[1], OPEN(inputs).argmax(1))


def test_softmax_along_the_segment_of_a_linear_classifier():
    inputs = torch.tensor([[0.75, 0.25], [0.0, 0.5]])
    moved = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found = softmax_along_segment(OPEN, inputs, moved, points=5, batch_size=1)
    assert found.shape == (2, 5, 2)
    for row, differences in zip(
        found, ([0.5, 0.25, 0, -0.25, -0.5], [-0.5, -0.375, -0.25, -0.125, 0]), strict=True
    ):
        expected = [1 / (1 + math.exp(-4 * difference)) for difference in differences]
        torch.testing.assert_close(row[:, 0], torch.tensor(expected))
    torch.testing.assert_close(found.sum(2), torch.ones(2, 5))


def test_a_segment_has_two_ends():
    message = "softmax_along_segment: points must be at least 2, got 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        softmax_along_segment(OPEN, *[data()[0]] * 2, points=1)
