import copy

import pytest
import torch
from networks import batch, linear, random_state, smooth
from torch import nn
from torch.nn import functional as F

from robustkern.analysis import InputHessian, curved_operations, gauss_newton


def truth(model, inputs, targets):
    """Hessians by torch.autograd.functional, sample by sample, (N, d, d)."""
    size = inputs[0].numel()

    def hessian(x, y):
        return torch.autograd.functional.hessian(
            lambda point: F.cross_entropy(model(point[None]), y[None]), x
        )

    return torch.stack(
        [hessian(x, y).reshape(size, size) for x, y in zip(inputs, targets, strict=True)]
    )


def perceptron(dtype=torch.float64, activation=nn.Tanh):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), activation(), nn.Linear(16, 4))
    return network.to(torch.get_default_device(), dtype)


def samples(dtype=torch.float64, count=5):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64, device="cpu")
    return inputs.to(torch.get_default_device(), dtype), torch.arange(count) % 4


@pytest.mark.parametrize("batch_size", [256, 5, 2])
def test_exact_is_the_hessian_whatever_the_batches(batch_size):
    model, (inputs, targets) = perceptron(), samples()
    hessian = InputHessian(model, inputs, targets, method="exact", batch_size=batch_size)
    expected = truth(model, inputs, targets)
    torch.testing.assert_close(hessian.dense(), expected)
    vectors = torch.randn_like(inputs)
    products = (expected @ vectors.flatten(1)[:, :, None]).view_as(inputs)
    torch.testing.assert_close(hessian(vectors), products)
    torch.testing.assert_close(hessian(2 * vectors), 2 * products)


def test_exact_of_a_convolutional_network_in_eval_mode():
    model, (inputs, targets) = smooth().eval(), batch(samples=2)
    vectors = torch.randn_like(inputs)
    products = truth(model, inputs, targets) @ vectors.flatten(1)[:, :, None]
    found = InputHessian(model, inputs, targets, method="exact")(vectors)
    torch.testing.assert_close(found, products.view_as(inputs))


@pytest.mark.parametrize("batch_size", [256, 2])
def test_finite_differences_are_those_of_the_equation(batch_size):
    model, (inputs, targets) = perceptron(activation=nn.ReLU), samples()
    vectors, h = torch.randn_like(inputs), 0.7
    length = vectors.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), targets, reduction="sum"), x)[0]

    ahead, behind = (gradient(inputs + s * h * vectors / length) for s in (1, -1))
    options = {"h": h, "batch_size": batch_size}
    found = InputHessian(model, inputs, targets, **options)
    torch.testing.assert_close(found.gradient, gradient(inputs))
    torch.testing.assert_close(found(vectors), length * (ahead - gradient(inputs)) / h)
    central = InputHessian(model, inputs, targets, central=True, **options)(vectors)
    torch.testing.assert_close(central, length * (ahead - behind) / (2 * h))


def test_short_differences_approach_the_hessian_and_central_ones_faster():
    model, (inputs, targets) = perceptron(), samples()
    expected = truth(model, inputs, targets)
    errors = [
        (InputHessian(model, inputs, targets, h=1e-3, central=c).dense() - expected).abs().max()
        for c in (False, True)
    ]
    assert errors[0] < 1e-3 * expected.abs().max() * 10
    assert errors[1] < 1e-2 * errors[0]


def test_only_the_symmetric_part_of_finite_differences_is_symmetric():
    hessian = InputHessian(perceptron(), *samples(), h=1.5)
    plain, symmetric = hessian.dense(symmetric=False), hessian.dense()
    assert not torch.allclose(plain, plain.mT, rtol=1e-3)
    torch.testing.assert_close(symmetric, (plain + plain.mT) / 2)
    basis = torch.eye(12, dtype=plain.dtype)[3].view(1, 3, 2, 2).expand(5, -1, -1, -1)
    torch.testing.assert_close(plain[:, :, 3], hessian(basis).flatten(1))


@pytest.mark.parametrize("method", ["finite", "exact"])
def test_samples_do_not_see_each_other(method):
    model, (inputs, targets) = perceptron(), samples()
    vectors = torch.randn_like(inputs)
    together = InputHessian(model, inputs, targets, method=method)(vectors)
    alone = InputHessian(model, inputs[2:3], targets[2:3], method=method)(vectors[2:3])
    torch.testing.assert_close(together[2:3], alone)


@pytest.mark.parametrize("method", ["finite", "exact"])
def test_no_pass_has_more_rows_than_a_batch(method):
    model, (inputs, targets) = perceptron(), samples()
    rows = []
    model.register_forward_hook(lambda module, args, outputs: rows.append(len(outputs)))
    hessian = InputHessian(model, inputs, targets, method=method, batch_size=3)
    hessian(torch.ones_like(inputs))
    next(hessian.matrices())
    assert max(rows) == 3


def test_float32_keeps_the_curvature_of_a_confident_network():
    weight = 20 * torch.eye(4, 12)
    inputs, targets = torch.zeros(1, 12), torch.tensor([0])
    inputs[0, 0] = 1
    found = InputHessian(linear(weight), inputs, targets, method="exact").dense()
    expected = truth(linear(weight.double()), inputs.double(), targets).float()
    assert 0 < expected.abs().max() < 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", ["finite", "exact"])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e30])
