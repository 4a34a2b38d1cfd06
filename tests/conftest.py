"""Fixtures for every test, and which instruction sets run here."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clipft import _C

os.environ["PYTHONSAFEPATH"] = (
    "1"  # a test's own processes import the clipft that is tested, not the folder they start in
)

if TYPE_CHECKING:
    from emulated_cuda import EmulatedCuda

ALL_ISAS = ("ref", "neon", "neon_dot", "neon_i8mm", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx")
INT8_ONLY = {"neon_dot": "neon", "neon_i8mm": "neon", "avx_vnni": "avx2", "avx512_vnni": "avx512", "amx": "avx512"}


def pytest_report_header() -> list[str]:
    absent = [isa for isa in ALL_ISAS if isa not in _C.isas()]
    data = os.environ.get("CLIPFT_DATA") or "not set: tests on its pictures are skipped"
    return [
        f"clipft: kernels run on {', '.join(_C.isas())}; not on this machine: {', '.join(absent)}",
        f"CLIPFT_DATA: {data}",
    ]


def pytest_collection_finish() -> None:
    """What was imported stays: it is left out of each collection of garbage, of which a Trainer begins with one."""
    gc.freeze()


@pytest.fixture(params=[name for name in _C.isas() if name not in INT8_ONLY])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has, but for those that differ in int8 products only."""
    yield from use(request)


@pytest.fixture(params=_C.isas())
def int8_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    yield from use(request)


def use(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(scope="session")
def emulated_cuda_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated GPU, built."""
    from emulated_cuda import build

    if any(shutil.which(tool) is None for tool in ("make", "cc", "g++")):
        pytest.skip("needs make, a C and a C++ compiler to build the emulated GPU")
    folder = tmp_path_factory.mktemp("emulated-cuda")
    build(folder)
    return folder


@pytest.fixture(scope="session")
def emulated_gpu(emulated_cuda_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedCuda]:
    """One for the whole process."""
    from emulated_cuda import EmulatedCuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cubins")))
        gpu = EmulatedCuda(emulated_cuda_folder)
        assert gpu.problem() is None
        yield gpu


@pytest.fixture
def cuda(emulated_gpu: EmulatedCuda) -> Iterator[EmulatedCuda]:
    """Runs the test with the emulated GPU's ops in place of the CPU's."""
    with emulated_gpu.installed():
        yield emulated_gpu


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real pictures that are not shipped."""
    folder = os.environ.get("CLIPFT_DATA")
    if not folder:
        pytest.skip("needs CLIPFT_DATA, a folder with chest_xray/ and clothing/, which is not shipped")
    return Path(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny CLIP."""
    from tiny_clip import tiny_clip  # needs torchvision, which not every environment of the tests has

    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with the ONNX encoders, float and int8, of the tiny CLIP with a head, and the report of the export."""
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module)
    from tiny_clip import COLOURS, captioned, tiny_clip

    import clipft
    from clipft.models.calibrated import Calibration, set_calibrations

    folder, (model, processor) = tmp_path_factory.mktemp("exported"), tiny_clip()
    clipft.add_head(model, processor, list(COLOURS))
    set_calibrations(model, {"zero_shot": Calibration(2.5, 0.5, 0.9, ("a", "b"))})
    return folder, clipft.export_onnx(model, processor, folder, int8=True, data=captioned(40))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 40 pictures."""
    from tiny_clip import class_folders

    return class_folders(tmp_path_factory.mktemp("colours"), 40)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 30 pictures with two captions each."""
    from tiny_clip import picture

    folder = tmp_path_factory.mktemp("table")
    rows = []
    for index in range(30):
        picture(index)[0].save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "captions": [f"{picture(index)[1]} {index}", f"no. {index}"]}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder / "pairs.jsonl"
