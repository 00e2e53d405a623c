"""What all measures have in common: nothing is left changed, batches do not matter, errors."""

import re

import pytest
import torch
from networks import linear, pixels, random_state
from torch import nn
from torch.nn import functional as F

from robustkern.evaluation import (
    Detector,
    accuracy_curve,
    adversarial_distances,
    adversarial_inputs,
    attack_ladder,
    deepfool_robustness,
    detection_table,
    failure_indicators,
    fgsm,
    gradient_norms,
    gradient_statistics,
    label_leaking,
    masking_scatter,
    softmax_along_segment,
    transfer_matrix,
)


def attack(model, inputs, targets, eps=0.1):
    return fgsm(model, inputs, targets, eps)


# Of (model, inputs, targets, adversarial inputs), and how many passes of the data set each takes.
MEASURES = {
    "adversarial_inputs": (lambda m, x, y, a, **k: adversarial_inputs(m, x, y, attack, **k), 1),
    "gradient_norms": (lambda m, x, y, a, **k: gradient_norms(m, x, y, **k), 1),
    "gradient_statistics": (lambda m, x, y, a, **k: gradient_statistics(m, x, y, **k), 2),
    "accuracy_curve": (lambda m, x, y, a, **k: accuracy_curve(m, x, y, attack, [0.1, 0.2], **k), 2),
    "attack_ladder": (lambda m, x, y, a, **k: attack_ladder(m, x, y, {"a": a, "b": x}, **k), 2),
    "adversarial_distances": (lambda m, x, y, a, **k: adversarial_distances(m, x, y, a, **k), 2),
    "detection_table": (
        lambda m, x, y, a, **k: detection_table(Detector(1.0), m, x, y, {"a": a}, **k), 4,
    ),
    "masking_scatter": (lambda m, x, y, a, **k: masking_scatter(m, x, y, a, x, **k), 2),
    "label_leaking": (lambda m, x, y, a, **k: label_leaking(m, x, y, attack, **k), 5),
    "failure_indicators": (
        lambda m, x, y, a, **k: failure_indicators(
            m, x, y, white_box=a, black_box=a, large=a, **k
        ), 5,
    ),
    "transfer_matrix": (lambda m, x, y, a, **k: transfer_matrix({"m": m}, x, y, attack, **k), 2),
    "Detector.fit": (lambda m, x, y, a, **k: Detector.fit(m, x, **k), 1),
    "Detector.score": (lambda m, x, y, a, **k: Detector(1.0).score(m, x, **k), 1),
    "Detector.flag": (lambda m, x, y, a, **k: Detector(1.0).flag(m, x, **k), 1),
    "deepfool_robustness": (lambda m, x, y, a, **k: deepfool_robustness(m, x, a, **k), 2),
    "softmax_along_segment": (
        lambda m, x, y, a, **k: softmax_along_segment(m, x, a, points=3, **k), 3,
    ),
}  # fmt: skip
LABELLED = list(MEASURES)[:11]
ATTACKING = ("adversarial_inputs", "accuracy_curve", "transfer_matrix")
PER_SAMPLE = ("adversarial_inputs", "gradient_norms")
ADVERSARIAL = {
    "attack_ladder": "adversarial['a']",
    "adversarial_distances": "adversarial",
    "detection_table": "adversarial['a']",
    "masking_scatter": "white_box",
    "failure_indicators": "white_box",
    "deepfool_robustness": "adversarial",
    "softmax_along_segment": "adversarial",
}


class Network(nn.Module):
    """Batch norm, dropout that ignores eval mode if asked to, and an error at a chosen call."""

    def __init__(self, dropout=False, fail_at=None):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.linear = linear(4 * torch.eye(3).repeat_interleave(2, dim=1))
        self.dropout, self.calls, self.fail_at = dropout, 0, fail_at

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("broken model")
        return self.linear(F.dropout(self.norm(inputs), training=self.dropout))


def data():
    inputs = pixels(24, 6, torch.float32)
    return inputs, torch.arange(24) % 3, inputs.roll(1, 0)


