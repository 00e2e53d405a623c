"""The examples: each step is what double backward gives, and each command runs."""

import importlib
from pathlib import Path

import double_backward
import pytest
import torch
from torch import nn
from torch.nn import functional as F

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradient(model, run):
    """What `run` adds to `.grad`, from the same random numbers every time."""
    model.zero_grad()
    torch.manual_seed(1)
    run()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_agreement(model, step, exact, *arguments):
    found = gradient(model, step)
    truth = gradient(model, lambda: exact(model, *arguments).backward())
    *rest, _ = arguments
    without = gradient(model, lambda: exact(model, *rest, 0.0).backward())
    assert (found - truth).norm() < 1e-3 * (truth - without).norm()  # of the penalty's share


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4))


def test_grad_align(float64):
    from grad_align import step

    model, inputs, targets = classifier(), torch.rand(6, 1, 3, 3), torch.arange(6) % 4
    batch = (inputs, inputs + 0.1, targets)
    assert_agreement(
        model,
        lambda: step(model, *batch, weight=5.0, eps=0.3),
        double_backward.grad_align,
        *(*batch, 0.3, 5.0),
    )


def test_grad_align_where_the_network_is_sure():
    from grad_align import GradAlign

    model, inputs = classifier(), torch.rand(6, 9)
    model[3].weight.data *= 1000
    targets = model(inputs).argmax(1)
    assert F.cross_entropy(model(inputs), targets) < 1e-6  # its gradient is as good as zero
    penalty = GradAlign(1.0, inputs, eps=0.3)
    first, exact = (
        gradient(model, lambda m=method: penalty(model, inputs, targets, method=m).backward())
        for method in ("first_order", "double_backward")
    )
    assert exact.norm() > 1e-3
    assert F.cosine_similarity(first, exact, dim=0) > 0.999


def test_r1(float64):
    from gan import R1, critic_network, r1_step

    torch.manual_seed(0)
    critic, (real, fake) = critic_network(3, width=16), torch.randn(2, 6, 3)
    assert_agreement(
        critic,
        lambda: r1_step(critic, real, fake, R1(20.0)),
        double_backward.r1,
        *(real, fake, 20.0),
    )


def test_wgan_gp(float64):
    from gan import WGANGP, critic_network, wgan_gp_step

    torch.manual_seed(0)
    critic, (real, fake) = critic_network(3, width=16), torch.randn(2, 6, 3)
    assert_agreement(
        critic,
        lambda: wgan_gp_step(critic, real, fake, WGANGP(10.0)),
        double_backward.wgan_gp,
        *(real, fake, 10.0),
    )


def test_force_matching(float64):
    from force_matching import EnergyNetwork, configurations, step

    torch.manual_seed(0)
    model, batch = EnergyNetwork(width=16), configurations(6)
    assert_agreement(
        model,
        lambda: step(model, *batch, 1.0),
        double_backward.force_matching,
        *(*batch, 1.0),
    )


def test_forces_are_those_of_morses_potential(float64):
    from force_matching import configurations, distances

    torch.manual_seed(0)
    positions, energies, forces = configurations(3)
    along = torch.randn_like(positions)

    def energy(step):
        stretch = distances(positions + step * along) - 1
        return (torch.exp(-4 * stretch) - 2 * torch.exp(-2 * stretch)).sum(1)

    torch.testing.assert_close(energies, energy(0))
    slope = (energy(1e-5) - energy(-1e-5)) / 2e-5
    torch.testing.assert_close(-(forces * along).sum(dim=(1, 2)), slope)


def test_contractive_autoencoder(float64):
    from contractive_autoencoder import Autoencoder, Contraction, step

    torch.manual_seed(0)
    model, inputs = Autoencoder(9, 5), torch.rand(6, 9)
    assert_agreement(
        model,
        lambda: step(model, inputs, Contraction(2.0)),
        double_backward.contractive_autoencoder,
        *(inputs, 2.0),
    )


def test_contraction_is_the_jacobians_norm_on_average(float64):
    from contractive_autoencoder import Autoencoder, Contraction

    torch.manual_seed(0)
    encoder, x = Autoencoder(9, 5).encoder, torch.rand(9)
    with torch.no_grad():
        estimate = Contraction(1.0)(encoder, x.expand(4000, 9), torch.zeros(4000))
    exact = torch.func.jacrev(encoder)(x).square().sum()
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0)


SHORT = {
    "contractive_autoencoder": ("--epochs", "1"),
    "force_matching": ("--steps", "5"),
    "gan": ("--steps", "5"),
    "grad_align": ("--epochs", "1"),
    "sgr": ("--epochs", "1"),
}


def test_every_example_is_run():
    frameworks = (Path(__file__).parent / "test_integrations.py").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in SHORT or path.stem in frameworks


@pytest.mark.parametrize("name", SHORT)
def test_command_runs(name, capsys):
    main = importlib.import_module(name).main
    main(SHORT[name])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4  # a title, a rule and two rows
    assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--seed" in capsys.readouterr().out
