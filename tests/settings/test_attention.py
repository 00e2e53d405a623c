"""Fast kernels without a second derivative: attention, recurrence, functions of one's own."""

import pytest
import torch
from agreement import (
    PENALTY,
    Within,
    assert_agrees,
    assert_near,
    assert_same_random_numbers,
    exact,
)
from networks import gradient
from torch import nn
from torch.autograd.function import once_differentiable
from torch.backends import cudnn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import robustkern


def sequences(dtype=torch.float64, samples=6):
    """Inputs (N, 5, 16) and targets."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand((samples, 5, 16), generator=generator, dtype=torch.float64, device="cpu")
    return inputs.to(torch.get_default_device(), dtype), torch.arange(samples) % 5


class Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(16, 48, dtype=dtype)
        self.head = nn.Linear(16, 5, dtype=dtype)

    def forward(self, x):
        parts = self.project(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(3 * q, 3 * k, v)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


def mathematical(model):
    """Its attention as plain matrix products, which have a second derivative."""
    return Within(model, lambda: sdpa_kernel(SDPBackend.MATH))


def kernels(model, inputs):
    """The names of a forward pass's operations."""
    with torch.profiler.profile() as profile:
        model(inputs)
    return " ".join(event.key for event in profile.key_averages())


@pytest.mark.setting("scaled_dot_product_attention", group="attention and recurrence")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_attention(dtype):
    model, (inputs, targets) = Attention(dtype), sequences(dtype)
    if not inputs.is_cuda:
        assert "flash_attention_for_cpu" in kernels(model, inputs)
    assert_agrees(model, inputs, targets, truth=mathematical(model), dtype=dtype)


@pytest.mark.gpu
@pytest.mark.setting(
    "scaled_dot_product_attention, memory-efficient CUDA kernel", group="attention and recurrence"
)
def test_memory_efficient_attention():
    model, (inputs, targets) = Attention(torch.float32), sequences(torch.float32)
    efficient = Within(model, lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
    assert "efficient_attention" in kernels(efficient, inputs)
    assert_agrees(efficient, inputs, targets, truth=mathematical(model), dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.setting(
    "scaled_dot_product_attention, flash CUDA kernel", group="attention and recurrence"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention(dtype):
    model = Attention(torch.float32)
    inputs, targets = sequences(torch.float32, samples=32)

    def flash():
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)

    with torch.autocast("cuda", dtype):
        assert "flash_attention" in kernels(Within(model, flash), inputs)
    plain, of_penalty = exact(mathematical(model), inputs, targets)
    with torch.autocast("cuda", dtype):
        robustkern.backward(Within(model, flash), inputs, targets, PENALTY)
    assert_near(gradient(model).double() - plain, of_penalty, dtype)


class MultiheadAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(16, 5, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x):
        mixed, _ = self.attention(3 * x, 3 * x, x, need_weights=self.need_weights)
        return self.head(mixed.mean(1))


@pytest.mark.setting("nn.MultiheadAttention", group="attention and recurrence")
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    model, (inputs, targets) = MultiheadAttention(need_weights), sequences()
    assert_agrees(model, inputs, targets, truth=mathematical(model))


class Recurrent(nn.Module):
    def __init__(self, kind, dtype=torch.float64, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(16, 8, num_layers=2, batch_first=True, dropout=dropout, dtype=dtype)
        self.head = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x):
        return self.head(3 * self.layers(3 * x)[0][:, -1])


def without_cudnn(model):
    """Its recurrence without cuDNN, which has a second derivative."""
    return Within(model, lambda: cudnn.flags(enabled=False))


# In eval mode cuDNN's layers have no backward pass at all.
@pytest.mark.setting("nn.LSTM, nn.GRU, nn.RNN", group="attention and recurrence")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["training", "eval", 'batch_norm="eval"'])
def test_recurrent_layers(kind, dtype, mode):
    model, (inputs, targets) = Recurrent(kind, dtype), sequences(dtype)
    model.train(mode != "eval")
    assert_agrees(
        model,
        inputs,
        targets,
        truth=without_cudnn(model),
        dtype=dtype,
        batch_norm="eval" if mode == 'batch_norm="eval"' else "batch",
    )
    assert all(module.training == (mode != "eval") for module in model.modules())


@pytest.mark.setting("nn.LSTM with dropout between layers", group="attention and recurrence")
def test_dropout_between_recurrent_layers():
    model, (inputs, targets) = Recurrent(nn.LSTM, dropout=0.5), sequences()
    assert_same_random_numbers(model, inputs, targets)


@pytest.mark.gpu
@pytest.mark.setting(
    "double backward through cuDNN's recurrent layers",
    group="attention and recurrence",
    refused="robustkern.backward works, and so does torch.backends.cudnn.flags(enabled=False)",
)
def test_double_backward_through_cudnn():
    model, (inputs, targets) = Recurrent(nn.LSTM, torch.float32), sequences(torch.float32)
    with pytest.raises(RuntimeError, match=r"robustkern\.backward"):
        PENALTY(model, inputs, targets).backward()


class Cube(torch.autograd.Function):
    """x^3 with a derivative written by hand, as fused kernels come."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubic(nn.Module):
    def __init__(self, cube):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(80, 16, dtype=torch.float64)
        self.head = nn.Linear(16, 5, dtype=torch.float64)
        self.cube = cube

    def forward(self, x):
        return self.head(self.cube(self.hidden(x.flatten(1))))


@pytest.mark.setting(
    "custom autograd functions, differentiable once", group="attention and recurrence"
)
def test_custom_function():
    inputs, targets = sequences()
    assert_agrees(Cubic(Cube.apply), inputs, targets, truth=Cubic(lambda x: x**3))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Sequential(
            nn.Linear(80, 16, dtype=torch.float64), nn.GELU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(16, 5, dtype=torch.float64)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.flatten(1)
        return self.head(checkpoint(self.hidden, 3 * x, use_reentrant=self.reentrant))


@pytest.mark.setting("activation checkpointing", group="layers and parameters")
def test_checkpointing():
    model, (inputs, targets) = Checkpointed(reentrant=False, dropout=0.3), sequences()
    assert_agrees(model, inputs, targets)


@pytest.mark.setting(
    "activation checkpointing, reentrant",
    group="layers and parameters",
    refused="use use_reentrant=False",
)
def test_reentrant_checkpointing():
    model, (inputs, targets) = Checkpointed(reentrant=True), sequences()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        robustkern.backward(model, inputs, targets, PENALTY)
    assert all(parameter.grad is None for parameter in model.parameters())
