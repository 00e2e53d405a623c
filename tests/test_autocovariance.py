import numpy as np
import pytest
import torch
from conformance import COVARIANCE_TOLERANCE as TOLERANCE
from conformance import DTYPES, bitwise_with_threads, layouts, relative_error, sample
from covariances import IMAGES, SPECTRAL

from robustkern import functional, reference

OPS = torch.ops.robustkern


def true_sums(perturbation):
    """sum over i of p_c(i) p_c'(i + d), mean over samples; one displacement at a time."""
    p = perturbation.double().cpu().numpy()
    samples, channels, height, width = p.shape
    sums = np.zeros((channels, channels, 2 * height - 1, 2 * width - 1))
    for dy in range(1 - height, height):
        for dx in range(1 - width, width):
            here = p[..., max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
            there = p[..., max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
            products = np.einsum("ncyx,ndyx->cd", here, there)
            sums[..., dy + height - 1, dx + width - 1] = products / max(samples, 1)
    return torch.from_numpy(sums).to(perturbation.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_autocovariance_is_the_float64_truth(shape, dtype):
    p = sample(shape, dtype)
    sums = true_sums(p)
    pairs = reference.pair_counts(p.double())
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[accumulation]
    for laid in layouts(p).values():
        for unbiased, counts in ((True, pairs), (False, torch.full_like(pairs, pairs.max()))):
            result = functional.autocovariance(laid, unbiased)
            assert result.dtype == accumulation
            assert result.shape == sums.shape
            assert result.is_contiguous()
            # Few pairs at a displacement make its mean as much less exact as it is less certain.
            assert relative_error(result * counts, sums) <= tolerance
            assert relative_error(result, sums / counts) <= 20 * tolerance
    if sums.norm() > 0:  # the check can fail
        assert relative_error(1.05 * sums, sums) > tolerance
        assert relative_error(torch.zeros_like(sums), sums) > tolerance
    if shape[0] and shape[1] > 1:
        assert relative_error(sums.transpose(0, 1), sums) > tolerance


@pytest.mark.parametrize("samples", [1, 2, 3, 40, 75])
def test_any_number_of_samples(samples):
    p = sample((samples, 2, 6, 5), torch.float32)
    pairs = reference.pair_counts(p)
    result = functional.autocovariance(p) * pairs
    assert relative_error(result, true_sums(p)) <= TOLERANCE[torch.float32]


def test_expanded_perturbation():
    p = sample((1, 2, 1, 7), torch.float32).expand(3, 2, 5, 7)
    result = functional.autocovariance(p, unbiased=False) * 35
    assert relative_error(result, true_sums(p)) <= TOLERANCE[torch.float32]


def test_hand_computed():
    p = torch.tensor([[[[1.0, 2.0, 4.0]]], [[[1.0, 0.0, 0.0]]]])
    sums = torch.tensor([4.0, 2.0 + 8.0, 1.0 + 4.0 + 16.0 + 1.0, 2.0 + 8.0, 4.0]) / 2
    pairs = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(functional.autocovariance(p)[0, 0, 0], sums / pairs)
    torch.testing.assert_close(functional.autocovariance(p, False)[0, 0, 0], sums / 3)


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_result_is_symmetric_and_blind_to_order_and_sign(unbiased):
    p = sample(SPECTRAL, torch.float64)
    k = functional.autocovariance(p, unbiased)
    torch.testing.assert_close(k, reference.transpose_covariance(k), rtol=0, atol=1e-15)
    torch.testing.assert_close(functional.autocovariance(-p.flip(0), unbiased), k)


@pytest.mark.parametrize("shape", [(3, 2, 3, 4), (0, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(shape, layout):
    p = layouts(sample(shape, torch.float32))[layout]
    torch.library.opcheck(OPS.autocovariance.default, (p,))
    torch.library.opcheck(OPS.autocovariance.default, (p, False))


@pytest.mark.parametrize("samples", [1, 9, 50])
def test_bitwise_repeatable(samples):
    p = sample((samples, 3, 16, 20), torch.float32)
    assert bitwise_with_threads(lambda: functional.autocovariance(p))


@pytest.mark.setting("torch.compile of robustkern.functional", group="compiled models")
def test_a_compiled_autocovariance_is_the_eager_one():
    p = sample(SPECTRAL, torch.float32)
    compiled = torch.compile(functional.autocovariance, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p), functional.autocovariance(p))
