"""What the covariance benchmarks share: the alternatives that a person would write."""

import math
from collections.abc import Callable
from functools import partial

import torch
from stream import limit
from torch import Tensor
from torch.nn import functional as F

SHAPES = {
    "cpu": [
        (128, 3, 32, 32),
        (128, 1, 28, 28),
        (256, 1, 8, 8),
        (16, 3, 64, 64),
        (16, 16, 64, 64),
        (8, 3, 224, 224),
    ],
    "cuda": [
        (128, 3, 32, 32),
        (512, 3, 32, 32),
        (128, 3, 64, 64),
        (512, 3, 64, 64),
        (128, 1, 28, 28),
        (512, 1, 28, 28),
        (16, 3, 224, 224),
    ],
}
# A convolution with a kernel twice the image is timed where it ends within seconds, few times.
CONVOLVED = [(128, 3, 32, 32), (128, 1, 28, 28), (256, 1, 8, 8)]
# Images and the reach in pixels of a covariance that was tapered, for a stencil.
SHORT = [((128, 3, 32, 32), 2), ((128, 1, 28, 28), 3), ((16, 3, 224, 224), 4)]
# Elements of a sample; a matrix of 64 MB in float32 for a CPU, of 600 MB for a GPU.
DENSE_LIMIT = {"cpu": 4096, "cuda": 12288}


def data(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    _, channels, height, width = shape
    g = torch.randn(shape, generator=generator, device=device)
    size = (channels, channels, 2 * height - 1, 2 * width - 1)
    return g, torch.randn(size, generator=generator, device=device)


def smooth_size(least: int) -> int:
    """The next number with no prime factor above 5."""
    rest = least
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return least if rest == 1 else smooth_size(least + 1)


def transform_sizes(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return smooth_size(2 * height - 1), smooth_size(2 * width - 1)


def fft_product(gradient: Tensor, covariance: Tensor) -> Tensor:
    height, width = gradient.shape[-2:]
    sizes = transform_sizes(gradient)
    padded = F.pad(covariance, (0, sizes[1] - 2 * width + 1, 0, sizes[0] - 2 * height + 1))
    kernel = torch.fft.rfft2(padded.roll((1 - height, 1 - width), (2, 3))).conj()
    product = torch.einsum("cdyx,ndyx->ncyx", kernel, torch.fft.rfft2(gradient, s=sizes))
    return torch.fft.irfft2(product, s=sizes)[..., :height, :width].contiguous()


def convolution(gradient: Tensor, covariance: Tensor) -> Tensor:
    rows, columns = covariance.shape[-2:]
    return F.conv2d(gradient, covariance, padding=(rows // 2, columns // 2))


def short(
    shape: tuple[int, ...], reach: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, a covariance of that reach, and the same among zeros."""
    g, k = data(shape, device)
    y, x = shape[2] - 1 - reach, shape[3] - 1 - reach
    cropped = k[..., y : k.shape[2] - y, x : k.shape[3] - x].contiguous()
    return g, cropped, F.pad(cropped, (x, x, y, y))


def gpu_limit(device: torch.device) -> Callable[[], float] | None:
    """A copy's bandwidth on a GPU; a CPU's transforms are bound by arithmetic."""
    return None if device.type == "cpu" else limit("copy", 0, device)


def dense_matrix(covariance: Tensor) -> Tensor:
    """Sigma transposed, (D, D), contiguous: what a person would keep between calls."""
    channels = covariance.shape[0]
    height, width = ((size + 1) // 2 for size in covariance.shape[2:])
    windows = covariance.unfold(2, height, 1).unfold(3, width, 1).flip(2, 3)
    size = channels * height * width
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(size, size).T.contiguous()


STENCIL_TAPS = 225  # at most: more would take seconds


def algorithms(covariance: Tensor, form: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """The algorithms the op chooses from on a GPU, each at every size: the crossovers' source."""
    if not covariance.is_cuda:
        return {}
    from robustkern.triton._spectral import spectral
    from robustkern.triton._stencil import stencil
    from robustkern.triton._toeplitz import toeplitz

    found = {"toeplitz": toeplitz, "spectral": spectral}
    if covariance.shape[2] * covariance.shape[3] <= STENCIL_TAPS:
        found["stencil"] = stencil
    return {
        name: partial(multiply, covariance=covariance, form=form)
        for name, multiply in found.items()
    }


def form(gradient: Tensor, product: Tensor) -> Tensor:
    return (gradient * product).flatten(1).sum(1)


def fft_autocovariance(perturbation: Tensor) -> Tensor:
    samples, _, height, width = perturbation.shape
    sizes = transform_sizes(perturbation)
    spectra = torch.fft.rfft2(perturbation, s=sizes)
    mean = torch.einsum("ncyx,ndyx->cdyx", spectra.conj(), spectra) / samples
    sums = torch.fft.irfft2(mean, s=sizes).roll((height - 1, width - 1), (2, 3))
    device = perturbation.device
    y, x = (size - torch.arange(1 - size, size, device=device).abs() for size in (height, width))
    return sums[..., : 2 * height - 1, : 2 * width - 1] / torch.outer(y, x)


def assert_accurate(result: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    """Relative L2 error to the float64 truth; no figure without it."""
    assert truth.dtype == torch.float64
    error = (result - truth).norm() / truth.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def facts(shape: tuple[int, ...], written: int) -> dict[str, float]:
    """Bytes that must move, and the operations of a dense product, for one call in float32."""
    samples, channels, height, width = shape
    covariance = channels**2 * (2 * height - 1) * (2 * width - 1)
    return {
        "bytes_min": 4 * (math.prod(shape) + covariance + written),
        "dense_flops": 2 * samples * (channels * height * width) ** 2,
    }


def summarize(benchmark, medians: dict[str, float], baseline: str) -> None:
    """How much longer the best alternative takes: its median ratio over rounds."""
    ours = (baseline, "toeplitz", "spectral", "stencil", "all displacements")
    others = {name: benchmark.extra_info[name]["ratio"] for name in medians if name not in ours}
    best = min(others, key=others.__getitem__)
    benchmark.extra_info["best_alternative"] = best
    benchmark.extra_info["times_as_fast"] = others[best]