def flat(found):
    """All numbers of a result."""
    if isinstance(found, torch.Tensor):
        return found.double().flatten().tolist()
    if isinstance(found, tuple | list):
        return [number for each in found for number in flat(each)]
    if isinstance(found, dict):
        return flat(list(found.values()))
    if isinstance(found, str):
        return []
    return flat(list(vars(found).values())) if hasattr(found, "__dict__") else [found]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(name, fails):
    measure, _ = MEASURES[name]
    inputs, targets, moved = data()
    model = Network(dropout=True, fail_at=2 if fails else None).train()
    model.norm.eval()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.full((3, 6), 7.0)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    given = [tensor.clone() for tensor in (inputs, targets, moved)]
    random = random_state()
    if fails:
        with pytest.raises(RuntimeError, match=r"^broken model$"):
            measure(model, inputs, targets, moved, batch_size=5)
    else:
        measure(model, inputs, targets, moved, batch_size=5)
    assert model.calls > 1
    assert model.training
    assert not model.norm.training
    assert model.linear.weight.requires_grad
    assert not model.linear.bias.requires_grad
    assert (model.linear.weight.grad == 7).all()
    assert model.norm.weight.grad is None
    assert torch.equal(random_state(), random)
    for tensor, before in zip((inputs, targets, moved), given, strict=True):
        assert torch.equal(tensor, before)
        assert not tensor.requires_grad
    for key, value in model.named_buffers():
        assert torch.equal(value, buffers[key]), key


@pytest.mark.parametrize("name", MEASURES)
def test_batches_change_nothing_and_are_reported(name):
    measure, passes = MEASURES[name]
    sizes = []
    model = Network().train()
    whole = flat(measure(model, *data()))
    parts = flat(measure(model, *data(), batch_size=7, advance=sizes.append))
    assert whole == pytest.approx(parts, rel=1e-4)
    assert sizes == [7, 7, 7, 3] * passes


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_measures_work_where_autograd_is_off(name, mode):
    measure, _ = MEASURES[name]
    model = Network()
    expected = flat(measure(model, *data()))
    with mode():
        assert flat(measure(model, *[each.clone() for each in data()])) == expected


@pytest.mark.parametrize("name", MEASURES)
def test_batches_move_to_the_dtype_of_the_model(name):
    measure, _ = MEASURES[name]
    expected = flat(measure(Network(), *data()))
    assert flat(measure(Network().double(), *data())) == pytest.approx(expected, rel=1e-3)


