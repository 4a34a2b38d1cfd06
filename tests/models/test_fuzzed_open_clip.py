"""open_clip's folders and checkpoints, with damage made at random."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Runs, fuzz
from PIL import Image
from tiny_open_clip import open_clip_model, tiny_cfg, write_folder

import clipft

SECONDS = 2.0


def works(loaded: Any) -> None:
    model, processor = loaded
    try:
        clipft.embed(model, processor, images=[Image.new("RGB", (40, 50))])
        clipft.embed(model, processor, texts=["a b", "c"])
    except ValueError as error:
        assert "the model gives NaN or Inf" in str(error)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old pt"])
def test_checkpoints(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", tiny_cfg(), open_clip_model(tiny_cfg()).state_dict())
    names = [".json", ".safetensors"]
    if kind != "safetensors":
        state = open_clip_model(tiny_cfg()).state_dict()
        for path in folder.glob("*.safetensors"):
            path.unlink()
        torch.save(state, folder / "open_clip_pytorch_model.bin", _use_new_zipfile_serialization=kind == "pt")
        names = [".bin"]
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS, names)


@pytest.mark.parametrize(
    "program, packing, message",
    [
        ({"a": Runs(bytearray, 1 << 30)}, zipfile.ZIP_STORED, "alone, found a bytearray"),
        ({"a": Runs(torch.Tensor, 1 << 32)}, zipfile.ZIP_STORED, "alone, found a Tensor"),
        ({"a": "x" * (1 << 22)}, zipfile.ZIP_DEFLATED, "its members are compressed"),
        ({"a": Runs(print, "ran")}, zipfile.ZIP_STORED, "asks to run print"),
    ],
    ids=["bytes", "tensor", "packed", "call"],
)
def test_checkpoints_that_swell_or_run(
    program: Any, packing: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some hundred bytes that say gigabytes."""
    folder = write_folder(tmp_path / "tiny", tiny_cfg(), {"a": torch.zeros(1)})
    (folder / "open_clip_model.safetensors").unlink()
    with zipfile.ZipFile(folder / "open_clip_pytorch_model.bin", "w", packing) as archive:
        archive.writestr("x/data.pkl", pickle.dumps(program, 2))
        archive.writestr("x/version", "3\n")
    with pytest.raises(ValueError, match=rf"open_clip_pytorch_model.bin: .*({message})"):
        clipft.load(folder)
    assert "ran" not in capsys.readouterr().out
