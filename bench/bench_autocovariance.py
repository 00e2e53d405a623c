"""autocovariance against plain FFTs."""

import math

import pytest
import spectral

from robustkern import functional, reference


@pytest.mark.parametrize("shape", spectral.SHAPES, ids=str)
def test_autocovariance(shape, compare, benchmark):
    p, _ = spectral.data(shape)
    methods = {
        "robustkern": lambda: functional.autocovariance(p),
        "torch.fft": lambda: spectral.fft_autocovariance(p),
    }
    # Compared as sums: where few pixels are far enough apart, the mean of their noise is as inexact
    # as it is uncertain.
    truth = spectral.fft_autocovariance(p.double())
    pairs = reference.pair_counts(p.double())
    for method in methods.values():
        spectral.assert_accurate(method() * pairs, truth * pairs)
    _, channels, height, width = shape
    medians = compare(
        f"autocovariance|fwd|{shape}|float32|cpu",
        methods,
        baseline="robustkern",
        rounds=20 if height > 100 else 60,
        bytes_min=4 * (math.prod(shape) + channels**2 * (2 * height - 1) * (2 * width - 1)),
    )
    spectral.summarize(benchmark, medians, "robustkern")
