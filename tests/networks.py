"""Small networks for the tests of the engine."""

import torch
from torch import nn


def smooth(dtype=torch.float64, batch_norm=True, dropout=0.3, seed=0):
    """A convolutional network without kinks, for 3x8x8 inputs and 5 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(128, 5),
    ).to(dtype)


def batch(dtype=torch.float64, samples=6, seed=1):
    """Inputs in [0, 1] and targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.arange(samples) % 5


def gradient(model):
    """All parameter gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters()])
