"""SGR is what Roth et al. 2018 write: their identities, their uncentred term."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import robustkern
from robustkern import SGR, CovarianceFunction, FullCovariance, GradientPenalty

IMAGE = (2, 3, 4)
DIM = 24


def covariance(kind=FullCovariance):
    """With values of no special structure."""
    torch.manual_seed(0)
    found = FullCovariance(DIM) if kind is FullCovariance else CovarianceFunction(*IMAGE)
    found.update(torch.randn(9, *IMAGE).cumsum(3))
    return found


def batch(samples=6, classes=5):
    torch.manual_seed(1)
    return torch.randn(samples, *IMAGE, dtype=torch.float64), torch.arange(samples) % classes


def linear():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(DIM, 5)).double()


def deep():
    torch.manual_seed(3)
    layers = nn.Flatten(), nn.Linear(DIM, 16), nn.Tanh(), nn.Linear(16, 5)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", [FullCovariance, CovarianceFunction])
def test_one_layer_softmax_classifier_is_eq_20(kind):
    model, (x, y) = linear(), batch()
    sigma = covariance(kind)
    weights = model[1].weight
    difference = weights[y] - torch.softmax(model(x), 1) @ weights  # w_y - <w>
    expected = 0.5 * ((difference @ sigma.dense().double()) * difference).sum(1).mean()
    penalty = SGR(1.0, sigma, source=None)(model, x, y)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=0)
    wrong = 0.5 * ((weights[y] @ sigma.dense().double()) * weights[y]).sum(1).mean()
    assert not torch.isclose(penalty, wrong, rtol=1e-3)


def test_logit_form_is_eq_13():
    model, (x, y) = deep(), batch()
    sigma = covariance()
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    gradients = torch.stack(
        [torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)[0] for k in range(5)], 1
    ).flatten(2)  # (N, classes, D)
    mean = torch.einsum("nk,nkd->nd", torch.softmax(logits, 1), gradients)
    difference = gradients[torch.arange(len(y)), y] - mean
    expected = 0.5 * ((difference @ sigma.dense().double()) * difference).sum(1).mean()
    found = SGR(1.0, sigma, source=None)(model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_the_identity_gives_gn():
    model, (x, y) = deep(), batch()
    identity = CovarianceFunction(*IMAGE)
    identity.values[range(2), range(2), IMAGE[1] - 1, IMAGE[2] - 1] = 1.0
    found = SGR(0.8, identity, source=None)(model, x, y)
    torch.testing.assert_close(found, GradientPenalty(0.4, p=2, power=2)(model, x, y))


def test_standardized_weight_does_not_depend_on_the_scale_of_the_perturbations():
    model, (x, y) = deep(), batch()
    values = []
    for scale in (1.0, 100.0):
        sigma = CovarianceFunction(*IMAGE).standardize(0.1)
        sigma.update(scale * torch.randn(9, *IMAGE, generator=torch.Generator().manual_seed(5)))
        values.append(SGR(1.0, sigma, source=None)(model, x, y))
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [FullCovariance, CovarianceFunction])
def test_the_uncentred_term_is_eq_12(kind):
    model, (x, y) = deep(), batch()
    noise = [0.3 + torch.randn(6, *IMAGE, dtype=torch.float64) for _ in range(2)]
    draws = iter(noise)
    sigma = covariance(kind)
    penalty = SGR(2.0, sigma, source=lambda inputs, gradient: next(draws), mean=True)
    for _ in range(2):
        found = penalty(model, x, y)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    means = [draw.flatten(1).mean(0) for draw in noise]
    mu = 0.9 * means[0] + 0.1 * means[1]  # the paper's running average
    expected = 2 * ((g.flatten(1) @ mu).mean() + 0.5 * sigma.form(g).mean())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=0)
    centred = 2 * 0.5 * sigma.form(g).mean()
    assert not torch.isclose(found, centred, rtol=1e-3)


def test_the_uncentred_term_is_standardized_with_the_covariance():
    model, (x, y) = deep(), batch()
    values = []
    for scale in (1.0, 100.0):
        draw = scale * (1 + torch.randn(6, *IMAGE, generator=torch.Generator().manual_seed(5)))
        sigma = CovarianceFunction(*IMAGE).standardize(0.1)
        penalty = SGR(1.0, sigma, source=lambda inputs, gradient, draw=draw: draw, mean=True)
        values.append(penalty(model, x, y))
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)


def test_first_order_follows_the_uncentred_term():
    model, (x, y) = deep(), batch()
    parameters = list(model.parameters())
    gradients = []
    for first_order in (True, False):
        penalty = SGR(0.5, covariance(), mean=True)
        model.zero_grad()
        if first_order:
            robustkern.backward(model, x, y, penalty)
        else:
            (F.cross_entropy(model(x), y) + penalty(model, x, y)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    first, exact = gradients
    assert (first - exact).norm() < 1e-5 * exact.norm()


def test_an_overflow_is_left_out_and_a_checkpoint_resumes():
    penalty = SGR(1.0, covariance(), mean=True)
    x, g = torch.zeros(2, *IMAGE), torch.ones(2, *IMAGE)
    penalty.points(x, g)
    before = {name: value.clone() for name, value in penalty.state_dict().items()}
    penalty.points(x, g * torch.inf * 0)
    for name in ("covariance.values", "covariance.updates", "mean.values"):
        assert torch.equal(penalty.state_dict()[name], before[name])
    other = SGR(1.0, FullCovariance(DIM), mean=True)
    other.load_state_dict(penalty.state_dict())
    for one in (penalty, other):
        one.points(x, 2 * g.cumsum(0))
    assert torch.equal(penalty.mean.values, other.mean.values)
    assert torch.equal(penalty.covariance.values, other.covariance.values)


def test_mean_must_be_a_bool():
    with pytest.raises(TypeError, match=r"^SGR: mean must be a bool, got float$"):
        SGR(1.0, covariance(), mean=0.5)
