"""The attack by long-range-correlated noise."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustkern import CovarianceFunction
from robustkern.evaluation import lrc, lrc_accuracy

IMAGE = (2, 5, 6)


class Counting(nn.Module):
    """Dropout that ignores eval mode, batch norm, what it was given, and an error at one call."""

    def __init__(self, fail_at=None):
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.BatchNorm2d(2)
        self.linear = nn.Linear(60, 3)
        self.seen, self.fail_at = [], fail_at

    def forward(self, inputs):
        self.seen.append(inputs)
        if len(self.seen) == self.fail_at:
            raise RuntimeError("broken model")
        hidden = self.norm(inputs).flatten(1)
        return self.linear(F.dropout(hidden, 0.1, training=True))


def batch(samples=40):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(samples, *IMAGE, generator=generator, device="cpu")
    return inputs.to(torch.get_default_device()), torch.arange(samples) % 3


def classifier(scale=1.0):
    """Linear, with a margin for every sample of `batch` at its own prediction."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 3))
    model[1].weight.data.mul_(scale)
    return model


def predictions(model, inputs):
    with torch.no_grad():
        return model(inputs).argmax(1)


def first_draws(inputs, eps, decay_length, draws, seed=0):
    """What the attack tries while no sample is broken."""
    noise = CovarianceFunction.exponential(*IMAGE, decay_length).to(inputs.device)
    generator = torch.Generator(inputs.device).manual_seed(seed)
    samples = [noise.sample(len(inputs), generator).to(inputs) for _ in range(draws)]
    return torch.stack([(inputs + eps * xi).clamp(0, 1) for xi in samples])


def test_where_nothing_breaks_the_draw_of_highest_loss_is_returned():
    inputs, _ = batch()
    model = classifier()
    targets = predictions(model, inputs)
    model[1].bias.data.zero_()
    keep = model(inputs).topk(2).values.diff().abs().flatten() > 0.25
    inputs, targets = inputs[keep], targets[keep]
    assert len(inputs) > 3
    tried = first_draws(inputs, 0.02, 3.0, 7)
    losses = torch.stack([F.cross_entropy(model(x), targets, reduction="none") for x in tried])
    expected = tried[losses.argmax(0), torch.arange(len(inputs))]
    found = lrc(model, inputs, targets, 0.02, decay_length=3.0, draws=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(set(losses.argmax(0).tolist())) > 1


def test_passes_are_full_and_the_first_draw_that_breaks_a_sample_is_returned():
    inputs, _ = batch()
    model = classifier(0.3)  # of so little confidence that a right answer may have the higher loss
    targets = predictions(model, inputs)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = lrc(model, inputs, targets, 0.3, draws=20)
    hook.remove()
    sizes = [len(given) for given in seen[1:]]  # the first pass is the clean one
    assert all(size == 40 for size in sizes[:-1])
    assert 40 < sum(sizes) < 20 * 40
    right = predictions(model, found) == targets
    assert 0 < right.sum() < 30
    draws = torch.cat(seen[1:])
    place = (found.flatten(1)[:, None] == draws.flatten(1)).all(2).int().argmax(1)
    assert torch.equal(found, draws[place])
    queue = torch.arange(40).repeat(20)
    before = []
    for pass_ in seen[1:]:
        before.append(queue[: len(pass_)])
        broken = predictions(model, pass_) != targets[before[-1]]
        queue = queue[len(pass_) :]
        queue = queue[~torch.isin(queue, before[-1][broken])]
    owner = torch.cat(before)
    wrong = predictions(model, draws) != targets[owner]
    for sample in range(40):
        own = (owner == sample).nonzero().flatten()
        if right[sample]:
            assert len(own) == 20
            assert not wrong[own].any()
        else:
            assert place[sample] == own[wrong[own]][0]


def test_wrong_samples_are_left_as_they_are():
    inputs, _ = batch()
    model = classifier()
    targets = (predictions(model, inputs) + 1) % 3
    assert torch.equal(lrc(model, inputs, targets, 0.3, draws=5), inputs)


def test_noise_has_its_strength_its_length_and_stays_in_range():
    inputs = torch.full((400, 1, 9, 9), 0.5)
    targets = torch.zeros(400, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 2))
    for length in (1.0, 4.0):
        xi = lrc(model, inputs, targets, 0.02, decay_length=length, draws=1) - 0.5
        torch.testing.assert_close(xi.std(), torch.tensor(0.02), rtol=0.1, atol=0)
        neighbours = (xi[..., 1:] * xi[..., :-1]).mean() / xi.square().mean()
        expected = torch.tensor(-1 / length).exp()
        torch.testing.assert_close(neighbours, expected, rtol=0, atol=0.05)
    wide = lrc(model, inputs, targets, 5.0, draws=2)
    assert (wide.min(), wide.max()) == (0, 1)


