"""perturb against plain PyTorch and the bandwidth of a copy."""

import pytest
import torch
from samples import SHAPES, compiled, random
from stream import limit

from robustkern import functional, reference

__all__ = ["SHAPES"]


@pytest.mark.parametrize("direction", ["sign", "gradient"])
def test_forward(shape, dtype, direction, device, compare):
    x, g = random(2, shape, dtype, device)
    methods = {
        "naive": lambda x, g: reference.perturb(x, g, 1.5, direction),
        "robustkern": lambda x, g: functional.perturb(x, g, 1.5, direction),
    }
    methods |= compiled(methods["naive"], device)
    truth = reference.perturb(x.double(), g.double(), 1.5, direction).to(dtype)
    for method in methods.values():
        torch.testing.assert_close(method(x, g), truth)
    # The limit's copy goes into memory that is there; this one, like ours, into new pages.
    methods["clone"] = lambda x, g: x.clone()
    there = torch.empty_like(x)
    methods["copy"] = lambda x, g: there.copy_(x)
    compare(
        f"perturb {direction}|{shape}|{str(dtype).removeprefix('torch.')}|{device.type}",
        methods,
        inputs=(x, g),
        cold=x.nbytes > 2**24,
        graphs=x.nbytes < 2**24,
        baseline="robustkern",
        limit=limit("copy", x.nbytes, device),
        bytes_min=3 * x.nbytes,
    )
