"""What networks are made of: normalization, random layers, layouts, and parameters of all kinds."""

import pytest
import torch
from agreement import PENALTY, assert_agrees, assert_near, assert_same_random_numbers, exact
from networks import batch, gradient, smooth
from torch import nn
from torch.nn import functional as F

import robustkern


def network(*layers):
    """A convolution, these layers on (N, 8, 8, 8), and a classifier."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        made = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            *layers,
            nn.GELU(),
            nn.Conv2d(8, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(36, 5),
        )
    return made.to(torch.get_default_device(), torch.float64)


@pytest.mark.setting("group, layer, instance and RMS norm", group="layers and parameters")
@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(2, 8),
        nn.LayerNorm((8, 8, 8)),
        nn.InstanceNorm2d(8, affine=True),
        nn.RMSNorm((8, 8)),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_normalization(norm):
    assert_agrees(network(norm), *batch())


@pytest.mark.setting("batch norm in eval mode", group="layers and parameters")
def test_batch_norm_in_eval_mode():
    model, (inputs, targets) = smooth(), batch()
    model(inputs + torch.randn_like(inputs))
    before = model[1].running_mean.clone()
    assert_agrees(model.eval(), inputs, targets)
    assert torch.equal(model[1].running_mean, before)


class DropPath(nn.Module):
    """Leaves a residual branch out, for each sample by chance (Huang et al. 2016)."""

    def __init__(self, branch, p=0.5):
        super().__init__()
        self.branch, self.p = branch, p

    def forward(self, x):
        kept = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) >= self.p
        return x + kept * self.branch(x) / (1 - self.p)


@pytest.mark.setting("drop path", group="layers and parameters")
def test_drop_path():
    model, (inputs, targets) = network(DropPath(nn.Conv2d(8, 8, 3, padding=1))), batch()
    assert_agrees(model, inputs, targets)
    assert_same_random_numbers(model, inputs, targets)


class LayerDrop(nn.Module):
    """Leaves a layer out by chance of the whole batch, so that it is in no graph at all."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x if torch.rand((), device="cpu") < 0.5 else x + self.layer(x)


@pytest.mark.setting("layers left out of a pass", group="layers and parameters")
def test_a_layer_left_out():
    inputs, targets = batch()
    layers = [LayerDrop(nn.Conv2d(8, 8, 1)) for _ in range(6)]
    model = network(*layers)
    assert_agrees(model, inputs, targets)
    used = [layer.layer.weight.grad is not None for layer in layers]
    assert set(used) == {True, False}


class TwoHeads(nn.Module):
    """Its second head takes part in training mode only."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.second = nn.Linear(192, 5, dtype=torch.float64)

    def forward(self, x):
        outputs = self.body(x)
        return outputs + self.second(x.flatten(1)) if self.training else outputs


@pytest.mark.setting("layers used in training mode only", group="layers and parameters")
def test_a_head_that_the_passes_in_eval_mode_leave_out():
    model, (inputs, targets) = TwoHeads(), batch()
    plain, _ = exact(model, inputs, targets)
    _, of_penalty = exact(model.eval(), inputs, targets)
    robustkern.backward(model.train(), inputs, targets, PENALTY, batch_norm="eval")
    assert_near(gradient(model) - plain, of_penalty)


@pytest.mark.setting("channels_last", group="layers and parameters")
def test_channels_last():
    inputs, targets = batch()
    model = smooth(dropout=0.0).to(memory_format=torch.channels_last)
    formats = []
    model.register_forward_pre_hook(
        lambda _, x: formats.append(x[0].is_contiguous(memory_format=torch.channels_last))
    )
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    assert_agrees(model, inputs, targets, truth=smooth(dropout=0.0))
    assert all(formats)


@pytest.mark.setting("frozen layers", group="layers and parameters")
@pytest.mark.parametrize("frozen", [0, 3, 7])
def test_frozen_layers(frozen):
    model, (inputs, targets) = smooth(), batch()
    model[frozen].requires_grad_(False)
    assert_agrees(model, inputs, targets)
    assert model[frozen].weight.grad is None


@pytest.mark.setting("shared parameters", group="layers and parameters")
def test_shared_parameters():
    first, second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    assert_agrees(network(first, nn.GELU(), second, nn.GELU(), first), *batch())


@pytest.mark.setting("parametrized layers: weight norm, orthogonal", group="layers and parameters")
@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal"])
def test_parametrized_layers(kind):
    layer = nn.Conv2d(8, 8, 3, padding=1, dtype=torch.float64, device="cpu")
    assert_agrees(network(getattr(nn.utils.parametrizations, kind)(layer)), *batch())


class Tabular(nn.Module):
    """Numbers beside a category."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.category = nn.Embedding(9, 4, sparse=sparse, dtype=torch.float64)
        self.hidden = nn.Linear(10, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, numbers, category):
        x = torch.cat([numbers, self.category(category)], 1)
        return self.head(F.gelu(self.hidden(x)))


@pytest.mark.setting("sparse gradients of embeddings", group="layers and parameters")
def test_sparse_gradients():
    inputs = {"numbers": batch()[0].flatten(1)[:, :6], "category": torch.arange(6) % 4}
    targets, found = torch.arange(6) % 5, []
    for sparse in (True, False):
        model = Tabular(sparse)
        for _ in range(2):
            robustkern.backward(model, inputs, targets, PENALTY, wrt="numbers")
        assert model.category.weight.grad.is_sparse == sparse
        found.append(model.category.weight.grad.to_dense())
    torch.testing.assert_close(*found)


@pytest.mark.setting("float64 models", group="precision")
def test_float64():
    model, (inputs, targets) = smooth(), batch()
    step = assert_agrees(model, inputs, targets)
    assert step.penalty.dtype == step.outputs.dtype == torch.float64
