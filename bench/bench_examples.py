"""What a step of each example costs in plain steps, beside the same step by double backward."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent


def grad_align():
    """The attack that FGSM-RS trains on is made beforehand."""
    import double_backward
    from grad_align import network, step

    layers = (nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in network(32))
    model = nn.Sequential(*layers)  # without kinks, for both gradients to agree
    inputs, adversarial = torch.rand(2, 128, 1, 16, 16)
    batch = (inputs, adversarial, torch.randint(10, (128,)))
    return (
        "N=128, 1x16x16",
        model,
        lambda: F.cross_entropy(model(adversarial), batch[2]),
        lambda: step(model, *batch, weight=1.0, eps=0.4),
        lambda: double_backward.grad_align(model, *batch, 0.4, 1.0),
    )


def r1():
    import double_backward
    from gan import R1, critic_network, r1_step

    critic, (real, fake) = critic_network(64, width=512), torch.randn(2, 256, 64)
    return (
        "N=256 real and 256 generated, 64",
        critic,
        lambda: F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean(),
        lambda: r1_step(critic, real, fake, R1(0.1)),
        lambda: double_backward.r1(critic, real, fake, 0.1),
    )


def wgan_gp():
    import double_backward
    from gan import WGANGP, critic_network, wgan_gp_step

    critic, (real, fake) = critic_network(64, width=512), torch.randn(2, 256, 64)
    return (
        "N=256 real and 256 generated, 64",
        critic,
        lambda: critic(fake).mean() - critic(real).mean(),
        lambda: wgan_gp_step(critic, real, fake, WGANGP(1.0)),
        lambda: double_backward.wgan_gp(critic, real, fake, 1.0),
    )


def force_matching():
    import double_backward
    from force_matching import EnergyNetwork, configurations, step

    model, batch = EnergyNetwork(width=512), configurations(256)
    positions, energies, _ = batch
    return (
        "N=256, 4 atoms",
        model,
        lambda: F.mse_loss(model(positions), energies),
        lambda: step(model, *batch, 0.1),
        lambda: double_backward.force_matching(model, *batch, 0.1),
    )


def contractive_autoencoder():
    import double_backward
    from contractive_autoencoder import Autoencoder, Contraction, step

    model, inputs = Autoencoder(784, 512), torch.rand(256, 784)
    return (
        "N=256, 784",
        model,
        lambda: F.mse_loss(model(inputs), inputs),
        lambda: step(model, inputs, Contraction(0.003)),
        lambda: double_backward.contractive_autoencoder(model, inputs, 0.003),
    )


EXAMPLES = [grad_align, r1, wgan_gp, force_matching, contractive_autoencoder]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_example(example, compare, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("the examples run on the CPU")
    for folder in ("examples", "tests"):
        monkeypatch.syspath_prepend(ROOT / folder)
    torch.manual_seed(0)
    size, model, loss, step, exact = example()

    def method(run):
        def from_zero():
            model.zero_grad()
            run()

        return from_zero

    methods = {
        "plain": method(lambda: loss().backward()),
        "first order": method(step),
        "double backward": method(lambda: exact().backward()),
    }

    def gradient(name):
        torch.manual_seed(1)
        methods[name]()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, first, double = map(gradient, methods)  # correct, before the clock starts
    assert F.cosine_similarity(first - plain, double - plain, dim=0) > 0.999
    compare(
        f"example|{example.__name__}|{size}|float32|cpu",
        methods,
        baseline="plain",
        rounds=50,
    )
