import re

import pytest
import torch
from torch.autograd import gradcheck

from robustkern import CovarianceFunction, FullCovariance, functional


def correlated(samples=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 2, 3, 4, generator=generator, device="cpu")
    return images.to(torch.get_default_device())


def test_first_update_is_taken_whole_and_the_next_move_the_average():
    first, second = correlated(), 2 * correlated()[:3]
    covariance = CovarianceFunction(2, 3, 4, decay=0.25)
    covariance.update(first)
    torch.testing.assert_close(covariance.values, functional.autocovariance(first))
    covariance.update(second)
    expected = functional.autocovariance(first).lerp(functional.autocovariance(second), 0.25)
    torch.testing.assert_close(covariance.values, expected)
    assert covariance.updates == 2


def test_dense_is_the_matrix_that_product_and_form_stand_for():
    covariance = CovarianceFunction(2, 3, 4)
    covariance.values.copy_(torch.randn_like(covariance.values))  # not even symmetric
    sigma, g = covariance.dense().double(), correlated().double()
    rows = g.flatten(1)
    torch.testing.assert_close(covariance.product(g).flatten(1), rows @ sigma.T)
    torch.testing.assert_close(covariance.form(g), ((rows @ sigma.T) * rows).sum(1))
    y, x, c, dy, dx, other = 0, 1, 1, 2, 2, 0
    entry = sigma[c * 12 + y * 4 + x, other * 12 + (y + dy) * 4 + x + dx]
    assert entry == covariance.values[c, other, dy + 2, dx + 3]


def test_full_covariance_is_the_second_moment():
    full = FullCovariance(24, decay=0.5)
    first, second = correlated(), correlated()[:2]
    full.update(first)
    rows = first.flatten(1)
    torch.testing.assert_close(full.values, rows.T @ rows / 5)
    before = full.values.clone()
    full.update(second)
    rows = second.flatten(1)
    torch.testing.assert_close(full.values, before.lerp(rows.T @ rows / 2, 0.5))
    torch.testing.assert_close(full.product(first).flatten(1), first.flatten(1) @ full.values)
    assert (full.form(first) >= 0).all()
    assert torch.equal(full.dense(), full.values)


@pytest.mark.parametrize("make", [lambda: CovarianceFunction(2, 3, 4), lambda: FullCovariance(24)])
def test_double_and_half_gradients_are_served(make):
    covariance = make()
    covariance.update(correlated())
    g = correlated().double().requires_grad_()
    assert gradcheck(covariance.form, (g,))
    assert gradcheck(covariance.product, (g,))
    half = covariance.product(correlated().bfloat16())
    assert half.dtype == torch.bfloat16
    assert covariance.form(correlated().bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half.float(), covariance.product(correlated()), rtol=0.1, atol=0.1)


def test_state_is_saved_and_loaded():
    covariance = CovarianceFunction(2, 3, 4)
    covariance.update(correlated())
    other = CovarianceFunction(2, 3, 4)
    other.load_state_dict(covariance.state_dict())
    other.update(correlated())
    assert other.updates == 2
    torch.testing.assert_close(other.values, covariance.values)


def test_update_keeps_no_graph():
    covariance = CovarianceFunction(2, 3, 4)
    covariance.update(correlated().requires_grad_())
    assert not covariance.values.requires_grad


COVARIANCE, FULL = CovarianceFunction(2, 3, 4), FullCovariance(24)
BAD = [
    (
        lambda: CovarianceFunction(0, 3, 4),
        ValueError,
        "CovarianceFunction: channels must be at least 1, got 0",
    ),
    (
        lambda: CovarianceFunction(1, 3.0, 4),
        TypeError,
        "CovarianceFunction: height must be an int, got float",
    ),
    (
        lambda: CovarianceFunction(1, 3, 4, decay=0.0),
        ValueError,
        "CovarianceFunction: decay must be in (0, 1], got 0.0",
    ),
    (
        lambda: FullCovariance(4, decay="0.1"),
        TypeError,
        "FullCovariance: decay must be a number, got str",
    ),
    (lambda: FullCovariance(-1), ValueError, "FullCovariance: dim must be at least 1, got -1"),
    (
        lambda: COVARIANCE.update([1]),
        TypeError,
        "CovarianceFunction.update: perturbation must be a Tensor, got list",
    ),
    (
        lambda: COVARIANCE.update(correlated()[:0]),
        ValueError,
        "CovarianceFunction.update: perturbation must not be empty, got N = 0",
    ),
    (
        lambda: COVARIANCE.update(correlated().int()),
        TypeError,
        "autocovariance: perturbation must be float64, float32, bfloat16 or float16, "
        "got torch.int32",
    ),
    (
        lambda: COVARIANCE.product(correlated()[..., :2]),
        ValueError,
        "CovarianceFunction.product: gradient must be (N, C, H, W) with (C, H, W) = (2, 3, 4), "
        "got (5, 2, 3, 2)",
    ),
    (
        lambda: COVARIANCE.form(correlated()[0]),
        ValueError,
        "CovarianceFunction.form: gradient must be (N, C, H, W) with (C, H, W) = (2, 3, 4), "
        "got (2, 3, 4)",
    ),
    (
        lambda: FULL.update(correlated()[:0]),
        ValueError,
        "FullCovariance.update: perturbation must not be empty, got N = 0",
    ),
    (
        lambda: FULL.form(correlated()[..., :2]),
        ValueError,
        "FullCovariance.form: gradient must be (N, *D) with 24 numbers in one sample, "
        "got (5, 2, 3, 2)",
    ),
    (
        lambda: FULL.product(3),
        TypeError,
        "FullCovariance.product: gradient must be a Tensor, got int",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named_and_leaves_the_values(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
    assert COVARIANCE.updates == FULL.updates == 0
