"""Compiles every cuda/*.cu with NVRTC, and with nvcc where it is installed, for each architecture; prints registers and
shared memory of every kernel and fails on a spill.

    python .ci/cuda_matrix.py

NVRTC comes with a CUDA build of torch, or from PyPI (nvidia-cuda-nvrtc).
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CUDA = Path(__file__).parents[1] / "cuda"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
REPORT = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.S,
)


def nvrtc() -> ctypes.CDLL:
    folders = [Path(sysconfig.get_paths()["purelib"]) / "nvidia", Path("/usr/local/cuda")]
    found = [f for folder in folders for f in sorted(folder.glob("**/libnvrtc.so.1[0-9]"))]
    if not found:
        sys.exit("cuda_matrix: no NVRTC: pip install nvidia-cuda-nvrtc")
    for builtins in found[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[0]))


def compile_nvrtc(library: ctypes.CDLL, source: Path, architecture: str) -> str:
    """The log, with what ptxas says; an error ends the program."""

    def texts(*values: str) -> ctypes.Array:
        return (ctypes.c_char_p * len(values))(*(v.encode() for v in values))

    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    names = ("common.cuh", "lora.cuh", "args.h")
    contents = texts(*((CUDA / name).read_text() for name in names))
    text = source.read_bytes()
    if library.nvrtcCreateProgram(
        ctypes.byref(program), text, source.name.encode(), len(names), contents, texts(*names)
    ):
        sys.exit(f"cuda_matrix: NVRTC does not take {source.name}")
    options = texts(f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v")
    failed = library.nvrtcCompileProgram(program, len(options), options)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        sys.exit(f"cuda_matrix: NVRTC does not compile {source.name} for {architecture}:\n{log.value.decode()}")
    return log.value.decode()


def compile_nvcc(source: Path, architecture: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-o", f"{folder}/out", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "warning" in done.stderr:
        sys.exit(f"cuda_matrix: nvcc on {source.name} for {architecture}:\n{done.stderr}")
    return done.stderr


def main() -> int:
    library, spills = nvrtc(), 0
    compilers = {"nvrtc": lambda source, architecture: compile_nvrtc(library, source, architecture)}
    if shutil.which("nvcc"):
        compilers["nvcc"] = compile_nvcc
    else:
        print("nvcc is not installed: NVRTC only")
    for name, compiler in compilers.items():
        for source in sorted(CUDA.glob("*.cu")):
            expected = len(re.findall(r"^KERNEL\(", source.read_text(), re.M))
            for architecture in ARCHITECTURES:
                kernels = REPORT.findall(compiler(source, architecture))
                if len(kernels) != expected:
                    sys.exit(f"cuda_matrix: {name} tells of {len(kernels)} of {expected} kernels in {source.name}")
                for kernel, stack, stores, loads, registers, shared in kernels:
                    spilled = int(stack) + int(stores) + int(loads)
                    spills += spilled > 0
                    words = f"{registers:>4} registers {shared or 0:>6} B shared {spilled:>4} B spilled"
                    print(f"{name:6} {architecture:7} {kernel:26} {words}")
    if spills:
        print(f"cuda_matrix: {spills} kernels spill registers or use a stack")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
