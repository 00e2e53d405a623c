"""What models take and return, and the losses they are trained with."""

from collections import OrderedDict

import pytest
import torch
from agreement import PENALTY, assert_agrees, assert_near, exact
from networks import batch, gradient, smooth
from torch import nn
from torch.nn import functional as F

import robustkern


class Returning(nn.Module):
    """A network that returns more than its logits."""

    def __init__(self, pack):
        super().__init__()
        self.network, self.pack = smooth(), pack

    def forward(self, x):
        logits = self.network(x)
        return self.pack(logits, logits.square())


class ModelOutput(OrderedDict):
    """As Hugging Face's: entries by name, by attribute and by position, without those not there."""

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


PACKS = {
    "tuple": (lambda logits, other: (other, logits), 1),
    "tuple, from the end": (lambda logits, other: (other, logits), -1),
    "dict": (lambda logits, other: {"logits": logits, "hidden": other}, "logits"),
    "ModelOutput": (lambda logits, other: ModelOutput(hidden=other, logits=logits), "logits"),
    "ModelOutput, by position": (lambda logits, other: ModelOutput(a=other, b=logits), 1),
}


@pytest.mark.setting(
    "models that return a tuple, dict or ModelOutput",
    group="inputs, outputs and losses",
    note="`output=`",
)
@pytest.mark.parametrize("name", PACKS)
def test_output(name):
    pack, output = PACKS[name]
    model, (inputs, targets) = Returning(pack), batch()
    step = assert_agrees(model, inputs, targets, output=output)
    assert step.outputs.shape == (6, 5)


class Multimodal(nn.Module):
    """Embeddings beside a mask, an integer index and options."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kinds = nn.Embedding(3, 16, dtype=torch.float64)
        self.hidden = nn.Linear(16, 16, dtype=torch.float64)
        self.head = nn.Linear(16, 5, dtype=torch.float64)

    def forward(self, inputs_embeds, attention_mask, kind, scale=1.0, labels=None):
        hidden = F.gelu(scale * self.hidden(inputs_embeds + self.kinds(kind)[:, None]))
        weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return ModelOutput(logits=self.head((weight * hidden).sum(1)))


@pytest.mark.setting(
    "embeddings beside other inputs",
    group="inputs, outputs and losses",
    note="inputs as a dict, `wrt=`",
)
def test_embeddings_of_a_dict():
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    embeddings = torch.rand(6, 7, 16, generator=generator, dtype=torch.float64)
    inputs = {
        "inputs_embeds": embeddings,
        "attention_mask": (torch.arange(7) <= torch.arange(1, 7)[:, None]).double(),
        "kind": torch.arange(6) % 3,
        "scale": 2.0,
        "labels": None,
    }
    held = dict(inputs)
    assert_agrees(Multimodal(), inputs, torch.arange(6) % 5, wrt="inputs_embeds", output="logits")
    assert inputs.keys() == held.keys()
    assert all(inputs[name] is held[name] for name in held)
    assert not embeddings.requires_grad


def test_another_floating_entry_is_left_alone():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = smooth()

        def forward(self, image, other):
            return self.network(image + 0.1 * other)

    inputs, targets = batch()
    other = inputs.flip(0).requires_grad_()
    assert_agrees(Pair(), {"image": inputs, "other": other}, targets, wrt="image")


@pytest.mark.setting(
    "signals (N, C, L), tabular data (N, D), volumes", group="inputs, outputs and losses"
)
@pytest.mark.parametrize("shape", [(3, 16), (12,), (2, 4, 4, 4)], ids=str)
def test_inputs_that_are_no_images(shape):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    inputs = torch.rand(6, *shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    first = {1: nn.Linear, 2: nn.Conv1d, 4: nn.Conv3d}[len(shape)]
    with torch.device("cpu"):
        layer = first(shape[0], 8, 3) if len(shape) > 1 else first(shape[0], 8)
        features = layer(inputs[:1].cpu().float()).numel()
        model = nn.Sequential(layer, nn.GELU(), nn.Flatten(), nn.Linear(features, 5))
    model.to(torch.get_default_device(), torch.float64)
    assert_agrees(model, inputs, torch.arange(6) % 5)


SOFT = torch.softmax(torch.arange(30, dtype=torch.float64).sin().view(6, 5), 1)
LOSSES = {
    "label smoothing": (lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), None),
    "nn.CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), None),
    "soft labels": (F.cross_entropy, SOFT),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, (SOFT > 0.2).double()),
    "mean squared error": (F.mse_loss, SOFT),
    "smooth L1": (F.smooth_l1_loss, SOFT),
    "KL divergence": (
        lambda o, t: F.kl_div(o.log_softmax(1), t, reduction="batchmean"),
        SOFT,
    ),
}


@pytest.mark.setting(
    "losses: label smoothing, soft labels, binary, regression",
    group="inputs, outputs and losses",
    note="`loss_fn=`",
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss_fn, targets = LOSSES[name]
    inputs, classes = batch()
    model = smooth()
    assert_agrees(model, inputs, classes if targets is None else targets, loss_fn=loss_fn)


def test_targets_of_a_regression_with_one_value():
    model, (inputs, _) = nn.Sequential(smooth(), nn.Linear(5, 1, dtype=torch.float64)), batch()
    targets = torch.linspace(-1, 1, 6, dtype=torch.float64)
    assert_agrees(model, inputs, targets, loss_fn=lambda o, t: F.mse_loss(o[:, 0], t))


@pytest.mark.setting(
    "dense predictions: a class for each pixel", group="inputs, outputs and losses"
)
def test_segmentation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 1)).double()
    inputs, _ = batch()
    assert_agrees(model, inputs, (4 * inputs[:, 0]).long())


@pytest.mark.setting(
    "models that change their input in place",
    group="inputs, outputs and losses",
    refused="give them a copy",
)
def test_a_model_that_changes_its_input():
    model, (inputs, targets) = nn.Sequential(nn.ReLU(inplace=True), smooth()), batch()
    before = inputs.clone()
    with pytest.raises(RuntimeError, match="in-place operation"):
        robustkern.backward(model, inputs, targets, PENALTY)
    assert torch.equal(inputs, before)


@pytest.mark.setting("data made in inference_mode", group="inputs, outputs and losses")
def test_inference_mode_data():
    with torch.inference_mode():
        inputs, targets = batch()
    assert inputs.is_inference()
    model = smooth(dropout=0.0)
    plain, of_penalty = exact(model, *batch())
    robustkern.backward(model, inputs, targets, PENALTY)
    assert_near(gradient(model) - plain, of_penalty)
