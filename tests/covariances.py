"""Covariances over pixel displacements, and the matrices they stand for."""

import torch
from conformance import sample
from torch import Tensor

# One pixel, one row, one column, odd sizes, two and four channels, an odd and an even batch, no
# sample. Small images are multiplied by a matrix, larger ones transformed.
IMAGES = [
    (2, 1, 1, 1),
    (3, 2, 3, 5),
    (4, 1, 16, 16),
    (0, 3, 2, 2),
    (0, 3, 16, 16),
    (3, 1, 1, 331),
    (2, 1, 331, 1),
    (1, 2, 17, 9),
    (2, 4, 13, 11),
    (5, 3, 7, 16),
    (4, 3, 16, 23),
    (3, 1, 35, 31),
]
DENSE, SPECTRAL = (3, 2, 3, 5), (5, 3, 9, 12)


def covariance_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    """One that fits the images, with no symmetry at all."""
    _, channels, height, width = shape
    return sample((channels, channels, 2 * height - 1, 2 * width - 1), dtype, seed)


def matrix(covariance: Tensor) -> Tensor:
    """Sigma in float64, (D, D), entry by entry from its definition."""
    channels, _, rows, columns = covariance.shape
    height, width = (rows + 1) // 2, (columns + 1) // 2
    c, y, x = (
        i.flatten() for i in torch.meshgrid(
            torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij"
        )
    )  # fmt: skip
    dy, dx = y[None] - y[:, None], x[None] - x[:, None]
    return covariance.double()[c[:, None], c[None], dy + height - 1, dx + width - 1]


def bitwise_with_threads(function) -> bool:
    """Whether one and two threads, and two runs, give the same bits."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(results[0], result) for result in results)
