"""The CUDA C++ kernels compute the truth, shown without a GPU: by fibers, on the CPU.

`emulator` gives C++ what the kernels use of CUDA. Their tests then run on them unchanged, for they
are registered where the CPU's kernels otherwise are.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests/emulator"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
MANY = "70001"  # samples, for which a fiber a thread would take minutes


def run(*command, **options):
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compile_emulated(output, *sources, options=()):
    torch = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    torch += [f"-L{path}" for path in cpp_extension.library_paths()]
    torch += [f"-Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    language = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    language += ["-include", "cuda_runtime.h", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    run(
        os.environ.get("CXX", "g++"), *language, *options, "-x", "c++", *sources, "-x", "none",
        *torch, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", output,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds the package, with the emulated kernels as the CPU's."""
    folder = tmp_path_factory.mktemp("emulated")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "robustkern", folder / "robustkern", ignore=ignored)
    compile_emulated(
        folder / "robustkern/librobustkern_cpu.so", *KERNELS, EMULATOR / "emulator.cpp",
        options=["-O1", "-shared", "-fPIC", "-fvisibility=hidden"],
    )  # fmt: skip
    return folder


def test_every_cuda_kernel_is_emulated(folder):
    script = "import robustkern; print(robustkern.__file__); robustkern.show_config()"
    lines = run(sys.executable, "-c", script, cwd=folder).splitlines()
    assert Path(lines[0]).is_relative_to(folder)
    emulated = {line.split()[0] for line in lines[2:] if line.split()[1] == "C++"}
    assert emulated == {kernel.stem for kernel in KERNELS}


@pytest.mark.parametrize("op", [kernel.stem for kernel in KERNELS])
def test_its_tests_pass_emulated(folder, op):
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not {MANY}"]
    run(sys.executable, "-m", "pytest", *options, ROOT / f"tests/test_{op}.py", cwd=folder)


def test_a_missing_barrier_is_noticed(tmp_path):
    """The emulator itself: threads that wait for different barriers stop it."""
    source, program = tmp_path / "kernel.cpp", tmp_path / "kernel"
    source.write_text(
        "void kernel() { if (threadIdx.x == 0) __syncthreads(); else emulated_warp_barrier(); }\n"
        "int main() {\n"
        "  cudaLaunchConfig_t config{dim3(1), dim3(32), 0, nullptr, nullptr, 0};\n"
        "  cudaLaunchKernelEx(&config, kernel);\n"
        "}\n"
    )
    compile_emulated(program, source, EMULATOR / "emulator.cpp")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "different barriers" in done.stderr
