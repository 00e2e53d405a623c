"""What a covariance function can be made into, and drawn from (Roth et al. 2018)."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkern import CovarianceFunction, FullCovariance, functional, reference

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


def smooth_images(samples, channels, height, width, seed=0):
    """Images whose neighbouring pixels are alike, as those of perturbations are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, channels, height, width, generator=generator, device="cpu")
    images = noise.cumsum(2).cumsum(3)
    return (images / images.abs().amax()).to(torch.get_default_device())


def least_eigenvalue(covariance):
    """Of Sigma, over the largest in magnitude."""
    sigma = covariance.dense().double()
    eigenvalues = torch.linalg.eigvalsh((sigma + sigma.T) / 2)
    return (eigenvalues.min() / eigenvalues.abs().max().clamp_min(1e-30)).item()


MAKE = {
    "biased": lambda size: CovarianceFunction(*size, unbiased=False),
    "projected": lambda size: CovarianceFunction(*size).project(),
    "isotropic, projected": lambda size: CovarianceFunction(*size, isotropic=True).project(),
    "tapered": lambda size: CovarianceFunction(*size, unbiased=False).taper(2.5),
    "projected, tapered": lambda size: CovarianceFunction(*size).taper(3.0).project(),
    "standardized": lambda size: CovarianceFunction(*size, unbiased=False).standardize(0.3),
}


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=25, deadline=None)
@given(size=SIZES, samples=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_what_claims_to_be_positive_semidefinite_is(name, size, samples, seed):
    covariance = MAKE[name](size)
    for step in range(2):
        covariance.update(smooth_images(samples, *size, seed=seed + step))
    assert least_eigenvalue(covariance) >= -2e-6


@settings(max_examples=25, deadline=None)
@given(size=SIZES, decay_length=st.floats(0.1, 100), cross=st.floats(-0.5, 1))
def test_exponential_noise_is_positive_semidefinite(size, decay_length, cross):
    assert least_eigenvalue(CovarianceFunction.exponential(*size, decay_length, cross)) >= -2e-6


def test_neither_the_unbiased_nor_a_rounded_covariance_is():
    """So the properties above can fail."""
    unbiased = CovarianceFunction(1, 7, 7)
    unbiased.update(smooth_images(2, 1, 7, 7))
    assert least_eigenvalue(unbiased) < -1e-2
    rounded = CovarianceFunction(1, 16, 16)
    y, x = (torch.arange(-15, 16).float() for _ in range(2))
    rounded.values.copy_(torch.exp(-torch.hypot(y[:, None], x).round() / 8))
    assert least_eigenvalue(rounded) < -1e-3
    exact = CovarianceFunction.exponential(1, 16, 16, 8.0)
    assert least_eigenvalue(exact) > 0


def test_exponential_has_exact_lengths_and_the_correlation_of_channels():
    noise = CovarianceFunction.exponential(2, 4, 5, decay_length=3.0, cross=0.25)
    sigma = noise.dense()
    pixels = torch.tensor([(y, x) for y in range(4) for x in range(5)]).float()
    within = torch.exp(-torch.cdist(pixels, pixels) / 3.0)
    expected = torch.kron(torch.tensor([[1.0, 0.25], [0.25, 1.0]]), within)
    torch.testing.assert_close(sigma, expected)


def test_projection_takes_the_negative_parts_of_the_spectrum_and_no_more():
    covariance = CovarianceFunction(1, 4, 5)
    covariance.update(smooth_images(2, 1, 4, 5))
    before = torch.fft.fft2(covariance.values.roll((-3, -4), (2, 3)).double()).real
    after = torch.fft.fft2(covariance.project().values.roll((-3, -4), (2, 3)).double()).real
    assert before.min() < -0.1
    torch.testing.assert_close(after, before.clamp(min=0), rtol=1e-5, atol=1e-5)


def test_projection_leaves_what_is_positive_and_what_was_projected():
    positive = CovarianceFunction(2, 4, 5, unbiased=False)
    positive.update(smooth_images(2, 2, 4, 5))
    # The spectrum of the padded images: positive already.
    torch.testing.assert_close(positive.values, copy.deepcopy(positive).project().values)
    projected = CovarianceFunction(2, 4, 5)
    projected.update(smooth_images(2, 2, 4, 5))
    projected.project()
    again = CovarianceFunction(2, 4, 5)
    again.values.copy_(projected.values)
    torch.testing.assert_close(again.project().values, projected.values)


def test_taper_is_wendlands_function_and_the_product_a_short_one(monkeypatch):
    covariance = CovarianceFunction(2, 9, 8)
    covariance.update(smooth_images(3, 2, 9, 8))
    before = covariance.values.clone()
    covariance.taper(2.5)
    y, x = torch.arange(-8, 9).float(), torch.arange(-7, 8).float()
    r = (torch.hypot(y[:, None], x) / 2.5).clamp(max=1)
    torch.testing.assert_close(covariance.values, before * (1 - r) ** 4 * (4 * r + 1))
    g = smooth_images(3, 2, 9, 8, seed=4)
    rows = g.flatten(1)
    product = rows @ covariance.dense().T
    torch.testing.assert_close(covariance.product(g).flatten(1), product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(covariance.form(g), (rows * product).sum(1), rtol=1e-4, atol=1e-4)
    shapes = []
    whole = functional.covariance_product
    monkeypatch.setattr(
        functional, "covariance_product", lambda g, k: shapes.append(k.shape) or whole(g, k)
    )
    covariance.product(g)
    assert shapes == [(2, 2, 5, 5)]


def test_changes_stay_in_force_for_later_updates():
    changed = CovarianceFunction(2, 5, 6, decay=0.5).standardize(0.7).taper(3.0)
    plain = CovarianceFunction(2, 5, 6, decay=0.5)
    for seed in range(3):
        for covariance in (changed, plain):
            covariance.update(smooth_images(2, 2, 5, 6, seed=seed))
        mean = changed.values[..., 4, 5].diagonal().mean()
        torch.testing.assert_close(mean, torch.tensor(0.7))
    torch.testing.assert_close(changed.average, plain.values)
    torch.testing.assert_close(changed.values, plain.taper(3.0).standardize(0.7).values)
    torch.testing.assert_close(changed.dense().diagonal().mean(), torch.tensor(0.7))


def test_isotropic_is_the_mean_over_equal_rounded_lengths():
    images = smooth_images(2, 2, 4, 5)
    covariance = CovarianceFunction(2, 4, 5, isotropic=True)
    covariance.update(images)
    plain = functional.autocovariance(images)
    lengths = torch.hypot(torch.arange(-3, 4).float()[:, None], torch.arange(-4, 5).float()).round()
    for length in lengths.unique():
        ring = lengths == length
        mean = plain[..., ring].mean(-1)
        expected = ((mean + mean.T) / 2)[..., None].expand(2, 2, int(ring.sum()))
        torch.testing.assert_close(covariance.values[..., ring], expected)
    torch.testing.assert_close(covariance.values, reference.transpose_covariance(covariance.values))


@pytest.mark.parametrize("kind", ["periodic", "longer period", "cholesky"])
def test_samples_have_the_covariance(kind):
    noise = CovarianceFunction.exponential(2, 5, 4, 2.0 if kind == "periodic" else 6.0)
    if kind == "cholesky":  # nothing is known of what lies further out
        other = CovarianceFunction(2, 5, 4)
        other.values.copy_(noise.values)
        noise = other
    generator = torch.Generator().manual_seed(0)
    draws = noise.sample(40_001, generator)
    assert draws.shape == (40_001, 2, 5, 4)
    rows = draws.double().flatten(1)
    assert rows.mean(0).abs().max() < 0.03
    sigma = noise.dense().double()
    torch.testing.assert_close(rows.T @ rows / len(rows), sigma, rtol=0, atol=0.04)
    again = noise.sample(40_001, torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    factor = noise._sampling_factor()
    assert factor.is_complex() == (kind != "cholesky")
    assert (factor.shape[-1] > 7) == (kind != "periodic")


def test_long_noise_on_large_images_and_in_inference_mode():
    noise = CovarianceFunction.exponential(3, 48, 48, 16.0)
    assert noise.sample(2).shape == (2, 3, 48, 48)
    with torch.inference_mode():
        inner = CovarianceFunction.exponential(1, 6, 6, 2.0)
        assert inner.sample(3).isfinite().all()


def test_standardized_exponential_noise_is_still_continued():
    noise = CovarianceFunction.exponential(1, 65, 65, 40.0).standardize(0.25)
    draws = noise.sample(200, torch.Generator().manual_seed(0))
    assert draws.square().mean().item() == pytest.approx(0.25, rel=0.1)
    doubled = CovarianceFunction.exponential(1, 65, 65, 40.0)
    same = doubled.sample(2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        noise.sample(2, torch.Generator().manual_seed(0)), 0.5 * same, rtol=1e-3, atol=1e-4
    )


def test_only_standardize_makes_the_noise_larger():
    covariance = CovarianceFunction(1, 6, 6)
    covariance.update(torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert covariance.project().amplitude() == 1
    assert covariance.taper(3.0).amplitude() == 1
    before = covariance.values[0, 0, 5, 5].item()
    assert covariance.standardize(4 * before).amplitude().item() == pytest.approx(2)


def test_a_dense_matrix_is_a_copy():
    full = FullCovariance(3)
    full.update(torch.eye(3))
    dense = full.dense()
    before = dense.clone()
    full.update(5 * torch.eye(3))
    assert torch.equal(dense, before)


def test_samples_of_a_covariance_without_symmetry_under_reflection():
    """So that a displacement and its opposite are told apart."""
    images = smooth_images(4, 2, 4, 3)
    images[:, 1, :, 1:] = images[:, 0, :, :-1]  # channel 1 is channel 0 moved by a pixel
    covariance = CovarianceFunction(2, 4, 3, unbiased=False)
    covariance.update(images)
    rows = covariance.sample(60_000, torch.Generator().manual_seed(1)).double().flatten(1)
    found, sigma = rows.T @ rows / len(rows), covariance.dense().double()
    torch.testing.assert_close(found, sigma, rtol=0, atol=5e-3)
    wrong = sigma.view(2, 12, 2, 12).transpose(0, 2).reshape(24, 24)
    assert (found - wrong).abs().max() > 2e-2


def test_samples_follow_an_update():
    covariance = CovarianceFunction(1, 3, 3, decay=1.0, unbiased=False)
    covariance.update(torch.ones(2, 1, 3, 3))
    covariance.sample(3)
    covariance.update(4 * torch.ones(2, 1, 3, 3))
    assert covariance.sample(4000, torch.Generator().manual_seed(0)).std() == pytest.approx(
        4, rel=0.1
    )
    assert covariance.sample(0).shape == (0, 1, 3, 3)


@pytest.mark.parametrize("decay_length", [2.0, 5.0, 8.0])
def test_decay_length_is_that_of_the_exponential(decay_length):
    noise = CovarianceFunction.exponential(3, 33, 32, decay_length)
    assert noise.decay_length() == pytest.approx(decay_length, rel=0.03)
    radii, values = noise.profile()
    assert values.shape == (3, 3, len(radii))
    near = radii < 20
    expected = torch.exp(-radii / decay_length)
    torch.testing.assert_close(values[0, 0][near], expected[near], rtol=0.03, atol=1e-3)
    torch.testing.assert_close(values[0, 1], values[0, 0] / 2)


def test_decay_length_of_what_does_not_decay_and_of_white_noise():
    constant = CovarianceFunction(1, 5, 5)
    constant.values.fill_(2.0)
    assert constant.decay_length() == math.inf
    white = CovarianceFunction(1, 5, 5)
    white.values[..., 4, 4] = 1.0
    assert 0 < white.decay_length() < 1


def test_values_stay_float32_in_models_of_other_precision():
    for make in (lambda: CovarianceFunction(2, 3, 4), lambda: FullCovariance(24)):
        covariance = make()
        covariance.update(smooth_images(5, 2, 3, 4))
        values = covariance.values.clone()
        for changed in (covariance.half(), covariance.bfloat16(), covariance.double()):
            assert changed.values.dtype == torch.float32
            assert torch.equal(changed.values, values)
        assert covariance.updates.dtype == torch.int64
        duplicate = copy.deepcopy(covariance)
        duplicate.update(smooth_images(5, 2, 3, 4, seed=1))
        assert torch.equal(covariance.values, values)
        assert covariance.to("meta").values.is_meta


def test_changed_covariances_are_saved_and_loaded():
    def make():
        return CovarianceFunction(1, 4, 4, decay=0.5).taper(2.0).standardize()

    covariance = make()
    covariance.update(smooth_images(2, 1, 4, 4))
    other = make()
    other.load_state_dict(covariance.state_dict())
    for one in (covariance, other):
        one.update(smooth_images(2, 1, 4, 4, seed=1))
    assert torch.equal(covariance.values, other.values)


def test_a_batch_that_is_not_finite_is_refused_or_left_out():
    bad = smooth_images(2, 1, 3, 3)
    bad[0, 0, 0, 0] = torch.nan
    for covariance in (CovarianceFunction(1, 3, 3), FullCovariance(9)):
        covariance.update(smooth_images(2, 1, 3, 3))
        values = covariance.values.clone()
        name = type(covariance).__name__
        message = (
            f"^{name}.update: perturbation must be finite, "
            "got 2 samples with NaN or infinity among them$"
        )
        with pytest.raises(ValueError, match=message):
            covariance.update(bad)
        covariance.update(bad, strict=False)
        assert torch.equal(covariance.values, values)
        assert covariance.updates == 1


@pytest.mark.parametrize("method", ["product", "form"])
def test_a_covariance_without_values_has_no_product(method):
    for covariance in (CovarianceFunction(1, 3, 3), FullCovariance(9).half()):
        name = type(covariance).__name__
        message = f"^{name}.{method}: the covariance must be updated first, got none so far$"
        with pytest.raises(ValueError, match=message):
            getattr(covariance, method)(torch.ones(2, 1, 3, 3))
        fresh = copy.deepcopy(covariance)
        fresh.load_state_dict(covariance.state_dict())
        with pytest.raises(ValueError, match=message):
            getattr(fresh, method)(torch.ones(2, 1, 3, 3))
        covariance.update(torch.ones(2, 1, 3, 3))
        getattr(covariance, method)(torch.ones(2, 1, 3, 3))
        fresh.load_state_dict(covariance.state_dict())
        getattr(fresh, method)(torch.ones(2, 1, 3, 3))
        getattr(copy.deepcopy(fresh), method)(torch.ones(2, 1, 3, 3))


FUNCTION = CovarianceFunction(1, 3, 3)
NOISE = CovarianceFunction.exponential
BAD = [
    (lambda: FUNCTION.taper(-1), ValueError, "CovarianceFunction.taper: radius must be positive"),
    (lambda: FUNCTION.taper("1"), TypeError, "CovarianceFunction.taper: radius must be a number"),
    (
        lambda: FUNCTION.standardize(0.0),
        ValueError,
        "CovarianceFunction.standardize: variance must",
    ),
    (
        lambda: NOISE(1, 3, 3, -2.0),
        ValueError,
        "CovarianceFunction.exponential: decay_length must be positive and finite, got -2.0",
    ),
    (
        lambda: NOISE(3, 3, 3, 2.0, cross=-0.6),
        ValueError,
        r"CovarianceFunction.exponential: cross must be in \[-0.5, 1\], got -0.6",
    ),
    (lambda: NOISE(3, 3, 3, 2.0, cross=None), TypeError, "CovarianceFunction.exponential: cross"),
    (lambda: NOISE(1, 3, 3, 2.0).sample(-1), ValueError, "CovarianceFunction.sample: n must"),
    (lambda: NOISE(1, 3, 3, 2.0).sample(1.5), TypeError, "CovarianceFunction.sample: n must"),
    (lambda: FUNCTION.sample(1), ValueError, "CovarianceFunction.sample: the covariance must be"),
    (
        lambda: FUNCTION.decay_length(),
        ValueError,
        "CovarianceFunction.decay_length: the covariance",
    ),
    (
        lambda: NOISE(1, 3, 3, 2.0).product(torch.ones(1, 1, 3, 3, device="meta")),
        ValueError,
        "CovarianceFunction.product: gradient must be on the covariance's device, got meta and",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_sampling_refuses_what_is_not_positive_semidefinite():
    covariance = CovarianceFunction(1, 7, 7)
    covariance.update(smooth_images(2, 1, 7, 7))
    with pytest.raises(ValueError, match=r"^CovarianceFunction.sample: the covariance must be pos"):
        covariance.sample(2)
    covariance.project().sample(2)


RANKS = """
import sys, torch
from torch import distributed
from robustkern import CovarianceFunction, FullCovariance
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
batches = [torch.randn(5, 2, 3, 4) for _ in range(2)]
found = CovarianceFunction(2, 3, 4).standardize(), FullCovariance(24)
for batch in batches:
    for covariance in found:
        covariance.update(batch[:3] if rank == 0 else batch[3:])
distributed.destroy_process_group()
expected = CovarianceFunction(2, 3, 4).standardize(), FullCovariance(24)
for batch in batches:
    for covariance in expected:
        covariance.update(batch)
for one, other in zip(found, expected):
    torch.testing.assert_close(one.values, other.values)
print("equal")
"""


def test_ranks_of_unequal_batches_share_one_covariance(tmp_path):
    command = [sys.executable, "-c", RANKS]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert out == "equal\n", err
