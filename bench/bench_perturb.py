"""perturb against plain PyTorch and the bandwidth of a copy."""

import pytest
import torch
from stream import bandwidth

from robustkern import functional, reference

SHAPES = [(64, 3, 224, 224), (256, 3, 32, 32)]


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, direction, compare):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    methods = {
        "naive": lambda: reference.perturb(x, g, 1.5, direction),
        "robustkern": lambda: functional.perturb(x, g, 1.5, direction),
    }
    truth = reference.perturb(x.double(), g.double(), 1.5, direction).float()
    for method in methods.values():
        torch.testing.assert_close(method(), truth)
    # The limit's copy goes into memory that is there; this one, like ours, into new pages.
    methods["clone"] = lambda: x.clone()
    there = torch.empty_like(x)
    methods["copy"] = lambda: there.copy_(x)
    compare(
        f"perturb {direction}|{shape}|float32|cpu",
        methods,
        cold=x.nbytes > 2**24,
        baseline="robustkern",
        limit=lambda: bandwidth("copy", x.nbytes, torch.get_num_threads(), repeats=1),
        bytes_min=3 * x.nbytes,
    )
