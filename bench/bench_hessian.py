"""Eigenpairs of input Hessians: batched Lanczos, one sample at a time, dense, the Gram route.

The small CNN on images of MNIST's size, trained for a moment so that its curvature has structure.
Each group is checked against the float64 truth of the Gram route before it is timed.
"""

import copy

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.nn import functional as F

from robustkern.analysis import InputHessian, gauss_newton, lanczos, spectrum
from robustkern.training.models import cnn

SAMPLES, DENSE, TOP = 100, 2, 10


def images(samples):
    """Smooth images in [0, 1], ten classes of them, with noise."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 1, 4, 4, generator=generator)
    noise = torch.rand(samples, 1, 8, 8, generator=generator)
    targets = torch.arange(samples) % 10
    parts = (F.interpolate(p, (28, 28), mode="bilinear") for p in (prototypes[targets], noise))
    return sum(parts) / 2, targets


@pytest.fixture(scope="module")
def setting(request):
    """A network, the inputs and targets."""
    smoke = request.config.getoption("--smoke")
    device = torch.device(request.config.getoption("--device"))
    torch.manual_seed(0)
    model = cnn((1, 28, 28), 10, width=4 if smoke else 32)
    inputs, targets = images(6 if smoke else SAMPLES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2 if smoke else 20):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval().to(device), inputs.to(device), targets.to(device)


def exact(model, inputs, targets):
    return InputHessian(model, inputs, targets, method="exact")


def batched(model, inputs, targets):
    return lanczos(exact(model, inputs, targets), inputs, TOP).values


def one_by_one(model, inputs, targets):
    """The same, a sample at a time."""
    rows = zip(inputs.split(1), targets.split(1), strict=True)
    return torch.cat([batched(model, x, y) for x, y in rows])


def scipy_one_by_one(model, inputs, targets):
    """As one writes it: double backward of one sample in each product of scipy's Lanczos."""
    values = []
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):

        def product(v, x=x, y=y):
            leaf = x.clone().requires_grad_()
            # As InputHessian's: in float32 the values of confident samples would be wrong.
            loss = F.cross_entropy(model(leaf).double(), y)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            vector = torch.from_numpy(v).to(x).view_as(x)
            return torch.autograd.grad(gradient, leaf, vector)[0].flatten().cpu().numpy()

        operator = LinearOperator((x.numel(), x.numel()), matvec=product, dtype=np.float32)
        found = eigsh(operator, k=TOP, which="LA", tol=1e-5, return_eigenvectors=False)
        values.append(torch.from_numpy(np.sort(found)[::-1].copy()))
    return torch.stack(values).to(inputs)


def dense(model, inputs, targets):
    return spectrum(exact(model, inputs, targets))[:, :TOP]


def gram(model, inputs, targets):
    return gauss_newton(model, inputs).spectrum()[:, :TOP]


def check(model: nn.Module, inputs: torch.Tensor, found: torch.Tensor) -> None:
    """Within a ten-thousandth of the largest eigenvalue."""
    truth = gram(copy.deepcopy(model).double(), inputs.double(), None)
    scale = truth[:, :1]
    assert ((found.double() - truth).abs() <= 1e-4 * scale).all()


def test_batched_lanczos_against_one_sample_at_a_time(setting, compare):
    model, inputs, targets = setting
    methods = {
        "scipy eigsh, one by one": lambda x, y: scipy_one_by_one(model, x, y),
        "lanczos, one by one": lambda x, y: one_by_one(model, x, y),
        "lanczos, batched": lambda x, y: batched(model, x, y),
    }
    for method in methods.values():
        check(model, inputs, method(inputs, targets))
    seconds = compare(
        f"top {TOP} eigenpairs of {len(inputs)} samples, 1x28x28",
        methods,
        "scipy eigsh, one by one",
        [inputs, targets],
        rounds=3,
        warmup=0,
        limits={"lanczos, batched": 1 / 5},
    )
    assert seconds["lanczos, batched"] < 60


def test_gram_against_dense(setting, compare):
    model, inputs, targets = setting
    inputs, targets = inputs[:DENSE], targets[:DENSE]
    methods = {
        "dense": lambda x, y: dense(model, x, y),
        "lanczos, batched": lambda x, y: batched(model, x, y),
        "gram": lambda x, y: gram(model, x, y),
    }
    for method in methods.values():
        check(model, inputs, method(inputs, targets))
    compare(
        f"top {TOP} eigenvalues of {len(inputs)} samples, 1x28x28",
        methods,
        "dense",
        [inputs, targets],
        rounds=3,
        warmup=0,
        limits={"gram": 1 / 20},
    )
