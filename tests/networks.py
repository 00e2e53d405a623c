"""Small networks for the tests of the engine."""

import torch
from torch import nn


def smooth(dtype=torch.float64, batch_norm=True, dropout=0.3, seed=0):
    """A convolutional network without kinks, for 3x8x8 inputs and 5 classes."""
    torch.manual_seed(seed)
    with torch.device("cpu"):  # the same parameters on every device
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(128, 5),
        )
    return network.to(torch.get_default_device(), dtype)


def batch(dtype=torch.float64, samples=6, seed=1):
    """Inputs in [0, 1] and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, 3, 8, 8)
    inputs = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return inputs.to(torch.get_default_device(), dtype), torch.arange(samples) % 5


def random_state():
    """That of the CPU and of the device, in one vector."""
    states = [torch.get_rng_state()]
    if torch.get_default_device().type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


def gradient(model):
    """All parameter gradients in one vector, zero where there is none."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in gradients])


def linear(weight, bias=None):
    """A softmax classifier, whose gradients and distances are known; a row for each class."""
    weight = torch.as_tensor(weight)
    network = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype)
    network.weight.data.copy_(weight)
    network.bias.data.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias))
    return network


def pixels(samples, size, dtype=torch.float64, seed=0):
    """Vectors of pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, size, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)
