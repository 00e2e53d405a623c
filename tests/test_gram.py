import math

import pytest
import torch
from networks import batch, linear, pixels, random_state, smooth
from torch import nn
from torch.nn import functional as F

from robustkern.analysis import InputHessian, curved_operations, gauss_newton, spectrum

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    """Operations that are functions, not layers."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = (x - 0.5) / torch.full((3, 1, 1), 0.25, dtype=x.dtype)
        return F.relu(x + self.norm(self.convolution(F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1])))


def network(*layers, features=192):
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))
    return model.to(torch.get_default_device(), torch.float64).eval()


LINEAR = {
    "linear": lambda: network(),
    "relu": lambda: network(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), features=64),
    "leaky": lambda: network(nn.BatchNorm2d(3), nn.LeakyReLU(), nn.MaxPool2d(2), features=48),
    "prelu": lambda: network(nn.Conv2d(3, 4, 3, 2, 1), nn.PReLU(), nn.AvgPool2d(2), features=16),
    "hardtanh": lambda: network(
        nn.Dropout(), nn.Hardtanh(0, 0.5), nn.AdaptiveAvgPool2d(2), features=12
    ),
    "residual": lambda: network(Residual(), nn.ReLU6(), nn.AdaptiveMaxPool2d(4), features=48),
}
CURVED = {
    "GELU": (nn.GELU(), "Gelu"),
    "Tanh": (nn.Tanh(), "Tanh"),
    "Softplus": (nn.Softplus(), "Softplus"),
    "Sigmoid": (nn.Sigmoid(), "Sigmoid"),
    "SiLU": (nn.SiLU(), "Silu"),
    "Hardswish": (nn.Hardswish(), "Hardswish"),
    "LayerNorm": (nn.LayerNorm(SHAPE), "NativeLayerNorm"),
    "Softmax": (nn.Softmax(1), "Softmax"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_of_a_piecewise_linear_network_it_is_the_hessian(name):
    model, (inputs, targets) = LINEAR[name](), batch(samples=3)
    found = gauss_newton(model, inputs, batch_size=2)
    assert found.exact
    assert found.note == "the Hessian: the network is piecewise linear"
    hessian = InputHessian(model, inputs, targets, method="exact")
    torch.testing.assert_close(found.spectrum(), spectrum(hessian), rtol=1e-8, atol=1e-12)
    for rank in range(found.values.shape[1]):
        u = found.vectors[:, rank]
        scaled = found.values[:, rank].view(-1, 1, 1, 1) * u
        torch.testing.assert_close(hessian(u), scaled, rtol=1e-6, atol=1e-10)
    whole = torch.linalg.matrix_norm(hessian.dense())
    torch.testing.assert_close(found.frobenius, whole)
    gram = found.vectors.flatten(2) @ found.vectors.flatten(2).mT
    torch.testing.assert_close(gram, torch.eye(4).double().expand_as(gram))


@pytest.mark.parametrize("name", CURVED)
def test_of_a_smooth_network_it_is_the_gauss_newton_part_and_says_so(name):
    layer, operation = CURVED[name]
    model, (inputs, targets) = network(layer), batch(samples=2)
    found = gauss_newton(model, inputs)
    assert not found.exact
    assert found.note.startswith("only the Gauss-Newton part")
    assert operation in curved_operations(model, inputs)
    expected = []
    for x in inputs:
        jacobian = torch.autograd.functional.jacobian(lambda p: model(p[None])[0], x).flatten(1)
        p = model(x[None])[0].detach().softmax(0)
        matrix = jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
        expected.append(torch.linalg.eigvalsh(matrix).flip(0))
    torch.testing.assert_close(found.spectrum(), torch.stack(expected), rtol=1e-8, atol=1e-12)
    whole = spectrum(InputHessian(model, inputs, targets, method="exact"))
    assert (found.spectrum() - whole).abs().max() > 1e-6 * whole.abs().max()


class Custom(torch.autograd.Function):
    """A ReLU, but who could tell."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class Sum(Custom):
    """Of the name of what is linear."""


