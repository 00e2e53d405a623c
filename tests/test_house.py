"""The house: imports run one way, and an op has one stem in every room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "robustkern"
# From the ground up; each room imports only from those before it.
ROOMS = [
    "reference", "triton", "ops", "functional", "gradients", "covariance", "penalties",
    "analysis", "evaluation", "training", "cli", "__main__",
]  # fmt: skip


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


@pytest.mark.parametrize("path", [p for p in FILES if "training" not in p.parts[-2]], ids=str)
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
