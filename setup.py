"""Builds clipft._C: plain C, no torch, no C++ and no CUDA toolkit needed. Everything else is in pyproject.toml.

CLIPFT_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer; CLIPFT_WERROR=1 makes warnings errors (CI
does).
"""

import os
import shutil
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wvla", "-Wshadow", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
NO_COMPILER = """
clipft is built from C source and no C compiler was found (looked for: {compiler}).
  Debian, Ubuntu:  sudo apt-get install gcc libc6-dev python3-dev
  Fedora, RHEL:    sudo dnf install gcc python3-devel
  macOS:           xcode-select --install
Or set CC to the compiler to use.
"""


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        compiler = self.compiler.compiler[0]
        if shutil.which(compiler) is None:
            sys.exit(NO_COMPILER.format(compiler=compiler))
        super().build_extensions()


if sys.platform == "win32":
    sys.exit("clipft does not support Windows yet: it finds LibTorch by dlopen. Use WSL 2.")

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
                glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True) + glob("cuda/*.h")
            ),
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            libraries=["m"] if sys.platform != "darwin" else [],
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
