"""Builds the compiled libraries; everything else is in pyproject.toml.

The libraries use LibTorch's stable ABI and no Python symbols, so one wheel serves every Python and
every torch >= 2.10. Torch itself is neither imported nor linked here: only its headers are read.

Environment:
    CXX, CXXFLAGS: the C++ compiler and further options for it.
    MAX_JOBS: how many files are compiled at once.
    NVCC_APPEND_FLAGS: nvcc's own; -lineinfo tells profilers the lines, in a larger library.
    ROBUSTKERN_CUDA: 0 leaves the CUDA library out even where nvcc is found.
    ROBUSTKERN_TORCH_INCLUDE: torch's include folder, where it is not the installed torch's.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10, the oldest that can load them
WARNINGS = "-Wall -Wextra -Wno-unknown-pragmas"
COMPILE = f"-c -O3 -std=c++17 {TARGET} -Icsrc"
HOST = "-fPIC -fvisibility=hidden -fopenmp-simd"
CUDA_OPTIONS = (
    "--expt-relaxed-constexpr "  # std::numeric_limits in kernels
    "-Xfatbin=-compress-all"  # machine code too: by default nvcc compresses the PTX alone
)
CUDA_TARGETS = (
    "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 "
    "-gencode=arch=compute_90,code=compute_90"
)


def find_torch_include():
    """The include folder of torch >= 2.10, or None."""
    spec = importlib.util.find_spec("torch")  # locates, does not import
    # Under build isolation torch is hidden from the import path, but is where it always was.
    installed = [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    candidates = [Path(spec.origin).parent] if spec and spec.origin else installed
    includes = [folder / "include" for folder in candidates]
    if "ROBUSTKERN_TORCH_INCLUDE" in os.environ:
        includes = [Path(os.environ["ROBUSTKERN_TORCH_INCLUDE"])]
    return next((i for i in includes if (i / "torch/csrc/stable/c/shim.h").exists()), None)


def find_compiler():
    """The C++ compiler's command, or None."""
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)


def find_nvcc():
    """The CUDA compiler's path, or None."""
    if os.environ.get("ROBUSTKERN_CUDA") == "0":
        return None
    cuda_home = os.environ.get("CUDA_HOME")
    found = cuda_home and shutil.which("nvcc", path=f"{cuda_home}/bin")
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_ninja():
    """The command that runs ninja, or None."""
    if shutil.which("ninja"):
        return ["ninja"]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else None


def obstacle():
    """Why the compiled libraries cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "it is built on Linux only"
    if find_compiler() is None:
        return "no C++ compiler was found (c++, g++, clang++, or what CXX names)"
    if find_torch_include() is None:
        return "no torch >= 2.10 was found: install torch first, or set ROBUSTKERN_TORCH_INCLUDE"
    return None


def extensions():
    """The libraries that can be built here: one for each device, from its folder in csrc."""
    found = [Extension("robustkern.librobustkern_cpu", sources("cpu/*.cpp"))]
    if find_nvcc() and sources("cuda/*.cu"):
        found.append(Extension("robustkern.librobustkern_cuda", sources("cuda/*.cu")))
    return found


def sources(pattern):
    """The files of csrc that match, relative to ROOT: error messages name them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


class BuildLibraries(build_ext):
    """Compiles with ninja, or one file after the other where there is none."""

    def finalize_options(self):
        """Choose the folder of the objects."""
        super().finalize_options()
        # pip's folder is deleted after every call; this one keeps what has not changed.
        self.build_temp = f"build/temp.{self.plat_name}"

    def get_ext_filename(self, name):
        """The library's path, from the module name that setuptools asks for."""
        return os.path.join(*name.split(".")) + ".so"  # no Python in the ABI, none in the name

    def build_extensions(self):
        """Compile and link all libraries together."""
        os.chdir(ROOT)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        # Libtorch is loaded by `import torch`; the link only records its name, and a stub will do.
        stub = f"{self.build_temp}/libtorch.so"
        stub_command = f"{find_compiler()} -shared -x c /dev/null -Wl,-soname,libtorch.so -o {stub}"
        steps = [(stub, [], stub_command)]
        for extension in self.extensions:
            steps += self.steps(extension, stub)
        run(steps, self.build_temp)
        for extension in self.extensions:
            built = f"{self.build_temp}/{self.get_ext_filename(extension.name)}"
            library = Path(self.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(built, str(library))

    def steps(self, extension, stub):
        """(output, inputs, command) of every object of one library and of its link."""
        torch_include = f"-isystem {shlex.quote(str(find_torch_include()))}"
        if extension.name.endswith("_cuda"):
            compiler, host = shlex.quote(find_nvcc()), f"-Xcompiler={HOST.replace(' ', ',')}"
            compile_options = (
                f"{COMPILE} {CUDA_TARGETS} {CUDA_OPTIONS} -DUSE_CUDA {host} -MD -MF $out.d"
            )
            link_options = f"-shared {CUDA_TARGETS} -cudart=shared -Xlinker=--no-as-needed"
        else:
            compiler, user = find_compiler(), os.environ.get("CXXFLAGS", "")
            compile_options = f"{COMPILE} {HOST} {WARNINGS} {user} -MMD -MF $out.d"
            # Libtorch's stub has no symbols: without the option the linker would drop it.
            link_options = "-shared -Wl,--no-as-needed"
        library = f"{self.build_temp}/{self.get_ext_filename(extension.name)}"
        objects = [
            f"{self.build_temp}/{Path(source).with_suffix('.o')}" for source in extension.sources
        ]
        steps = [
            (output, [source], f"{compiler} {compile_options} {torch_include} $in -o $out")
            for source, output in zip(extension.sources, objects, strict=True)
        ]
        torch = f"-L{self.build_temp} -ltorch"  # nvcc would put the stub's path before its options
        link = f"{compiler} {link_options} {' '.join(objects)} {torch} -o $out"
        return [*steps, (library, [*objects, stub], link)]


def run(steps, folder):
    """Runs the steps whose inputs or commands have changed since the last time."""
    ninja = find_ninja()
    if ninja is None:
        for output, inputs, command in steps:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            command = command.replace("$in", " ".join(inputs)).replace("$out", output)
            print(command, flush=True)
            subprocess.run(command, shell=True, check=True)
        return
    lines = [f"builddir = {folder}"]
    for number, (output, inputs, command) in enumerate(steps):
        lines += [f"rule step{number}", f"  command = {command}", "  description = $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"] if "$out.d" in command else []
        lines += [f"build {output}: step{number} {' '.join(inputs)}"]
    Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([*ninja, "-f", f"{folder}/build.ninja", *jobs], check=True)


class Wheel(bdist_wheel):
    """A wheel for one platform and any Python."""

    def get_tag(self):
        """(Python, ABI, platform)."""
        return ("py3", "none", super().get_tag()[2])


reason = obstacle()
if reason:
    print(
        "robustkern: installing WITHOUT its compiled kernels; every op will run its slow PyTorch "
        f"reference: {reason}.",
        file=sys.stderr,
    )
setup(
    ext_modules=[] if reason else extensions(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