def test_vectors_of_any_length_give_finite_products(method, length):
    inputs, targets = samples(torch.float32)
    hessian = InputHessian(perceptron(torch.float32), inputs, targets, method=method, h=0.5)
    vectors = torch.randn_like(inputs)
    products = hessian(length * vectors)
    torch.testing.assert_close(
        products.double(), length * hessian(vectors).double(), rtol=1e-3, atol=length * 1e-6
    )


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(12, 4))])
def test_a_loss_without_curvature_has_none(model):
    def first(outputs, targets):
        return outputs[:, 0]

    inputs, targets = samples(torch.float32)
    for method in ("finite", "exact"):
        hessian = InputHessian(model, inputs, targets, method=method, loss_fn=first)
        assert hessian(torch.ones_like(inputs)).abs().max() < 1e-6


def test_nothing_of_the_network_moves_and_inference_mode_does_not_matter():
    model, (inputs, targets) = smooth().eval(), batch()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = random_state()
    vectors = torch.randn_like(inputs)
    torch.set_rng_state(before[: len(torch.get_rng_state())])
    with torch.inference_mode():
        x = inputs.clone()
        for method in ("finite", "exact"):
            InputHessian(model, x, targets, method=method)(vectors.clone())
    assert torch.equal(before, random_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert [p.requires_grad for p in model[0].parameters()] == [True, False]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(3), "BatchNorm2d '0', whose batch statistics"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), "no Hessian of one sample"),
        (nn.Dropout(0.5), "Dropout '0' in training mode"),
        (nn.RReLU(), "must be deterministic"),
    ],
)
def test_networks_whose_samples_have_no_hessian_are_refused(layer, message):
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 4).train())
    with pytest.raises(ValueError, match=message):
        InputHessian(model, *samples(torch.float32))


class Noise(nn.Module):
    """A dropout that is no layer."""

    def forward(self, x):
        return F.dropout(x, training=self.training)


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("ask", [InputHessian, gauss_newton, curved_operations])
@pytest.mark.parametrize("layer", [Noise, spectral, lambda: nn.InstanceNorm2d(3, 1, 1, True, True)])
def test_networks_that_differ_from_call_to_call_are_refused_and_left_as_they_were(layer, ask):
    model = nn.Sequential(layer(), nn.Flatten(), nn.Linear(12, 4)).train()
    inputs, targets = samples(torch.float32)
    state = copy.deepcopy(model.state_dict())
    before = random_state()
    arguments = (inputs, targets) if ask is InputHessian else (inputs,)
    with pytest.raises(ValueError, match=f"{ask.__name__}: .*same at each gradient.*model.eval"):
        ask(model, *arguments)
    assert torch.equal(before, random_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    ask(model.eval(), *arguments)


def test_a_network_without_double_backward_is_told_of_finite_differences():
    class Attention(nn.Module):
        def forward(self, x):
            x = x.flatten(2)[:, None]
            return F.scaled_dot_product_attention(x, x, x).flatten(1)[:, :4]

    inputs, targets = batch(torch.float32, samples=2)
    with pytest.raises(RuntimeError, match=r'fused attention has no .* use method="finite"'):
        InputHessian(Attention(), inputs, targets, method="exact")
    InputHessian(Attention(), inputs, targets)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 1}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"inputs": torch.ones(5, 12).long()}, TypeError, "inputs must be a floating-point"),
        ({"inputs": torch.ones(0, 12)}, ValueError, r"at least one sample, got \(0, 12\)"),
        ({"inputs": torch.full((5, 12), torch.nan)}, ValueError, "inputs must be finite"),
        ({"targets": [0, 1]}, TypeError, "targets must be a tensor, got list"),
        ({"targets": torch.zeros(2).long()}, ValueError, "targets must be as many as inputs"),
        ({"loss_fn": F.cross_entropy}, TypeError, r"loss of each sample, \(5,\).* got \(\)"),
        ({"targets": torch.full((5,), 4)}, ValueError, r"lie in \[0, 4\).* from 4 to 4"),
        ({"targets": torch.zeros(5)}, TypeError, "int64 targets, got .* torch.float32 Tensor of"),
        ({"targets": torch.zeros(5, 1).long()}, ValueError, r"targets \(N,\), got .* \(5, 1\)"),
        ({"model": nn.LSTM(12, 4), "inputs": torch.ones(5, 12)}, TypeError, "outputs .* got tuple"),
        ({"loss_fn": lambda f, y: f[:, 0] / 0}, ValueError, "must have finite gradients"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable, got NoneType"),
        ({"method": "gauss"}, ValueError, "method must be one of .* got 'gauss'"),
        ({"h": 0}, ValueError, "h must be positive and finite, got 0"),
        ({"h": "1"}, TypeError, "h must be a number, got str"),
        ({"central": "no"}, TypeError, "central must be a bool, got str"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be an int, got float"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    inputs, targets = samples(torch.float32)
    arguments = {"model": perceptron(torch.float32), "inputs": inputs, "targets": targets}
    with pytest.raises(error, match=f"InputHessian: .*{message}"):
        InputHessian(**{**arguments, **change})


def test_bad_vectors_are_named():
    hessian = InputHessian(perceptron(), *samples())
    with pytest.raises(TypeError, match=r"vectors must be a torch\.float64 tensor"):
        hessian(torch.ones(5, 3, 2, 2))
    with pytest.raises(ValueError, match="vectors must have inputs' shape and device"):
        hessian(torch.ones(5, 12, dtype=torch.float64))
