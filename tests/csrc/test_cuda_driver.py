"""How the kernels are found, compiled, kept on disk and loaded; what is said where they cannot be; and that the
emulated GPU's checks find what they are for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from emulated_cuda import ROOT, EmulatedCuda, build
from int8_cases import Int8Case, check_case
from loss_cases import LossCase, check_contrastive
from scripts import Script

import clipft
from clipft import _C

KERNELS = sorted(path.stem for path in (ROOT / "cuda").glob("*.cu"))
PROBLEM = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
from emulated_cuda import EmulatedCuda
gpu = EmulatedCuda(Path({folder!r}))
print(gpu.problem({device}), gpu.compilations())
"""


def start(folder: Path, cache: Path, code: str = PROBLEM, device: int = 0, **environment: str) -> Script:
    text = code.format(tests=[str(ROOT / "tests")], folder=str(folder), device=device)
    return Script(text, XDG_CACHE_HOME=str(cache), **environment)


def said(script: Script) -> str:
    done = script.finish()
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cuda_kernels_are_compiled_once_and_kept(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    """One process after another and two at once; a damaged file, what is not a file of one's own that nobody else may
    write, another driver and another GPU are compiled anew."""
    both = [start(emulated_cuda_folder, tmp_path) for _ in range(2)]
    assert [said(p).split()[0] for p in both] == ["None", "None"]
    files = sorted((tmp_path / "clipft" / "cuda").iterdir())
    assert [f.name.split("-")[:2] for f in files] == [[k, "sm_90"] for k in KERNELS]
    assert [f.suffix for f in files] == [".cubin"] * len(KERNELS)
    assert said(start(emulated_cuda_folder, tmp_path)) == "None 0"
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1])
    files[1].write_bytes(b"\0" + files[1].read_bytes()[1:])
    files[2].symlink_to(files[2].rename(tmp_path / "elsewhere"))
    files[3].chmod(0o666)
    files[4].unlink()
    os.mkfifo(files[4])
    assert said(start(emulated_cuda_folder, tmp_path)) == "None 5"
    assert files[0].read_bytes() == whole
    assert all(file.is_file() and not file.is_symlink() for file in files)
    assert said(start(emulated_cuda_folder, tmp_path, EMULATED_DRIVER="12080")) == f"None {len(KERNELS)}"
    assert said(start(emulated_cuda_folder, tmp_path, EMULATED_CAPABILITY="80")) == f"None {len(KERNELS)}"


FIRST_LOSS = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
import torch, clipft
from emulated_cuda import EmulatedCuda
gpu = EmulatedCuda(Path({folder!r}))
with gpu.installed():
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    clipft.contrastive_loss(x, x, 20.0)
print(gpu.compilations())
"""


def test_cuda_kernels_are_compiled_when_an_op_wants_them(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    assert said(start(emulated_cuda_folder, tmp_path, FIRST_LOSS)) == "2"
    kept = {path.name.split("-")[0] for path in (tmp_path / "clipft" / "cuda").iterdir()}
    assert kept == {"contrastive", "losses"}


def test_cuda_kernels_that_are_old_or_of_another_nvrtc(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    """A patch release of NVRTC has the version of the one before; what nobody used for long is removed, no more."""
    folder, library = tmp_path / "clipft" / "cuda", emulated_cuda_folder / "libnvrtc.so"
    assert said(start(emulated_cuda_folder, tmp_path)) == f"None {len(KERNELS)}"
    before = sorted(folder.iterdir())
    for name in ("note.txt", "losses-sm_80-0.cubin.7.0.tmp"):
        (folder / name).touch()
    for path in (*before[1:], *folder.glob("*[!n]")):
        os.utime(path, (0, 0))
    os.utime(library, (0, 0))
    assert said(start(emulated_cuda_folder, tmp_path)) == f"None {len(KERNELS)}"
    left = {path.name for path in folder.iterdir()}
    assert left & {path.name for path in before} == {before[0].name}
    assert "note.txt" in left and len(left) == len(KERNELS) + 2


def test_cuda_works_without_a_place_to_keep_kernels(emulated_cuda_folder: Path) -> None:
    assert said(start(emulated_cuda_folder, Path("/proc/nowhere"))) == f"None {len(KERNELS)}"


@pytest.mark.parametrize(
    "device, environment, problem",
    [
        (
            0,
            {"EMULATED_CAPABILITY": "70"},
            "NVRTC 13.0 does not compile for this GPU, sm_70, only for sm_75 to sm_100; a torch for an older CUDA may "
            "bring an NVRTC that does",
        ),
        (
            0,
            {"EMULATED_NVRTC_FAILS": "1"},
            "NVRTC 13.0 could not compile losses.cu for sm_90: contrastive.cu(1): error: as the test wants it",
        ),
        (3, {}, "the CUDA driver does not know the GPU: invalid device ordinal"),
        (64, {}, "clipft knows GPUs 0 to 63 only"),
    ],
)
def test_cuda_problems_have_a_cause(
    device: int, environment: dict, problem: str, emulated_cuda_folder: Path, tmp_path: Path
) -> None:
    assert said(start(emulated_cuda_folder, tmp_path, device=device, **environment)).startswith(problem)


TWICE = PROBLEM.replace(
    "print(gpu.problem({device}), gpu.compilations())", "print(gpu.problem(), gpu.problem(), sep='|')"
)


@pytest.mark.parametrize("refusal", ["2", "900", "908"])  # out of memory, capturing
def test_cuda_kernels_are_tried_again_after_what_passes(
    refusal: str, emulated_cuda_folder: Path, tmp_path: Path
) -> None:
    first, second = said(start(emulated_cuda_folder, tmp_path, TWICE, EMULATED_BUSY=refusal)).split("|")
    assert first.startswith("the GPU had no memory, or was capturing a graph")
    assert second == "None"


def test_cuda_kernels_are_not_tried_again_after_what_stays(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    first, second = said(start(emulated_cuda_folder, tmp_path, TWICE, EMULATED_BUSY="209")).split("|")
    assert first == second == "the CUDA driver does not load the kernels: emulated error"


@pytest.mark.parametrize(
    "library, problem",
    [("libnvrtc.so", "there is no NVRTC, which compiles"), ("libcuda.so", "there is no CUDA driver")],
)
def test_cuda_without_driver_or_nvrtc_says_so(
    library: str, problem: str, emulated_cuda_folder: Path, tmp_path: Path
) -> None:
    hidden = (emulated_cuda_folder / library).rename(emulated_cuda_folder / "hidden")
    try:
        code = PROBLEM.replace(", gpu.compilations()", "")
        assert said(start(emulated_cuda_folder, tmp_path, code)).startswith(problem)
    finally:
        hidden.rename(emulated_cuda_folder / library)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_has_a_cause() -> None:
    assert _C.cuda_problem(0).startswith(("there is no CUDA driver: ", "this torch cannot be used with CUDA"))
    assert _C.cuda_problem(-1) == "clipft knows GPUs 0 to 63 only"


FIRST_OP = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
import torch, clipft
from emulated_cuda import EmulatedCuda
arguments = torch.ones(4, 8), torch.ones(16, 8, dtype=torch.int8), torch.ones(16), torch.empty(0)
with EmulatedCuda(Path({folder!r})).installed():
    try:
        torch.ops.clipft.quantized_linear(*arguments)
    except RuntimeError as error:
        print(error)
"""