def test_a_covariance_takes_the_place_of_the_decay_length():
    inputs, targets = batch()
    model = classifier()
    same = CovarianceFunction.exponential(*IMAGE, 2.0).to(inputs.device)
    found = lrc(model, inputs, targets, 0.2, covariance=same, draws=4)
    expected = lrc(model, inputs, targets, 0.2, decay_length=2.0, draws=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    data = CovarianceFunction(*IMAGE, unbiased=False).standardize(1.0).to(inputs.device)
    data.update(inputs - inputs.mean(0))
    other = lrc(model, inputs, targets, 0.2, covariance=data, draws=4)
    assert not torch.equal(other, expected)


def test_draws_are_seeded():
    inputs, targets = batch()

    def found(seed):
        generator = None if seed is None else torch.Generator(inputs.device).manual_seed(seed)
        return lrc(classifier(), inputs, targets, 0.2, draws=3, generator=generator)

    assert torch.equal(found(None), found(0))
    assert not torch.equal(found(0), found(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    inputs, targets = batch()
    found = lrc(classifier().to(dtype), inputs.to(dtype), targets, 0.2, draws=3)
    assert found.dtype == dtype
    assert not torch.equal(found, inputs.to(dtype))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was_found(fails):
    inputs, _ = batch()
    model = Counting().train()
    targets = predictions(model.eval(), inputs)
    model.train()
    model.seen, model.fail_at = [], 3 if fails else None
    inputs.requires_grad_()
    model.linear.bias.requires_grad_(False)
    model.linear.weight.grad = torch.full((3, 60), 7.0)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match=r"^broken model$"):
            lrc(model, inputs, targets, 0.02, draws=4)
    else:
        lrc(model, inputs, targets, 0.02, draws=4)
    assert len(model.seen) > 2
    assert model.training
    assert model.norm.training
    assert [p.requires_grad for p in model.linear.parameters()] == [True, False]
    assert inputs.requires_grad
    assert inputs.grad is None
    assert (model.linear.weight.grad == 7).all()
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_nothing_to_do():
    inputs, targets = batch()
    model = classifier()
    assert torch.equal(lrc(model, inputs, targets, 0.0, draws=2), inputs)
    assert lrc(model, inputs[:0], targets[:0], 0.1).shape == (0, *IMAGE)


BAD = {
    "flat": (ValueError, "inputs must be (N, C, H, W), got (40, 60)"),
    "draws": (ValueError, "draws must be at least 1, got 0"),
    "eps": (ValueError, "eps must be finite and not negative, got -0.1"),
    "covariance": (TypeError, "covariance must be a CovarianceFunction, got str"),
    "size": (
        ValueError,
        "inputs must be (N, C, H, W) with (C, H, W) = (1, 5, 6), the covariance's, "
        "got (40, 2, 5, 6)",
    ),
    "outputs": (TypeError, "model must return a tensor, got tuple"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    inputs, targets = batch()
    model, eps, options = classifier(), 0.1, {}
    if case == "flat":
        inputs = inputs.flatten(1)
    elif case == "draws":
        options = {"draws": 0}
    elif case == "eps":
        eps = -0.1
    elif case == "covariance":
        options = {"covariance": "data"}
    elif case == "size":
        options = {"covariance": CovarianceFunction.exponential(1, 5, 6, 2.0)}
    else:

        class Pair(nn.Flatten):
            def forward(self, inputs):
                return super().forward(inputs), None

        model = Pair()
    kind, message = BAD[case]
    with pytest.raises(kind, match=f"^{re.escape(f'lrc: {message}')}$"):
        lrc(model, inputs, targets, eps, **options)


def test_a_covariance_that_is_not_positive_semidefinite_is_named():
    inputs, targets = batch()
    wrong = CovarianceFunction(*IMAGE)
    wrong.values.fill_(-1.0)
    with pytest.raises(ValueError, match=r"^CovarianceFunction.sample: .* positive semidefinite"):
        lrc(classifier(), inputs, targets, 0.1, covariance=wrong)


def test_accuracy_falls_with_eps_and_with_draws():
    inputs, _ = batch(200)
    model = classifier(2.0)
    targets = predictions(model, inputs)
    covariance = CovarianceFunction.exponential(*IMAGE, 4.0).to(inputs.device)
    seen = []
    found = lrc_accuracy(
        model, inputs, targets, [0.0, 0.05, 0.4], [1.0, 4.0, covariance],
        draws=10, batch_size=64, advance=seen.append,
    )  # fmt: skip
    assert [len(row) for row in found] == [3, 3, 3]
    for row in found:
        assert row[0] == 1
        assert row[0] > row[1] > row[2]
    assert found[1] == found[2]
    assert found[0] != found[1]
    assert sum(seen) == 200 * 9
    once = lrc_accuracy(model, inputs, targets, [0.4], [1.0], draws=1)
    assert once[0][0] > found[0][2]
