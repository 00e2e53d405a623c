"""autocovariance against plain FFTs."""

import math

import spectral

from robustkern import functional, reference

SHAPES = spectral.SHAPES


def test_autocovariance(shape, device, compare, benchmark):
    p, _ = spectral.data(shape, device)
    methods = {
        "robustkern": functional.autocovariance,
        "torch.fft": spectral.fft_autocovariance,
    }
    # Compared as sums: where few pixels are far enough apart, the mean of their noise is as inexact
    # as it is uncertain.
    truth = spectral.fft_autocovariance(p.double())
    pairs = reference.pair_counts(p.double())
    for method in methods.values():
        spectral.assert_accurate(method(p) * pairs, truth * pairs)
    _, channels, height, width = shape
    medians = compare(
        f"autocovariance|fwd|{shape}|float32|{device.type}",
        methods,
        inputs=(p,),
        baseline="robustkern",
        rounds=20 if height > 100 else 60,
        limit=spectral.gpu_limit(device),
        bytes_min=4 * (math.prod(shape) + channels**2 * (2 * height - 1) * (2 * width - 1)),
    )
    spectral.summarize(benchmark, medians, "robustkern")
