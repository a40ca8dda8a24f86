"""Compile the Triton kernels for CUDA architectures, without a GPU: what each one needs of a multiprocessor.

python benchmarks/compile_cuda.py --output compile_cuda.json

Everything up to the launch is what happens on a GPU of the architecture. "spilled" are the bytes a thread keeps in
local memory besides its registers.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from scan_problems import VARIANTS, problem
from timing import publish

import kernels_cuda_dnc_gpt2 as cuda
import kernels_dnc_gpt2 as kernels

KERNELS = ("forward", "read", "read_backward", "backward")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """A machine with one GPU of the given architecture, on which nothing can be launched."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """In place of a kernel: compiles it at a launch, and does not launch it."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)

        return compile_only


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage.split("Function")[1])[1]) for name in ("REG", "STACK"))


def main() -> None:
    labels = {" ".join([variant[0], *(name for name, on in variant[1].items() if on)]): variant for variant in VARIANTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--variants", nargs="+", default=list(labels), choices=list(labels))
    parser.add_argument("--output")
    arguments = parser.parse_args()
    shape = (1, 2, arguments.slots, arguments.width, arguments.heads)
    compilers = {name: Compiler(getattr(cuda, f"{name}_kernel")) for name in KERNELS}
    for name, compiler in compilers.items():
        setattr(cuda, f"{name}_kernel", compiler)
    kernels.triton_problem = lambda device: None
    rows = []
    for architecture in arguments.architectures:
        triton.runtime.driver.set_active(Driver(architecture))
        for label in arguments.variants:
            x, state, config = problem(*labels[label], shape, getattr(torch, arguments.dtype), scan="triton")
            reads = kernels.fused_scan(x, state, config)[0]
            torch.autograd.grad(reads.sum(), x.read_keys)
            for name, compiler in compilers.items():
                if compiler.compiled is None:
                    continue
                warps, shared = compiler.compiled.metadata.num_warps, compiler.compiled.metadata.shared
                registers, spilled = resources(compiler.compiled)
                rows.append([f"sm_{architecture}", label, name, warps, registers, spilled, shared])
                compiler.compiled = None
    header = ["architecture", "variant", "kernel", "warps", "registers", "spilled", "shared memory"]
    title = f"Triton kernels, {arguments.slots} x {arguments.width}, {arguments.heads} heads, {arguments.dtype}"
    publish(f"{title}, triton {triton.__version__}", header, rows, arguments.output)


if __name__ == "__main__":
    main()
