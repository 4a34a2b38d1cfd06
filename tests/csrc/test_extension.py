"""The extension module: instruction sets, import errors, torch's C ABI, re-import, and what `import clipft` pulls
in."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
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
    with pytest.raises(ValueError, match=r'unknown instruction set "sse9"; expected ref, neon, neon_dot, .* or amx'):
        _C.set_isa("sse9")


OLD_TOOL = """#!/bin/sh
for file; do
    case "$file" in *.[cs]) grep -q -e '{word}' "$file" && echo 'Error: not known here: {word}' >&2 && exit 1 ;; esac
done
exec {tool} "$@"
"""


def build_kernels(folder: Path, names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """As ``setup.py build_ext`` does, of some sources."""
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "clipft/__init__.py"):
        (folder / part).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / part, folder / part)
    shutil.copytree(ROOT / "cuda", folder / "cuda")
    others = [path.name for path in (ROOT / "csrc").rglob("*.c") if not re.fullmatch(names, path.name)]
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns(*others))
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "objects"],
        cwd=folder,
        env={**os.environ, "CFLAGS": "-O0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "of, tool, word, missing",
    [
        ("gcc", "as", "{vex}", ["avx_vnni"]),  # binutils 2.35
        (
            "gcc",
            "gcc",
            '"avx512f\\|avxvnni\\|isa_avx512\\|"amx-tile',
            ["avx_vnni", "avx512", "avx512_vnni", "amx"],
        ),  # gcc 8
        ("clang", "clang", "avxvnni", ["avx_vnni"]),  # clang 11, as gcc 10
        ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-gcc", "+i8mm", ["neon_i8mm"]),  # gcc 9
    ],
)
def test_what_a_compiler_or_assembler_is_too_old_for_is_left_out(
    tmp_path: Path, of: str, tool: str, word: str, missing: list[str]
) -> None:
    real = shutil.which(tool)
    if real is None or shutil.which(of) is None or (platform.machine() != "x86_64" and not of.startswith("aarch64")):
        pytest.skip(f"needs {of}")
    old = tmp_path / "old" / tool
    old.parent.mkdir()
    old.write_text(OLD_TOOL.format(word=word, tool=real))
    old.chmod(0o755)
    tiers = ["neon" if of.startswith("aarch64") else "avx2", *missing]
    done = build_kernels(
        tmp_path,
        rf"cpu\.c|dispatch\.c|int8_({'|'.join(tiers)})\.c",
        CC=str(old) if tool == of else f"{of} -B{old.parent}/",
        LDSHARED=f"{of} -shared",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"is too old for (\w+): those kernels are left out", done.stdout) == missing
    [built] = (tmp_path / "out").rglob("_C*.so")
    symbols = built.read_bytes()
    assert [tier for tier in tiers if f"clipft_int8_dot_{tier}\0".encode() not in symbols] == missing


def test_free_threaded_python_is_refused() -> None:
    code = "import runpy, sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "does not support free-threaded Python yet" in done.stderr


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


def test_an_extension_without_the_ops_that_the_python_code_knows_says_to_build_again() -> None:
    """A source tree that was updated and not built again."""
    older = "import sys, types, torch, clipft; sys.modules['clipft._C'] = types.ModuleType('clipft._C'); "
    done = python(older + "clipft.contrastive_loss")
    assert done.returncode != 0 and re.search(
        r"ImportError: clipft's C extension is older than .* \(operator clipft::\w+ does not exist.*Build it again:",
        done.stderr,
    )


def test_import_twice() -> None:
    sys.modules.pop("clipft._C")
    again = importlib.import_module("clipft._C")
    assert again.isa() == _C.isa()
    assert torch.ops.clipft.contrastive_loss is not None


def test_import_without_torch_says_what_is_needed() -> None:
    done = python("import sys; sys.modules['torch'] = None; from clipft import _C")
    assert done.returncode != 0 and "ImportError: clipft needs torch >= 2.10" in done.stderr


@pytest.mark.parametrize(
    "version, says",
    [
        (
            "2.9.1+cu128",
            r"torch >= 2\.10, the torch that is installed \(2\.9\.1\+cu128\) is too old: it lacks {}; pip install",
        ),
        ("1.13.1", r"\(1\.13\.1\) is too old: it lacks {}; pip install 'torch>=2\.10'"),
        (
            "2.10.0",
            r"the torch that is installed \(2\.10\.0\) is too new for this clipft, or a build of .*: it lacks {};",
        ),
        (
            "3.0.0a0",
            r"\(3\.0\.0a0\) is too new for this clipft, .* it lacks {}; pip install -U clipft, or an older torch",
        ),
        (None, r"\(of no version\) is too old: it lacks {}"),
    ],
)
def test_import_with_a_torch_that_lacks_functions_says_what_to_do(
    tmp_path: Path, version: str | None, says: str
) -> None:
    """A library that is not loaded at all, and one that has none of the functions."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("" if version is None else f"__version__ = {version!r}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    missing = r"its library libtorch_cpu\.\w+"
    if version != "1.13.1" and shutil.which("gcc") is not None:
        library = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
        subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(library)], check=True)
        code += f"import ctypes; ctypes.CDLL({str(library)!r}); "
        missing = "aoti_torch_library_init_def"
    done = python(code + "from clipft import _C")
    assert done.returncode != 0
    assert re.search("ImportError: .*" + says.format(missing), done.stderr), done.stderr


