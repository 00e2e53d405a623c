"""What every op is held to: truth in float64, any layout, and checks that can fail."""

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Relative L2 error of outputs in each dtype: a few roundings of the result, or of the float32 sum.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}
# On a GPU the covariance ops may split float32 numbers for the tensor cores.
COVARIANCE_TOLERANCE = TOLERANCE | (
    {torch.float32: 1e-5} if torch.get_default_device().type == "cuda" else {}
)

# Prime sizes, one element, one past a power of two, no sample, images, samples that several blocks
# share.
SHAPES = [(0, 3), (1, 1), (3, 7), (2, 0), (5, 1031), (2, 4097), (3, 2, 5, 7), (70_001, 2)]
SHAPES += [(1, 20_011), (2, 3, 80, 80)]


def layouts(contiguous: Tensor) -> dict[str, Tensor]:
    """The same values in every layout that they can have.

    On a GPU float32 alone has them all: each is another kernel to compile.
    """
    found = {"contiguous": contiguous, "transposed": _permuted(contiguous)}
    if contiguous.is_cuda and contiguous.dtype != torch.float32:
        return found
    room = contiguous.new_full((*contiguous.shape[:-1], contiguous.shape[-1] + 5), 7.0)
    sliced = room[..., 3:-2]
    sliced.copy_(contiguous)
    found["sliced"] = sliced
    stepped = contiguous.repeat_interleave(2, -1)[..., ::2]
    found["stepped"] = stepped
    if contiguous.dim() == 4:
        found["channels_last"] = contiguous.contiguous(memory_format=torch.channels_last)
    return found


def _permuted(contiguous: Tensor) -> Tensor:
    order = list(range(contiguous.dim()))[::-1]
    return contiguous.permute(order).contiguous().permute(order)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """L2 distance over the L2 length of the truth; 0 if both are zero."""
    difference = (result.double() - truth).norm().item()
    length = truth.norm().item()
    return difference / length if length else difference


def assert_true(
    result: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    tolerances: dict[torch.dtype, float] = TOLERANCE,
) -> None:
    """The result has the truth's shape, is contiguous, and is as near as its dtype allows."""
    assert truth.dtype == torch.float64
    assert result.dtype == dtype
    assert result.shape == truth.shape
    assert result.is_contiguous()
    tolerance = tolerances[dtype]
    assert relative_error(result, truth) <= tolerance
    if truth.norm() > 0:  # the check itself must be able to fail
        assert relative_error(torch.zeros_like(result), truth) > tolerance
        assert relative_error(truth * 1.05, truth) > tolerance


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of both signs and of scale one, some exactly zero, rounded to the dtype.

    They are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    zero = torch.rand(shape, generator=generator, device="cpu") < 0.1
    return values.masked_fill(zero, 0.0).to(torch.get_default_device(), dtype)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What values per sample come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bitwise_with_threads(function) -> bool:
    """Whether one, two and three threads, and two runs, give the same bits; on a GPU, four runs."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(results[0], result) for result in results)
