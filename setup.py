"""Builds clipft._C: plain C, no torch, no C++ and no CUDA toolkit needed. Everything else is in pyproject.toml.

CLIPFT_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer; CLIPFT_WERROR=1 makes warnings errors (CI
does).
"""

import os
import re
import shutil
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

WARNINGS = ["-Wall", "-Wextra", "-Wvla", "-Wshadow", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
NO_COMPILER = """
clipft is built from C source and no C compiler was found (looked for: {compiler}).
  Debian, Ubuntu:  sudo apt-get install gcc libc6-dev python3-dev
  Fedora, RHEL:    sudo dnf install gcc python3-devel
  macOS:           xcode-select --install
Or set CC to the compiler to use.
"""
AVX_VNNI = """
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx2,avxvnni"))) __m256i dot(__m256i sum, __m256i x, __m256i w)
{
    return _mm256_dpbusd_avx_epi32(sum, x, w);
}
#endif
"""


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        compiler = self.compiler.compiler[0]
        if shutil.which(compiler) is None:
            sys.exit(NO_COMPILER.format(compiler=compiler))
        if not self.knows_avx_vnni():
            print(
                f"{compiler} or its assembler is too old for AVX-VNNI: these kernels are left out, AVX2's run instead"
            )
            for extension in self.extensions:
                extension.define_macros.append(("CLIPFT_NO_AVX_VNNI", "1"))
        super().build_extensions()

    def knows_avx_vnni(self) -> bool:
        """gcc does from 11 on and binutils from 2.36 on; they are not always of one age."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "avx_vnni.c")
            source.write_text(AVX_VNNI)
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except CompileError:
                return False
        return True


if sys.platform == "win32":
    sys.exit("clipft does not support Windows yet: it finds LibTorch by dlopen. Use WSL 2.")


def device_code_digest() -> int:
    """Of the device code that belongs to this C, as csrc/cuda_runtime/compile.c computes it of what it finds: the XOR
    of each file's 64-bit FNV-1a, over its text and a zero.
    """
    files = re.findall(r"^CUDA_FILE\((\w+)\)", Path("csrc/cuda_runtime/kernels.inc").read_text(), re.MULTILINE)
    digest = 0
    for name in ("common.cuh", "args.h", *(f"{file}.cu" for file in files)):
        state = 0xCBF29CE484222325
        for byte in Path("cuda", name).read_bytes() + b"\0":
            state = (state ^ byte) * 0x100000001B3 % 2**64
        digest ^= state
    return digest


# Contraction to FMA is off under -std=c11 and on under gnu11; the kernels want it.
compile_args = ["-std=gnu11", "-O3", "-fvisibility=hidden", "-fexceptions", "-fno-math-errno", *WARNINGS]
link_args = []
if os.environ.get("CLIPFT_WERROR") == "1":
    compile_args.append("-Werror")
if os.environ.get("CLIPFT_SANITIZE") == "1":
    compile_args += SANITIZERS
    link_args += SANITIZERS

setup(
    packages=[*find_packages(include=["clipft*"]), "clipft.cuda"],
    package_dir={"clipft.cuda": "cuda"},  # device code, compiled on the user's machine
    ext_modules=[
        Extension(
            "clipft._C",
            sources=sorted(glob("csrc/**/*.c", recursive=True)),
            depends=sorted(
                glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True) + glob("cuda/*.[ch]*")
            ),
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("CLIPFT_CUDA_DIGEST", f"0x{device_code_digest():x}U"),
            ],
            py_limited_api=True,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            libraries=["m"] if sys.platform != "darwin" else [],
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
