"""The extension module: instruction sets, import errors, torch's C ABI, re-import, and what `import clipft` pulls
in."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INT8_ONLY

from clipft import _C

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_kernels_run_on_the_chosen_instruction_set(int8_isa: str) -> None:
    assert _C.isa() == int8_isa
    kernels = _C.kernels()
    assert kernels.pop("int8_dot") == int8_isa
    assert set(kernels.values()) == {INT8_ONLY.get(int8_isa, int8_isa)}


@pytest.mark.parametrize("isa_name", _C.isas())
def test_environment_lowers_the_instruction_set(isa_name: str) -> None:
    done = python("from clipft import _C; print(_C.isa())", CLIPFT_ISA=isa_name)
    assert done.stdout.strip() == isa_name, done.stderr


def test_an_instruction_set_that_is_missing_is_an_error() -> None:
    absent = next(isa for isa in ("neon", "avx2", "avx512") if isa not in _C.isas())
    with pytest.raises(
        ValueError,
        match=f"this machine does not support the instruction set {absent}; the best it has is {_C.isas()[-1]}",
    ):
        _C.set_isa(absent)
    done = python("import clipft.ops", CLIPFT_ISA=absent)
    assert (
        done.returncode != 0
        and f"ImportError: clipft: this machine does not support the instruction set {absent}" in done.stderr
    )


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r'unknown instruction set "sse9"; expected ref, neon, neon_dot, .* or avx512_vnni'
    ):
        _C.set_isa("sse9")


OLD_ASSEMBLER = """#!/bin/sh
for file; do
    case "$file" in *.s) grep -q '{{vex}}' "$file" && echo 'Error: no such instruction: {{vex}}' >&2 && exit 1 ;; esac
done
exec {assembler} "$@"
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="is about gcc on x86-64")
def test_an_assembler_that_is_too_old_for_avx_vnni_builds_the_rest(tmp_path: Path) -> None:
    """Of the sources, those that name these kernels."""
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "clipft/_version.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "clipft" / "__init__.py").touch()
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    named = {"cpu.c", "dispatch.c", "int8_avx_vnni.c"}
    others = {path.name for path in (ROOT / "csrc").rglob("*.c")} - named
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns(*others))
    old = tmp_path / "old" / "as"
    old.parent.mkdir()
    old.write_text(OLD_ASSEMBLER.format(assembler=shutil.which("as")))
    old.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "objects"],
        cwd=tmp_path,
        env={**os.environ, "CC": f"gcc -B{old.parent}/", "CFLAGS": "-O0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "these kernels are left out" in done.stdout
    [built] = (tmp_path / "out").rglob("_C*.so")
    assert b"avx2" in built.read_bytes()


def test_other_device_code_is_refused(tmp_path: Path) -> None:
    """A source tree that was updated and not built again: kernels would read their arguments by another struct."""
    (tmp_path / "clipft").mkdir()
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    built = Path(shutil.copy(_C.__file__, tmp_path / "clipft"))

    def problem() -> str:
        own = Path(shutil.copy(built, tmp_path / "clipft" / f"{len(list(built.parent.iterdir()))}.so"))
        spec = importlib.util.spec_from_file_location("_C", own)
        assert spec is not None
        return importlib.util.module_from_spec(spec).cuda_problem(0)  # made, and not executed: no ops are registered

    assert "device code" not in problem()
    with pytest.raises(ValueError, match=r"there is no loss\.cu"):
        _C.cuda_problem(0, "loss")
    with (tmp_path / "cuda" / "lora.cu").open("a") as file:
        file.write("// newer")
    assert "device code in" in problem() and "is not what its C extension was compiled with" in problem()
    (tmp_path / "cuda" / "args.h").unlink()
    assert "device code cannot be read" in problem()


def test_import_twice() -> None:
    sys.modules.pop("clipft._C")
    again = importlib.import_module("clipft._C")
    assert again.isa() == _C.isa()
    assert torch.ops.clipft.contrastive_loss is not None


def test_import_without_torch_says_what_is_needed() -> None:
    done = python("import sys; sys.modules['torch'] = None; from clipft import _C")
    assert done.returncode != 0 and "ImportError: clipft needs torch >= 2.13" in done.stderr


def test_import_with_a_torch_that_is_too_old_says_what_is_needed(tmp_path: Path) -> None:
    """A torch whose library lacks the functions: here one that is not loaded at all, and one that has none of them."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    done = python(code + "from clipft import _C")
    assert "ImportError: clipft needs torch >= 2.13: its library libtorch_cpu" in done.stderr
    if shutil.which("gcc") is None:
        return
    library = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(library)], check=True)
    done = python(code + f"import ctypes; ctypes.CDLL({str(library)!r}); from clipft import _C")
    assert "ImportError: clipft needs torch >= 2.13: aoti_torch_library_init_def was not found" in done.stderr


def test_import_is_lazy() -> None:
    done = python(
        "import sys, clipft; print([m for m in ('torch', 'torchvision', 'transformers') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_name() -> None:
    import clipft

    with pytest.raises(AttributeError, match="module 'clipft' has no attribute 'contrastiv_loss'"):
        _ = clipft.contrastiv_loss
    assert {"contrastive_loss", "load", "CLIPTrainer"} <= set(dir(clipft))


def test_source_tree_without_the_extension_says_what_to_do(tmp_path: Path) -> None:
    package = Path(sys.modules["clipft"].__file__).parent
    (tmp_path / "clipft").mkdir()
    for name in ("__init__.py", "_version.py"):
        shutil.copy(package / name, tmp_path / "clipft")
    done = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import clipft")
    assert "clipft's C extension is not built here" in done.stderr and "pip install ." in done.stderr


@pytest.mark.parametrize(
    "op, args, text",
    [
        ("quick_gelu", (torch.ones(3).double(),), "TypeError: clipft.quick_gelu: input must be float32, bfloat16 or"),
        ("quick_gelu", (torch.ones(()),), "ValueError: clipft.quick_gelu: input must have 1 to 8 dimensions, got"),
        (
            "dropout_mask",
            (torch.tensor(3), 2**40, 2**40, 0.1),
            "OutOfMemoryError: clipft.dropout_mask: a float32 result of 2^63 elements or more was asked for",
        ),
    ],
)
def test_errors_begin_with_their_kind(op: str, args: tuple, text: str) -> None:
    """All that torch's C ABI throws is a RuntimeError; Python makes another of it by that word (csrc/error.h)."""
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.clipft, op)(*args)
    assert str(error.value).startswith(text)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to read torch's headers")
def test_our_declarations_equal_torchs() -> None:
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "tests" / "abi" / "conformance.cpp"
    done = subprocess.run(
        ["g++", "-std=c++20", "-fsyntax-only", f"-I{include}", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler to read CUDA's headers")
def test_our_declarations_equal_cudas() -> None:
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    include = [
        h.parent for h in (*wheels.glob("*/include/nvrtc.h"), Path("/usr/local/cuda/include/nvrtc.h")) if h.is_file()
    ]
    include = [folder for folder in include if (folder / "cuda.h").is_file()]
    if not include:
        pytest.skip("needs CUDA's headers, which a CUDA build of torch brings")
    source = ROOT / "tests" / "abi" / "cuda_conformance.cpp"
    command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{include[0]}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("cc") is None, reason="needs make and a C compiler")
def test_c_kernels(tmp_path: Path) -> None:
    """The kernels' own tests, without torch, on every instruction set of this machine."""
    done = subprocess.run(
        ["make", "-C", str(ROOT / "tests" / "c"), "check", f"BUILD={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout[-2000:] + done.stderr
