"""The compiled libraries keep to the stable ABI, and the package builds without a compiler."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import robustkern

ROOT = Path(__file__).parents[1]
CUDA_LIBRARY = Path(robustkern.__file__).parent / "librobustkern_cuda.so"
LIBRARIES = sorted(Path(robustkern.__file__).parent.glob("librobustkern_*.so"))
# What a Linux with torch has: the C and C++ run-time libraries, and torch's own.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
LOADER = re.compile(r"ld-linux.*\.so\.\d|libcudart\.so\.\d+")
STABLE_HEADERS = [
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
]

needs_libraries = pytest.mark.skipif(not LIBRARIES, reason="installed without compiled libraries")
needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="nm and readelf are not installed"
)


def undefined_symbols(library: Path) -> set[str]:
    output = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def stable_functions() -> set[str]:
    """What the headers declare to those who want to run under torch 2.10."""
    options = ["-E", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    include = Path(torch.__file__).parent / "include"
    text = subprocess.check_output(
        ["c++", *options, f"-I{include}", "-xc++", "-"],
        input="".join(f"#include <{header}>\n" for header in STABLE_HEADERS),
        text=True,
    )
    return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", text))


def build(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_libraries
@needs_binutils
@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_needs_no_python_and_only_the_stable_abi(library: Path) -> None:
    symbols = undefined_symbols(library)
    torch_symbols = {s for s in symbols if "torch" in s}
    assert torch_symbols, "the stable ABI's own functions should show up here"
    later = torch_symbols - stable_functions()
    assert not later, "not of the stable ABI, or newer than torch 2.10"
    mangled = {s for s in symbols if s.startswith("_Z")}
    assert not {s for s in mangled if "c10" in s or "2at" in s}, "C++ symbols of libtorch"
    assert not {s for s in symbols if s.startswith(("Py", "_Py"))}, "symbols of Python"


@needs_libraries
@needs_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_links_only_libtorch_and_the_system(library: Path) -> None:
    dynamic = subprocess.check_output(["readelf", "--dynamic", library], text=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert "libtorch.so" in needed
    others = needed - SYSTEM_LIBRARIES - {"libtorch.so"}
    assert all(LOADER.fullmatch(name) for name in others), others
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@needs_libraries
@needs_binutils
def test_library_exports_nothing_but_its_registration() -> None:
    for library in LIBRARIES:
        output = subprocess.check_output(["nm", "-DC", "--defined-only", library], text=True)
        assert "robustkern" not in output, (
            "kernels should be hidden, so that no other library's clash"
        )


@pytest.mark.skipif(not CUDA_LIBRARY.exists(), reason="built without nvcc")
def test_cuda_library_has_every_architecture() -> None:
    """Ampere's and Hopper's machine code, and PTX for what comes after."""
    from triton import knobs  # brings the tool along

    tool = knobs.nvidia.cuobjdump.path
    listed = subprocess.check_output([tool, "-lelf", "-lptx", CUDA_LIBRARY], text=True)
    kernels = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    found = Counter(re.findall(r"(sm_\d+\.(?:cubin|ptx))", listed))
    assert set(found) == {"sm_80.cubin", "sm_90.cubin", "sm_90.ptx"}
    assert min(found.values()) >= kernels


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"ROBUSTKERN_TORCH_INCLUDE": "no/such/folder"}, "no torch >= 2.10 was found"),
    ],
)
def test_build_without_toolchain_succeeds_and_says_so(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    done = build(environment, "build_ext", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WITHOUT its compiled kernels" in done.stderr
    assert reason in done.stderr
    assert not list(tmp_path.rglob("*.so"))
