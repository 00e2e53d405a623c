"""The wheel and the source archive: what is in them, and that they work by themselves."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "robustkern"
LIBRARIES = sorted(PACKAGE.glob("librobustkern_*.so"))
OPS = {path.stem for path in (PACKAGE / "ops").glob("[!_]*.py")}

# Every op: CURE perturbs and takes differences, SGR's derivative is the covariance's product.
TRAINING_STEP = """
import torch, robustkern
layers = torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
model = torch.nn.Sequential(*layers)
sgr = robustkern.SGR(0.1, robustkern.CovarianceFunction(3, 4, 4))
penalty = robustkern.CURE() + robustkern.GradientPenalty(0.1) + sgr
inputs, targets = torch.rand(6, 3, 4, 4), torch.arange(6) % 3
step = robustkern.backward(model, inputs, targets, penalty)
torch.optim.SGD(model.parameters(), 0.1).step()
assert step.penalty > 0
assert all(parameter.isfinite().all() for parameter in model.parameters())
print(robustkern.__file__)
robustkern.show_config()
"""

pytest.importorskip("auditwheel")
pytestmark = pytest.mark.skipif(
    not (LIBRARIES and shutil.which("make")), reason="no make, or no compiled libraries"
)


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; it finds this environment's programs and no other package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(target: str, folder: Path) -> Path:
    """The file that `make target` writes, in this Python's environment instead of .venv."""
    variables = f"PYTHON={sys.executable}", f"DIST={folder}"
    run("make", "--assume-old=.venv/installed", target, *variables)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_is_for_any_python_and_the_oldest_linux_that_its_libraries_can_run_on(wheel):
    found = re.fullmatch(r"robustkern-[\d.]+-py3-none-manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
    assert found, wheel.name
    assert found[2] == os.uname().machine
    text = "".join(run("objdump", "--dynamic-syms", library) for library in LIBRARIES)
    needed = re.findall(r"GLIBC_2\.(\d+)", text)
    assert int(found[1]) >= max(map(int, needed))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not re.search(r"\.dist-info/|/$", name)}
        modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
        libraries = {str(path.relative_to(ROOT)) for path in LIBRARIES}
        assert names == modules | libraries | {"robustkern/py.typed"}
        for name in libraries:  # so that what test_build.py finds holds for the wheel
            assert archive.read(name) == (ROOT / name).read_bytes(), f"{name} is of other sources"


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 5e6


def test_wheel_trains_in_an_environment_without_compiler_and_network(wheel, tmp_path):
    venv.create(tmp_path, symlinks=True, with_pip=True)
    python = tmp_path / "bin" / "python"
    (packages,) = tmp_path.glob("lib/*/site-packages")
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    location, *config = run(python, "-W", "error", "-I", "-c", TRAINING_STEP, PATH="").splitlines()
    assert Path(location).is_relative_to(packages)
    served = dict(line.split()[:2] for line in config)
    assert {op: served[op] for op in OPS} == dict.fromkeys(OPS, "C++")


def test_source_archive_builds_by_itself(tmp_path):
    source = make("sdist", tmp_path / "source")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*")}
    assert files | {"LICENSE", "CHANGELOG.md"} <= names
    assert not {name for name in names if name.startswith(("tests", "bench"))}
    pip = sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"
    quick = {"ROBUSTKERN_CUDA": "0", "CXXFLAGS": "-O0"}
    run(*pip, "--wheel-dir", tmp_path, source, **quick)
    (wheel,) = tmp_path.glob("*.whl")
    assert "robustkern/librobustkern_cpu.so" in ZipFile(wheel).namelist()