WITHOUT_SHIMS = """
import torch, clipft
from clipft.ops.reference import contrastive_loss
torch.manual_seed(0)
x, t = (torch.nn.functional.normalize(torch.randn(9, 24), dim=1) for _ in range(2))
torch.testing.assert_close(clipft.contrastive_loss(x, t, 20.0), contrastive_loss(x, t, torch.tensor(20.0)))
for dtype in (torch.float32, torch.bfloat16):
    args = [torch.randn(*size).to(dtype).requires_grad_() for size in ((3, 5, 24), (16, 24), (16,), (4, 24), (16, 4))]
    plain = [a.detach().float().requires_grad_() for a in args]
    y = clipft.lora_linear(*args, 2.0)
    ours = torch.autograd.grad(y.float().square().sum(), args)
    x, w, bias, a, b = plain
    z = torch.nn.functional.linear(x, w, bias) + 2.0 * (x @ a.T @ b.T)
    torch.testing.assert_close(y.float(), z, atol=0.2 if dtype is torch.bfloat16 else 1e-4, rtol=1e-2)
    theirs = torch.autograd.grad(z, plain, 2 * y.detach().float())
    for our, their in zip(ours, theirs, strict=True):
        assert (our.float() - their).norm() < (2e-2 if dtype is torch.bfloat16 else 1e-5) * their.norm()
print("equal")
"""


def pretended(tmp_path: Path, lacks: str) -> str:
    """Code that makes `import clipft` take a clipft for which torch lacks a function: in a copy its name is another."""
    package = Path(sys.modules["clipft"].__file__).parent
    (tmp_path / "clipft").mkdir()
    for path in package.iterdir():
        if path != Path(_C.__file__):
            (tmp_path / "clipft" / path.name).symlink_to(path)
    machine_code = Path(_C.__file__).read_bytes()
    name = b"\0" + lacks.encode() + b"\0"
    assert name in machine_code
    other = Path(_C.__file__).name
    (tmp_path / "clipft" / other).write_bytes(machine_code.replace(name, b"\0x" + name[2:]))
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"


def test_products_without_the_shims_that_torch_does_not_promise(tmp_path: Path) -> None:
    done = python(pretended(tmp_path, "aoti_torch_cpu_addmm_out") + WITHOUT_SHIMS)
    assert done.stdout == "equal\n", done.stderr


def test_a_promised_function_is_missed(tmp_path: Path) -> None:
    done = python(pretended(tmp_path, "torch_get_num_threads") + "import clipft.ops")
    assert re.search(
        r"ImportError: the torch .* is too new for this clipft, .*: it lacks xorch_get_num_threads;", done.stderr
    )


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
    shutil.copy(package / "__init__.py", tmp_path / "clipft")
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
