"""Builds clipft._C: plain C, no torch, no C++ and no CUDA toolkit needed. Everything else is in pyproject.toml.

CLIPFT_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer; CLIPFT_WERROR=1 makes warnings errors (CI
does).
"""

import os
import re
import shutil
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
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
FREE_THREADED = """
clipft does not support free-threaded Python yet: use the ordinary build of the same version (python3.14, say, in place
of python3.14t).
"""
PROBE = """
#undef TARGET
#if defined(__aarch64__) && !defined(__clang__)
#define TARGET "arch=armv8.2-a+{target}"
#else
#define TARGET "{target}"
#endif
#if defined({machine})
#include <{header}>
__attribute__((target(TARGET))) {vector} probe_{tier}({vector} a, {vector} b, {vector} c) {{ return {instruction}; }}
#endif
"""
X86_64 = {"machine": "__x86_64__", "header": "immintrin.h"}
AARCH64 = {"machine": "__aarch64__", "header": "arm_neon.h", "vector": "int32x4_t"}
AVX512 = "avx512f,avx512bw,avx512dq,avx512vl,fma"
BYTES = "vreinterpretq_s8_s32(b), vreinterpretq_s8_s32(c)"
# Above each architecture's baseline, what a compiler or the assembler behind it may be too old for. gcc knows AVX-VNNI
# from 11 on, binutils from 2.36 on, and they are not always of one age.
TIERS = {
    "avx2": {**X86_64, "target": "avx2,fma", "vector": "__m256", "instruction": "_mm256_fmadd_ps(a, b, c)"},
    "avx_vnni": {
        **X86_64,
        "target": "avx2,avxvnni",
        "vector": "__m256i",
        "instruction": "_mm256_dpbusd_avx_epi32(a, b, c)",
    },
    "avx512": {
        **X86_64,
        "target": AVX512,
        "vector": "__m512i",
        "instruction": "_mm512_mullo_epi64(a, _mm512_add_epi8(b, c))",
    },
    "avx512_vnni": {
        **X86_64,
        "target": f"{AVX512},avx512vnni",
        "vector": "__m512i",
        "instruction": "_mm512_dpbusd_epi32(a, b, c)",
    },
    "amx": {
        **X86_64,
        "target": "amx-tile,amx-int8",
        "vector": "int",
        "instruction": "(_tile_release(), a + b + c)",
    },
    "neon_dot": {**AARCH64, "target": "dotprod", "instruction": f"vdotq_s32(a, {BYTES})"},
    "neon_i8mm": {**AARCH64, "target": "i8mm", "instruction": f"vmmlaq_s32(a, {BYTES})"},
}


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        compiler = self.compiler.compiler[0]
        if shutil.which(compiler) is None:
            sys.exit(NO_COMPILER.format(compiler=compiler))
        for tier in [] if self.knows(*TIERS) else [tier for tier in TIERS if not self.knows(tier)]:
            print(f"{compiler} or its assembler is too old for {tier}: those kernels are left out, others run instead")
            for extension in self.extensions:
                extension.define_macros.append((f"CLIPFT_NO_{tier.upper()}", "1"))
                extension.sources = [path for path in extension.sources if not path.endswith(f"_{tier}.c")]
        super().build_extensions()

    def knows(self, *tiers: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("".join(PROBE.format(tier=tier, **TIERS[tier]) for tier in tiers))
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except CompileError:
                return False
        return True


if sys.platform == "win32":
    sys.exit("clipft does not support Windows yet: it finds LibTorch by dlopen. Use WSL 2.")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(FREE_THREADED)


def device_code_digest() -> int:
    """Of the device code that belongs to this C, as csrc/cuda_runtime/compile.c computes it of what it finds: the XOR
    of each file's 64-bit FNV-1a, over its text and a zero.
    """
    files = re.findall(r"^CUDA_FILE\((\w+)\)", Path("csrc/cuda_runtime/kernels.inc").read_text(), re.MULTILINE)
    digest = 0
    for name in ("common.cuh", "lora.cuh", "args.h", *(f"{file}.cu" for file in files)):
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
    packages=[*find_namespace_packages(include=["clipft*"], exclude=["*__pycache__*"]), "clipft.cuda"],
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
