"""On which device the tests run: by default the CPU, with `--device cuda` a GPU."""

import os
import sys

import pytest
import torch

# What has no device, or is told one by the test: nothing new would be seen of these on a GPU.
HOST = {
    "test_adversarial.py",
    "test_analyze.py",
    "test_build.py",
    "test_checkpoint.py",
    "test_cli.py",
    "test_compatibility.py",
    "test_covariance_command.py",
    "test_data.py",
    "test_demo.py",
    "test_docs.py",
    "test_emulated_kernels.py",
    "test_evaluation_command.py",
    "test_figures.py",
    "test_gpu_command.py",
    "test_house.py",
    "test_integrations.py",
    "test_page.py",
    "test_papers.py",
    "test_ranks.py",
    "test_readme.py",
    "test_recipes.py",
    "test_resources.py",
    "test_suite.py",
    "test_training.py",
    "test_verdict.py",
    "test_wheel.py",
}


def pytest_addoption(parser):
    group = parser.getgroup("robustkern")
    group.addoption("--device", default="cpu", help="where tensors are made, such as cuda")


def pytest_configure(config):
    device = _device(config)
    if device.type != "cuda":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
    if device.type == "cpu":
        return
    # Here and not in a fixture: modules and parametrizations hold tensors too.
    torch.set_default_device(device)
    # Each shape would be tuned, which takes longer than its tests.
    from robustkern.triton import _toeplitz

    _toeplitz._toeplitz_kernel.configs = _toeplitz.CONFIGS[:1]
    # float32 is to mean float32, and a sum to have one order.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    for other in (
        # The autograd thread's first call is often cuBLAS's; torch then makes the context itself.
        "ignore:Attempting to run cuBLAS:UserWarning",
        # Of the versions of torch, Triton and numpy that this machine happens to have.
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
    ):
        config.addinivalue_line("filterwarnings", other)


def pytest_unconfigure(config):
    torch.set_default_device(None)


def pytest_ignore_collect(collection_path, config):
    return True if collection_path.name in HOST and _device(config).type != "cpu" else None


def pytest_collection_modifyitems(config, items):
    if _device(config).type != "cuda":
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def _device(config):
    return torch.device(config.getoption("--device"))


@pytest.fixture(autouse=True, scope="module")
def forgotten_compilations():
    """One file's compilations do not count against the next one's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
