"""Fixtures for every test, and which instruction sets run here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipft import _C

ALL_ISAS = ("ref", "neon", "avx2", "avx512")


def pytest_report_header() -> list[str]:
    absent = [isa for isa in ALL_ISAS if isa not in _C.isas()]
    data = os.environ.get("CLIPFT_DATA") or "not set: tests on its pictures are skipped"
    return [
        f"clipft: kernels run on {', '.join(_C.isas())}; not on this machine: {', '.join(absent)}",
        f"CLIPFT_DATA: {data}",
    ]


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real pictures that are not shipped."""
    folder = os.environ.get("CLIPFT_DATA")
    if not folder:
        pytest.skip("needs CLIPFT_DATA, a folder with chest_xray/ and clothing/, which is not shipped")
    return Path(folder)
