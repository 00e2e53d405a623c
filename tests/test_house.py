"""The house: imports run one way, and an op has one stem in every room."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robustkern"
# From the ground up; each room imports only from those before it.
ROOMS = [
    "reference", "triton", "ops", "functional", "gradients", "covariance", "penalties",
    "integrations", "analysis", "evaluation", "training", "cli", "__main__",
]  # fmt: skip
# These may need more than torch and numpy.
WITH_EXTRAS = ("integrations", "training")


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """The modules of robustkern that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "robustkern":
            found |= {f"robustkern.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == "robustkern"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(path):
        there = room(module)
        if there in ROOMS:  # names of the package itself (robustkern.CURE) come from any room
            assert ROOMS.index(there) <= ROOMS.index(here), f"{path} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] not in WITH_EXTRAS], ids=str)
def test_core_needs_torch_and_numpy_only(path):
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        names = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        for name in names:
            allowed = {"torch", "numpy", "robustkern"} | sys.stdlib_module_names
            if path.parts[-2] == "triton":  # imported by the first CUDA tensor
                allowed |= {"triton"}
            assert name.split(".")[0] in allowed, name


OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))


def test_there_are_six_ops():
    assert len(OPS) == 6


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_stem_in_every_room(op):
    for place in (
        f"robustkern/reference/{op}.py",
        f"robustkern/ops/{op}.py",
        f"csrc/cpu/{op}.cpp",
        f"tests/test_{op}.py",
        f"bench/bench_{op}.py",
    ):
        assert (ROOT / place).exists(), place
    rooms = (f"csrc/cuda/{op}.cu", f"robustkern/triton/{op}.py")
    assert sum((ROOT / room).exists() for room in rooms) == 1, "one CUDA kernel, in one language"


def test_triton_is_imported_by_nothing_but_a_cuda_tensor():
    script = "import sys, robustkern; robustkern.show_config(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_without_the_compiled_library_the_reference_answers(tmp_path):
    import shutil

    shutil.copytree(
        PACKAGE, tmp_path / "robustkern", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = (
        "import torch, robustkern; robustkern.show_config()\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))\n"
        "sgr = robustkern.SGR(1.0, robustkern.CovarianceFunction(3, 2, 2))\n"
        "x, y = torch.rand(4, 3, 2, 2), torch.arange(4) % 3\n"
        "print(robustkern.backward(model, x, y, robustkern.CURE() + sgr).penalty.isfinite())\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "C++" not in run.stdout
    assert "tensor(True)" in run.stdout


def run_as_a_build_with_cuda(script):
    """A Python whose torch says that it was built with CUDA, without a GPU to be seen."""
    begin = (
        "import torch, warnings; torch.version.cuda = '13.0'; warnings.simplefilter('always')\n"
        "import robustkern; from robustkern.ops import _library\n"
        "key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)\n"
        "op = torch.ops.robustkern.gradient_difference.default\n"
        "a, b = torch.ones(2, 3), torch.zeros(2, 3)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", begin + script],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run


def test_without_a_usable_triton_the_reference_answers_and_one_warning_says_so():
    script = "for _ in range(3): print(op.redispatch(key, a, b), 'triton' in dir(robustkern))"
    run = run_as_a_build_with_cuda(script)
    assert run.stdout.split("\n")[:3] == ["tensor([3., 3.]) False"] * 3
    assert run.stderr.count("robustkern runs on its reference: Triton: ") == 1


def test_where_triton_is_usable_its_kernel_answers():
    script = (
        "_library.triton_works = lambda device: True\n"
        "print(op.redispatch(key, a, b), 'triton' in dir(robustkern)); robustkern.show_config()"
    )
    lines = run_as_a_build_with_cuda(script).stdout.splitlines()
    assert lines[0] == "tensor([3., 3.]) True"
    served = {line.split()[0]: line.split(maxsplit=2)[2].strip() for line in lines[2:]}
    assert served["gradient_difference"] == "Triton"
    assert served["covariance_product"] == served["covariance_form"] == "Triton"


def test_a_library_that_cannot_be_loaded_leaves_the_reference_and_one_warning():
    # Torch without CUDA lacks what the CUDA library needs.
    run = run_as_a_build_with_cuda("robustkern.show_config()")
    built = (PACKAGE / "librobustkern_cuda.so").exists()
    assert run.stderr.count("robustkern runs on its reference: librobustkern_cuda.so") == built
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("perturb "))
    assert line.split()[2] == "reference"
