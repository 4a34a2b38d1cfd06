"""Full disks, folders that may not be written into, and what lies where something else belongs: one line, before the
work where that can be known, and nothing half-written.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import run
from killed import visible
from tiny_clip import tiny_clip

import clipft
from clipft.files import write_text
from clipft.inference.vectors import Description, VectorFile
from clipft.models.saving import save_model

FOLDERS = (("train", "--data", "none"), ("quantize",), ("export",), ("merge",))
FILES = (
    ("evaluate", "--data", "none"),
    ("embed", "--data", "none"),
    ("search", "--index", "none", "--text", "a"),
    ("doctor", "none"),
)


def refused(command: tuple[str, ...], model: Path, output: Path) -> str:
    """What a command prints that does not come so far as to read its data or its model."""
    (model / "adapter_config.json").write_text("{}")
    done = run(*command, "--model", model, "--json" if command[0] == "doctor" else "--output", output)
    assert done.exit_code == 2 and done.output.startswith("error: "), done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("command", [*FOLDERS, *FILES], ids=lambda command: command[0])
def test_what_is_in_the_way_is_named_before_the_work(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.npy").mkdir()
    assert "expected a folder" in refused(command, tmp_path, tmp_path / "file" / "below.npy")
    if command in FOLDERS:
        assert f"expected a folder, {tmp_path / 'file'} is" in refused(command, tmp_path, tmp_path / "file")
    else:
        assert "folder.npy: expected a file or nothing" in refused(command, tmp_path, tmp_path / "folder.npy")
    assert visible(tmp_path) == {"file": b"mine", "adapter_config.json": b"{}"}


@pytest.mark.parametrize("command", [*FOLDERS, *FILES], ids=lambda command: command[0])
def test_a_full_disk_and_one_that_is_read_only_are_noticed_before_the_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        assert "expected room for at least 1 bytes, found 0" in refused(command, tmp_path, tmp_path / "new" / "a.npy")
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: not mode & os.W_OK)
    assert "expected a folder that may be written into" in refused(command, tmp_path, tmp_path / "new" / "a.npy")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "report.html", "merged", "checkpoints"])
def test_what_a_run_would_write_at_its_end_is_looked_at_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if "." in name:
        (tmp_path / "out" / name).mkdir()
    else:
        (tmp_path / "out" / name).write_text("mine")
    said = refused(("train", "--data", "none", "--lora-r", "2"), tmp_path, tmp_path / "out")
    assert f"{name}: expected a" in said and "move it away" in said


def test_a_run_is_not_begun_without_room_for_its_model(
    base: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"room for at least \d{6} bytes, found 1000: '.*out'"):
        clipft.train(str(base), str(colours), tmp_path / "out", control_data="none")
    assert not (tmp_path / "out").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_while_a_set_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    save_model(*tiny_clip(), tmp_path / "model")
    description = Description("images", "m", "i", "s")
    VectorFile(["a"], np.ones((1, 2), np.float32), description).write(tmp_path / "v.npy")
    write_text(tmp_path / "text", "old")
    before = visible(tmp_path)
    large = VectorFile(["a"], np.random.default_rng(0).random((1, 20_000), np.float32), description)
    writers = {
        "model": lambda: save_model(*tiny_clip(1), tmp_path / "model"),
        "v.npy": lambda: large.write(tmp_path / "v.npy"),
        "new.parquet": lambda: large.write(tmp_path / "new.parquet"),
        "text": lambda: write_text(tmp_path / "text", "x" * 30_000),
    }
    for name, write in writers.items():
        with largest_file(20_000), pytest.raises(OSError, match=rf"^\[Errno \d+\] .*{name}") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert visible(tmp_path) == before
    assert not [path for path in tmp_path.rglob(".*") if path != tmp_path]
