"""SPSA: gradients from outputs."""

import pytest
import torch
from torch import nn

from robustkern.evaluation import pgd, spsa
from robustkern.evaluation.attacks import _margin
from robustkern.evaluation.spsa import _slope


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4)).double()
    inputs = 0.2 + 0.6 * torch.rand(6, 3, 2, 2, dtype=torch.float64)
    return model, inputs, model(inputs).argmax(1)


def estimate(model, inputs, targets, directions, chunk, seed=0, delta=1e-3):
    generator = torch.Generator(inputs.device).manual_seed(seed)
    with torch.no_grad():
        return _slope(model, inputs, targets, directions, delta, chunk, generator)


@pytest.mark.parametrize("chunk", [2, 10, 64, 100000])
def test_the_estimate_is_the_mean_over_its_directions(chunk):
    model, inputs, targets = network()
    batches = []
    hook = model.register_forward_pre_hook(lambda module, given: batches.append(given[0]))
    found = estimate(model, inputs, targets, 7, chunk)
    hook.remove()
    assert all(len(batch) == chunk // 2 * 2 for batch in batches[:-1])
    assert sum(len(batch) for batch in batches) == 2 * 7 * 6
    plus = torch.cat([batch[: len(batch) // 2] for batch in batches])
    minus = torch.cat([batch[len(batch) // 2 :] for batch in batches])
    labels = targets.repeat_interleave(7)
    rise = (_margin(model(plus), labels) - _margin(model(minus), labels)).detach()
    shift = (plus - minus) / 2
    torch.testing.assert_close(shift.abs(), torch.full_like(shift, 1e-3))
    each = rise.view(-1, 1, 1, 1) * shift.sign() / 2e-3
    expected = each.view(6, 7, *inputs.shape[1:]).mean(1)
    torch.testing.assert_close(found, expected)
    assert len({tuple(row) for row in shift.flatten(1).sign().tolist()}) > 35


def test_the_estimate_nears_the_gradient():
    model, inputs, targets = network()
    point = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_margin(model(point), targets).sum(), point)
    found = estimate(model, inputs, targets, 4000, 4096)
    error = (found - gradient).norm() / gradient.norm()
    # The other elements' noise: sqrt((D - 1) / directions).
    assert error < 1.3 * (11 / 4000) ** 0.5


def test_it_crosses_a_linear_boundary_just_beyond_its_distance():
    torch.manual_seed(0)
    model = nn.Linear(10, 2)
    inputs = 0.4 + 0.2 * torch.rand(10, 10)
    slope = (model.weight[1] - model.weight[0]).detach()
    model.bias.data = torch.stack([(inputs @ slope).median() + 0.02, torch.tensor(0.0)])
    targets = model(inputs).argmax(1)
    distance = (_margin(model(inputs), targets) / slope.norm(1)).detach()
    for one, label, radius in zip(inputs, targets, distance, strict=True):
        for factor, right in ((0.98, True), (1.03, False)):
            found = spsa(model, one[None], label[None], factor * radius.item(), steps=60)
            assert (model(found).argmax(1) == label).item() == right


class Masked(nn.Module):
    """A network whose gradients vanish."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model((inputs * 255).round() / 255)


def test_it_breaks_a_network_that_hides_its_gradients():
    model, inputs, targets = network()
    masked = Masked(model)
    assert torch.equal(pgd(masked, inputs, targets, 0.3, random_start=False), inputs)
    found = spsa(masked, inputs, targets, 0.3, delta=0.05, steps=100)
    broken = masked(found).argmax(1) != targets
    white_box = model(pgd(model, inputs, targets, 0.3)).argmax(1) != targets
    assert white_box.any()
    assert broken.sum() >= white_box.sum()


class Coarse(nn.Module):
    """Logits of half a unit, of which two often tie."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return (2 * self.model(inputs)).round() / 2


def test_a_sample_whose_logits_tie_is_attacked_on():
    model, inputs, _ = network()
    model[3].bias.data[0] += 0.3
    coarse = Coarse(model)
    targets = torch.zeros(6, dtype=torch.int64)
    outputs = coarse(inputs)
    assert ((_margin(outputs, targets) == 0) & (outputs.argmax(1) == 0)).any()
    found = coarse(spsa(coarse, inputs, targets, 0.5, delta=0.2, step_size=0.1))
    assert (found.argmax(1) != 0).sum() >= 5
