"""What the GPU kernels need: registers, shared memory, stack and spills, compiled without a GPU.

Every Triton kernel is compiled for sm_80 and sm_90 as its launcher launches it: the launchers run
on small CPU tensors, and a stand-in for the driver compiles each launch, with every configuration
that autotuning may choose, where it would have started it. The CUDA C++ kernels are read from the
compiled library, if it was built. Exits with status 1 if any kernel has a stack or spills.

Run `python bench/resources.py` with each Triton that counts; it replaces the rows of its version.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before any kernel is decorated

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from robustkern.triton._spectral import spectral
from robustkern.triton._stencil import stencil
from robustkern.triton._toeplitz import toeplitz
from robustkern.triton.gradient_difference import (
    gradient_difference,
    gradient_difference_backward,
)

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Row = dict[str, Any]


class CompilingDriver:
    """Looks to Triton like the driver of a GPU of each architecture; `arch` is the device."""

    arch = ARCHS[0]

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Named calls of the launchers: each kernel in each dtype and kind of shape and layout."""
    yield "float16 image", partial(difference_and_backward, torch.zeros(3, 3, 32, 32, dtype=F16))
    for dtype in (F32, BF16, F64):
        kind = str(dtype).removeprefix("torch.")
        for name, shape in (("small", (3, 2)), ("image", (3, 3, 32, 32)), ("large", (1, 2**16))):
            yield (
                f"{kind} {name}",
                partial(difference_and_backward, torch.zeros(shape, dtype=dtype)),
            )
        yield f"{kind} strided", partial(difference_and_backward, channels_last(3, 32, 32, dtype))
        for form in (False, True):
            name = f"{kind} {'form' if form else 'product'}"
            for channels in (1, 3, 16):
                g = torch.zeros(2, channels, 64, 64, dtype=dtype)
                k = torch.zeros(channels, channels, 7, 7, dtype=dtype)
                if channels < 16:
                    yield f"{name} {channels}x64x64", partial(stencil, g, k, form)
                if dtype != BF16:  # transformed in float32
                    yield f"{name} {channels}x64x64", partial(spectral, g, k, form)
            if dtype != F64:
                g, k = (
                    torch.zeros(2, 1, 28, 28, dtype=dtype),
                    torch.zeros(1, 1, 55, 55, dtype=dtype),
                )
                yield f"{name} 1x28x28", partial(toeplitz, g, k, form)
                # Nothing a power of two, most loops, masks for the support: the most registers.
                g, k = channels_last(3, 31, 29, dtype), torch.zeros(3, 3, 31, 29, dtype=dtype)
                yield f"{name} strided 3x31x29", partial(toeplitz, g, k, form)


def channels_last(*image: Any) -> torch.Tensor:
    """Two images of (*shape, dtype)."""
    *shape, dtype = image
    return torch.zeros(2, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def difference_and_backward(a: torch.Tensor) -> None:
    """Both kernels of gradient_difference, against a contiguous operand."""
    b = torch.zeros(a.shape, dtype=a.dtype)
    gradient_difference_backward(gradient_difference(a, b), a, b)


def triton_rows() -> list[Row]:
    """A row for each kernel, launch, configuration and architecture."""
    rows: list[Row] = []
    variant = ""

    def compile_only(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
        configuration = options.pop("configuration", "")
        options["warmup"] = True
        name = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
        for device.arch in ARCHS:
            compiled = run(kernel, *arguments, **options)
            # Triton rounds a float to float32, which float64 kernels would compute with.
            assert "fp32" not in compiled.src.signature.values(), name
            rows.append(
                {
                    "kernel": name,
                    "variant": f"{variant}{configuration}",
                    "arch": f"sm_{device.arch}",
                    "compiler": f"triton {triton.__version__}",
                    **read_cubin(compiled.asm["cubin"]),
                    "shared": compiled.metadata.shared,
                }
            )
            print(rows[-1], file=sys.stderr)

    def compile_all(tuner: Autotuner, *arguments: Any, **options: Any) -> None:
        for config in tuner.configs:
            tile = "".join(f", {key} {value}" for key, value in config.kwargs.items())
            name = f"{tile}, {config.num_warps} warps, {config.num_stages} stages"
            tuner.fn.run(*arguments, configuration=name, **options, **config.all_kwargs())

    device = CompilingDriver()
    driver.set_active(device)
    run = JITFunction.run
    JITFunction.run, Autotuner.run = compile_only, compile_all
    for name, launch in launches():
        variant = name
        launch()
    return rows


def read_cubin(cubin: bytes) -> Row:
    """Registers, stack and accesses to local memory, from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    return {
        "registers": number("REG", usage),
        "stack": number("STACK", usage),
        "local_stores": len(re.findall(r"\bSTL\b", code)),
        "local_loads": len(re.findall(r"\bLDL\b", code)),
    }


def library_rows(path: Path) -> list[Row]:
    """A row for each kernel of the CUDA library and architecture; none if it was not built."""
    if not path.exists():
        return []
    rows = []
    arch = function = ""
    for line in output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)).splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+):", line):
            function = found[1]
        elif "REG:" in line:
            kernel, _, variant = demangle(function).partition("<")
            rows.append(
                {
                    "kernel": kernel,
                    "variant": variant.removesuffix(">"),
                    "arch": arch,
                    "compiler": "nvcc",
                    "registers": number("REG", line),
                    "stack": number("STACK", line),  # what is spilled lies there
                    "shared": number("SHARED", line),
                }
            )
    return rows


def demangle(symbol: str) -> str:
    """The function's name and template arguments, without namespaces and parameters."""
    name = output("c++filt", symbol).strip().replace("(anonymous namespace)::", "")
    name = re.sub(r"(>|^[^<]*)\(.*\)$", r"\1", name).removeprefix("void ")
    return name.replace("robustkern::", "")


def number(label: str, text: str) -> int:
    """What cuobjdump reports under a label."""
    found = re.search(rf"\b{label}:(\d+)", text)
    assert found, f"no {label} in {text!r}"
    return int(found[1])


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile, print each row as it comes, write the table, judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    default = ROOT / "bench" / "results" / "resources.json"
    parser.add_argument("--output", type=Path, default=default)
    path = parser.parse_args().output
    rows = triton_rows() + library_rows(ROOT / "robustkern" / "librobustkern_cuda.so")
    compilers = {row["compiler"] for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in kept if row["compiler"] not in compilers]
    order = ("compiler", "kernel", "variant", "arch")
    table = sorted(kept + rows, key=lambda row: [row[key] for key in order])
    lines = ",\n".join(json.dumps(row) for row in table)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    print(f"written: {path}")
    spilled = [row for row in rows if any(map(row.get, ("stack", "local_stores", "local_loads")))]
    for row in spilled:
        print(f"stack or spills: {row}")
    sys.exit(1 if spilled else 0)


if __name__ == "__main__":
    main()