def test_cuda_out_of_memory_in_the_first_op_is_an_error(emulated_cuda_folder: Path, tmp_path: Path) -> None:
    """It is told by a function of torch's that the process has not looked for yet."""
    assert "CUDA out of memory" in said(start(emulated_cuda_folder, tmp_path, FIRST_OP, EMULATED_MEMORY="10"))


# ---- the emulation finds what it is for ----

LOSS = """
import sys
sys.path[:0] = {tests!r}
from pathlib import Path
import torch, clipft
from emulated_cuda import EmulatedCuda
from loss_cases import unit
with EmulatedCuda(Path({folder!r})).installed():
    try:
        print(clipft.contrastive_loss(unit(200), unit(200, seed=1), 20.0))
    except RuntimeError as error:
        print(error)
"""

BARRIER = "    __syncthreads();\n    column_part("
BREAKS = {
    "barrier": (BARRIER, BARRIER.removeprefix("    __syncthreads();\n"), "read before it was written"),
    "race": ("column_place(at.warp, at.lane", "column_place(0, at.lane", "race: two writes"),
    "bound": ("(line < a.rows + a.cols) {", "(line <= a.rows + a.cols) {", "out of bounds: element 200 of 200"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_cuda_emulation_finds_a_broken_kernel(broken: str, emulated_cuda_folder: Path, tmp_path: Path) -> None:
    sound, wrong, fault = BREAKS[broken]
    folder, device_code = tmp_path / "built", tmp_path / "device"
    shutil.copytree(emulated_cuda_folder, folder)
    shutil.copytree(ROOT / "cuda", device_code)
    source = (device_code / "contrastive.cu").read_text()
    assert source.count(sound) == 1
    (device_code / "contrastive.cu").write_text(source.replace(sound, wrong))
    shutil.rmtree(folder / "lib")
    build(folder, device_code)
    text = said(start(folder, tmp_path, LOSS))
    assert fault in text and "(kernel contrastive_" in text


def test_cuda_products_by_name_where_torch_lacks_the_functions(
    cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a torch before 2.11 or 2.13, and on one without the functions that it promises to nobody."""
    asked: list[torch.dtype] = []

    def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        asked.append(dtype)
        if len(asked) > 100:
            raise ValueError("no")
        return out.copy_(a.float() @ b.float())

    library = torch.library.Library("aten", "IMPL")  # which has it for CUDA alone
    library.impl("mm.dtype_out", product, "CPU", allow_override=True)
    embeds = [torch.nn.functional.normalize(torch.randn(20, 16), dim=1).bfloat16() for _ in range(2)]
    try:
        with cuda.without_optional():
            check_contrastive(LossCase(70, 24, 20.0, dtype=torch.bfloat16), "emulated")
            assert set(asked) == {torch.float32}
            check_case(Int8Case(50, 64, 64))
            asked.extend([torch.float32] * 100)
            with pytest.raises(RuntimeError, match="a matrix product failed in torch: it wrote why to standard error"):
                clipft.contrastive_loss(*embeds, 20.0)
            monkeypatch.setenv("EMULATED_MEMORY", "30")
            with pytest.raises(torch.OutOfMemoryError, match=r"could not allocate a \w+ tensor of \d+ elements$"):
                clipft.contrastive_loss(*embeds, 20.0)
    finally:
        library._destroy()
