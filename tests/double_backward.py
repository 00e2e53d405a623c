"""The losses of the examples, penalties included, in plain PyTorch: to be differentiated twice."""

import torch
from torch.nn import functional as F


def grad_align(model, inputs, adversarial, targets, eps, weight):
    gradients = []
    for point in (inputs, inputs + eps * (2 * torch.rand_like(inputs) - 1)):
        x = point.clone().requires_grad_()
        losses = F.cross_entropy(model(x), targets, reduction="none")
        gradients.append(input_gradient(losses, x))
    penalty = weight * (1 - F.cosine_similarity(*gradients)).mean()
    return F.cross_entropy(model(adversarial), targets) + penalty


def r1(critic, real, fake, gamma):
    x = real.clone().requires_grad_()
    outputs = critic(x)
    loss = F.softplus(-outputs).mean() + F.softplus(critic(fake)).mean()
    return loss + gamma / 2 * input_gradient(outputs, x).square().sum(1).mean()


def wgan_gp(critic, real, fake, weight):
    part = torch.rand(len(real), 1)
    x = (part * real + (1 - part) * fake).requires_grad_()
    lengths = input_gradient(critic(x), x).norm(dim=1)
    return critic(fake).mean() - critic(real).mean() + weight * (lengths - 1).square().mean()


def force_matching(model, positions, energies, forces, weight):
    x = positions.clone().requires_grad_()
    found = model(x)
    errors = -input_gradient(found, x) - forces.flatten(1)
    return F.mse_loss(found, energies) + weight * errors.square().sum(1).mean()


def contractive_autoencoder(model, inputs, weight):
    x = inputs.clone().requires_grad_()
    code = model.encoder(x)
    along = (code * torch.randn_like(code).sign()).sum(1)
    penalty = weight * input_gradient(along, x).square().sum(1).mean()
    return F.mse_loss(model(inputs), inputs) + penalty


def input_gradient(scalars, inputs):
    """Of each sample's scalar, (N, D), with a graph."""
    return torch.autograd.grad(scalars.sum(), inputs, create_graph=True)[0].flatten(1)
