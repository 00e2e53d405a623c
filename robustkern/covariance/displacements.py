"""Values over pixel displacements, (C, C, 2H-1, 2W-1): lengths, rings and spectra."""

import math

import torch
from torch import Tensor


def lengths(values: Tensor) -> Tensor:
    """The length of each displacement of (.., 2H-1, 2W-1), in pixels."""
    y, x = (torch.arange(size, device=values.device) - size // 2 for size in values.shape[-2:])
    return torch.hypot(y[:, None].float(), x[None, :].float())


def _rings(values: Tensor) -> Tensor:
    """The number of each displacement's ring: its length rounded."""
    return lengths(values).round().long()


def ring_means(values: Tensor) -> Tensor:
    """The mean of (.., 2H-1, 2W-1) over each ring, (.., R)."""
    ring = _rings(values).flatten()
    rows, columns = (size // 2 for size in values.shape[-2:])
    zeros = values.new_zeros(*values.shape[:-2], round(math.hypot(rows, columns)) + 1)
    sizes = zeros.index_add(-1, ring, torch.ones_like(values).flatten(-2))
    return zeros.index_add(-1, ring, values.flatten(-2)) / sizes


def isotropic(values: Tensor) -> Tensor:
    """The mean over displacements of equal rounded length (Eq. 16), for each pair of channels."""
    means = ring_means(values)[..., _rings(values)]
    return (means + means.transpose(0, 1)) / 2


def spectrum(values: Tensor) -> Tensor:
    """(2H-1, 2W-1, C, C), Hermitian: of the values continued periodically."""
    shifts = [-(size // 2) for size in values.shape[2:]]
    found: Tensor = torch.fft.fft2(values.roll(shifts, (2, 3))).movedim((0, 1), (2, 3))
    return (found + found.mH) / 2


def projected(values: Tensor) -> Tensor:
    """The values whose spectrum is that of the given ones without its negative parts."""
    eigenvalues, vectors = torch.linalg.eigh(spectrum(values.double()))
    clipped = (vectors * eigenvalues.clamp(min=0).unsqueeze(-2)) @ vectors.mH
    back: Tensor = torch.fft.ifft2(clipped.movedim((2, 3), (0, 1))).real
    return back.roll([size // 2 for size in values.shape[2:]], (2, 3)).to(values.dtype)