class Returns(nn.Module):
    """A network that returns what it should not."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs):
        return self.outputs(inputs)


BAD = {
    "module": (TypeError, "model must be a torch.nn.Module, got function"),
    "dtype": (TypeError, "inputs must be a floating-point tensor, got torch.int64"),
    "range": (ValueError, "inputs must lie in [0, 1], got values from -1 to 1"),
    "empty": (ValueError, "inputs must be (N, *D) with at least one sample, got (0, 6)"),
    "vector": (ValueError, "inputs must be (N, *D) with at least one sample, got (24,)"),
    "tuple": (TypeError, "model must return a tensor, got tuple"),
    "one output": (
        ValueError,
        "model must return (N, classes) of at least two classes, got (24, 1) for (24, 6)",
    ),
    "image": (
        ValueError,
        "model must return (N, classes) of at least two classes, got (24, 6, 1) for (24, 6)",
    ),
    "rows": (
        ValueError,
        "model must return (N, classes) of at least two classes, got (23, 6) for (24, 6)",
    ),
    "nan": (ValueError, "model must return finite outputs, got infinite ones or NaN"),
    "batch size": (ValueError, "batch_size must be at least 1, got 0"),
}
OUTPUTS = {
    "tuple": lambda x: (x, x),
    "one output": lambda x: x[:, :1],
    "image": lambda x: x.unsqueeze(2),
    "rows": lambda x: x[1:],
    "nan": lambda x: x * torch.nan,
}
BAD_LABELS = {
    "length": (ValueError, "targets must have inputs' length, got (24, 6) and (23,)"),
    "dtype": (TypeError, "targets must be an int64 tensor, got torch.float32"),
    "list": (TypeError, "targets must be an int64 tensor, got list"),
    "matrix": (ValueError, "targets must be (N,), got (24, 1)"),
    "one class": (ValueError, "targets must hold at least two classes, got 1 only"),
    "range": (
        ValueError,
        "targets must lie in [0, 3), the model's classes, got values from 0 to 3",
    ),
    "negative": (
        ValueError,
        "targets must lie in [0, 3), the model's classes, got values from -1 to 1",
    ),
}
LABELS = {
    "length": lambda y: y[:-1],
    "dtype": lambda y: y.float(),
    "list": lambda y: y.tolist(),
    "matrix": lambda y: y[:, None],
    "one class": torch.ones_like,
    "range": lambda y: torch.where(y == 2, 3, y),
    "negative": lambda y: y - 1,
}


def message_of(name, message):
    return f"^{re.escape(f'{name}: {message}')}$"


# An attack meets the model before the measure does.
@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ATTACKING])
@pytest.mark.parametrize("case", BAD)
def test_measures_name_bad_input(name, case):
    measure, _ = MEASURES[name]
    inputs, targets, moved = data()
    model, options = Network(), {"batch_size": 24}
    if case == "module":
        model = attack
    elif case == "dtype":
        inputs = inputs.long()
    elif case == "range":
        inputs = 2 * inputs.round() - 1
    elif case == "empty":
        inputs, targets, moved = inputs[:0], targets[:0], moved[:0]
    elif case == "vector":
        inputs, moved = inputs[:, 0], moved[:, 0]
    elif case == "batch size":
        options = {"batch_size": 0}
    else:
        model = Returns(OUTPUTS[case])
    kind, message = BAD[case]
    with pytest.raises(kind, match=message_of(name, message)):
        measure(model, inputs, targets, moved, **options)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in LABELLED
        for case in BAD_LABELS
        if not (name in ATTACKING and case in ("range", "negative"))
        and not (name in PER_SAMPLE and case == "one class")
    ],
)
def test_measures_name_bad_labels(name, case):
    measure, _ = MEASURES[name]
    inputs, targets, moved = data()
    kind, message = BAD_LABELS[case]
    with pytest.raises(kind, match=message_of(name, message)):
        measure(Network(), inputs, LABELS[case](targets), moved)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_measures_name_bad_adversarial_inputs(name):
    measure, _ = MEASURES[name]
    inputs, targets, moved = data()
    for wrong, kind, message in (
        (moved.long(), TypeError, "must be a floating-point tensor, got torch.int64"),
        (moved[1:], ValueError, "must have inputs' shape, got (24, 6) and (23, 6)"),
        (moved * torch.nan, ValueError, "must lie in [0, 1], got values from nan to nan"),
        (moved.ceil() + 1, ValueError, "must lie in [0, 1], got values from 2 to 2"),
    ):
        with pytest.raises(kind, match=message_of(name, f"{ADVERSARIAL[name]} {message}")):
            measure(Network(), inputs, targets, wrong)


def test_tensors_must_be_on_one_device():
    inputs, targets, moved = data()
    got = re.escape(f"must be on inputs' device, got {inputs.device} and meta")
    with pytest.raises(ValueError, match=f"^gradient_norms: targets {got}$"):
        gradient_norms(Network(), inputs, targets.to("meta"))
    with pytest.raises(ValueError, match=f"^deepfool_robustness: adversarial {got}$"):
        deepfool_robustness(Network(), inputs, moved.to("meta"))


def test_what_an_attack_returns_is_checked():
    inputs, targets, _ = data()
    for wrong, message in (
        (lambda m, x, y: x + 1, "must lie in [0, 1], got values from"),
        (lambda m, x, y: x[1:], "must have inputs' shape, got (24, 6) and (23, 6)"),
    ):
        expected = re.escape(f"adversarial_inputs: what attack returns {message}")
        with pytest.raises(ValueError, match=f"^{expected}"):
            adversarial_inputs(Network(), inputs, targets, wrong)


def test_an_attack_may_ask_for_gradients():
    def ascend(model, inputs, targets):
        inputs = inputs.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(inputs), targets), inputs)
        return (inputs + 0.1 * gradient.sign()).clamp(0, 1)

    inputs, targets, _ = data()
    with torch.no_grad():
        found = adversarial_inputs(Network(), inputs, targets, ascend)
    torch.testing.assert_close(found, fgsm(Network(), inputs, targets, 0.1))
    assert not found.requires_grad