def part_in_place(x):
    y = x.clone()
    y[:, :2].exp_()
    return y


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda x: x * x.detach(), ()),
        (lambda x: 3 * x / 2, ()),
        (lambda x: x * x, ("Mul",)),
        (lambda x: x / (x + 1), ("Div",)),
        (lambda x: torch.ones_like(x) / (x + 1), ("Div",)),
        (lambda x: x @ x.mT, ("Bmm",)),
        (lambda x: F.batch_norm(x, None, None, training=True), ("NativeBatchNorm",)),
        (lambda x: F.prelu(x, x[0, :1, 0, 0]), ("PreluKernel",)),
        (lambda x: Custom.apply(x), ("Custom",)),
        (lambda x: Sum.apply(x), ("Sum",)),
        (part_in_place, ("CopySlices",)),
    ],
)
def test_operations_are_judged_by_what_depends_on_the_inputs(function, operations):
    inputs, _ = batch(samples=2)
    found = curved_operations(network(Function(function)), inputs)
    assert tuple(name.replace("Cudnn", "Native") for name in found) == operations


def test_of_attention_it_names_the_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = network(Function(lambda x: layer.double().eval()(x[:, 0])), features=64)
    named = ", ".join(curved_operations(model, batch(samples=2)[0]))
    assert "NativeLayerNorm" in named
    assert "ScaledDotProduct" in named or "Softmax" in named


def test_two_classes_of_a_linear_classifier_in_closed_form():
    weight = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
    inputs = pixels(4, 3)
    p = linear(weight)(inputs).detach().softmax(1)
    difference = weight[0] - weight[1]
    found = gauss_newton(linear(weight), inputs)
    expected = p.prod(1) * difference.square().sum()
    torch.testing.assert_close(found.values[:, 0], expected)
    torch.testing.assert_close(found.frobenius, expected)
    cosine = F.cosine_similarity(found.vectors[:, 0], difference[None])
    torch.testing.assert_close(cosine.abs(), torch.ones(4).double())


def test_a_confident_float32_network_keeps_small_values():
    weight = torch.tensor([[60.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    found = gauss_newton(linear(weight), torch.tensor([[1.0, 0.0]]))
    expected = gauss_newton(linear(weight.double()), torch.tensor([[1.0, 0.0]]).double())
    assert 0 < found.values[0, 0] < 1e-20
    torch.testing.assert_close(found.values, expected.values.float(), rtol=1e-4, atol=0)
    assert math.isclose(found.frobenius, expected.frobenius, rel_tol=1e-4)


@pytest.mark.parametrize("size", [1, 4])
def test_no_curvature_and_few_dimensions_give_no_nan(size):
    found = gauss_newton(linear(torch.zeros(3, size)), torch.zeros(2, size))
    assert found.values.shape == (2, min(2, size))
    assert not found.values.any()
    assert not found.frobenius.any()
    assert found.vectors.isfinite().all()
    assert found.spectrum().shape == (2, size)


def test_nothing_of_the_network_moves():
    model, (inputs, _) = smooth().eval(), batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = random_state()
    with torch.inference_mode():
        gauss_newton(model, inputs.clone())
    assert torch.equal(before, random_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("function", [gauss_newton, curved_operations])
@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (1, torch.ones(2, 3), TypeError, "model must be a torch.nn.Module, got int"),
        (nn.Identity(), torch.ones(2, 3).long(), TypeError, "inputs must be a floating-point"),
        (nn.Identity(), torch.ones(0, 3), ValueError, "at least one sample"),
        (nn.Identity(), torch.ones(2, 1), ValueError, r"at least two classes, got \(2, 1\)"),
        (nn.LSTM(3, 3), torch.ones(2, 3), TypeError, "model must return a tensor, got tuple"),
        (Function(lambda x: x / 0), torch.ones(2, 3), ValueError, "finite outputs"),
        (nn.BatchNorm1d(3), torch.ones(2, 3), ValueError, "no Hessian of one sample"),
        (nn.Dropout(), torch.ones(2, 3), ValueError, "must be deterministic"),
    ],
)
def test_bad_arguments_are_named(function, model, inputs, error, message):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(model, inputs)
    if function is gauss_newton:
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            gauss_newton(nn.Identity(), torch.ones(2, 3), batch_size=0)
