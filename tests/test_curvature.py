import pytest
import torch
from networks import batch, linear, pixels, smooth
from torch.nn import functional as F

from robustkern.analysis import (
    InputHessian,
    alignment,
    curvature_profile,
    frobenius_norm,
    gauss_newton,
    lanczos,
    sign_curvature,
    spectrum,
)


def test_frobenius_norm_is_that_of_the_dense_matrix_within_its_error():
    model, (inputs, targets) = smooth().eval(), batch(samples=4)
    hessian = InputHessian(model, inputs, targets, method="exact")
    expected = hessian.dense().square().sum((1, 2))
    found = frobenius_norm(hessian, inputs, draws=200)
    assert ((found.squared - expected).abs() < 4 * found.error).all()
    assert (found.error < 0.2 * expected).all()
    assert abs(found.mean - expected.mean()) < 4 * found.mean_error
    torch.testing.assert_close(found.norm, found.squared.sqrt())


def test_the_error_is_that_of_repeated_estimates():
    scales = torch.linspace(0, 2, 30, dtype=torch.float64)
    like = torch.zeros(400, 30, dtype=torch.float64)  # 400 estimates of one matrix
    found = frobenius_norm(lambda z: scales * z, like, draws=50)
    torch.testing.assert_close(found.error.mean(), found.squared.std(), rtol=0.1, atol=0)
    assert abs(found.mean - scales.square().sum()) < 4 * found.mean_error


def test_draws_repeat_and_follow_the_generator():
    like, state = torch.zeros(2, 3), torch.get_rng_state()

    def run(seed=None):
        source = None if seed is None else torch.Generator(like.device).manual_seed(seed)
        return frobenius_norm(lambda z: z, like, 3, generator=source).squared

    assert torch.equal(run(), run())
    assert not torch.equal(run(1), run(2))
    assert torch.equal(state, torch.get_rng_state())


def test_sign_curvature_is_the_regularizer_over_h():
    model, (inputs, targets) = smooth().eval(), batch()
    h = 0.8

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), targets, reduction="sum"), x)[0]

    g = gradient(inputs)
    z = g.sign() / g.sign().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = (gradient(inputs + h * z) - g).flatten(1).norm(dim=1) / h
    found = sign_curvature(InputHessian(model, inputs, targets, h=h))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["finite", "exact"])
def test_a_network_that_is_constant_has_zeros_and_no_nan(method):
    model, inputs = linear(torch.zeros(3, 4)), pixels(2, 4, torch.float32)
    hessian = InputHessian(model, inputs, torch.tensor([0, 1]), method=method)
    assert not sign_curvature(hessian).any()
    assert not frobenius_norm(hessian, inputs).error.any()
    found = alignment(hessian.gradient, lanczos(hessian, inputs).vectors[:, 0])
    assert (len(found.cosines), found.undefined, found.mean) == (0, 2, None)
    profile = curvature_profile(spectrum(hessian))
    assert not torch.stack([profile.mean, profile.low, profile.high]).any()


def test_alignment_counts_what_is_undefined():
    gradient = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [1e-30, 1e-30]])
    direction = torch.tensor([[0.0, -2.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = alignment(gradient, direction)
    assert found.undefined == 2
    torch.testing.assert_close(found.cosines, torch.tensor([0.8, 0.5**0.5]).double())
    assert found.mean == pytest.approx((0.8 + 0.5**0.5) / 2)


def test_of_random_directions_the_root_mean_square_is_one_over_root_d():
    generator = torch.Generator().manual_seed(0)
    gradient, direction = torch.randn(2, 4000, 100, generator=generator, device="cpu")
    cosines = alignment(gradient, direction).cosines
    assert cosines.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.05)
    assert cosines.mean().item() == pytest.approx(0.08, rel=0.05)


def test_the_gradient_of_a_two_class_linear_network_is_along_the_curvature():
    model = linear(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    inputs = pixels(3, 2, torch.float32)
    hessian = InputHessian(model, inputs, torch.tensor([0, 1, 0]), method="exact")
    for vectors in (gauss_newton(model, inputs).vectors, lanczos(hessian, inputs).vectors):
        assert alignment(hessian.gradient, vectors[:, 0]).mean == pytest.approx(1, abs=1e-4)


def test_a_profile_is_the_mean_of_sorted_values_with_its_interval():
    spectra = torch.tensor([[4.0, 1.0, 0.0], [2.0, 1.0, -2.0], [3.0, 1.0, -1.0]])
    profile = curvature_profile(spectra)
    assert profile.samples == 3
    torch.testing.assert_close(profile.mean, torch.tensor([3.0, 1.0, -1.0]).double())
    half = 1.96 * torch.tensor([1.0, 0.0, 1.0]).double() / 3**0.5
    torch.testing.assert_close(profile.high, profile.mean + half)
    torch.testing.assert_close(profile.low, profile.mean - half)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: frobenius_norm(1, x), TypeError, "frobenius_norm: operator must be callable"),
        (lambda x: frobenius_norm(abs, 1), TypeError, "frobenius_norm: like must be a floating"),
        (lambda x: frobenius_norm(lambda z: 1, x), TypeError, "operator must return a tensor"),
        (lambda x: frobenius_norm(lambda z: z[:1], x), ValueError, "must return the shape"),
        (lambda x: frobenius_norm(lambda z: z / 0, x), ValueError, "must return finite products"),
        (lambda x: frobenius_norm(abs, x, 1), ValueError, "draws must be at least 2, got 1"),
        (lambda x: frobenius_norm(abs, x, 2.0), TypeError, "draws must be an int, got float"),
        (lambda x: sign_curvature(x), TypeError, "hessian must be an InputHessian, got Tensor"),
        (lambda x: alignment(x, x[:1]), ValueError, "alignment: direction must have gradient's"),
        (lambda x: alignment(x / 0, x), ValueError, "alignment: gradient must be finite"),
        (lambda x: alignment(x, x.long()), TypeError, "direction must be a floating-point"),
        (lambda x: curvature_profile(x[:1]), ValueError, "at least two samples, got"),
        (lambda x: curvature_profile(x.cumsum(1)), ValueError, "descend along each row"),
        (lambda x: curvature_profile([x]), TypeError, "spectra must be a floating-point tensor"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))
