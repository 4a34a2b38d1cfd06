"""Exports and vector files with damage made at random: they give what their files hold, or end in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from PIL import Image
from tiny_clip import captioned, tiny_clip

import clipft

SECONDS = 6.0


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    folder = tmp_path / "export"
    clipft.export_onnx(*tiny_clip(), folder, data=captioned(4))
    described = json.loads((folder / "clipft_onnx.json").read_text())
    del described["files"], described["parity"]  # as a stranger's, without digests
    (folder / "clipft_onnx.json").write_text(json.dumps(described))

    def load() -> tuple[np.ndarray, np.ndarray]:
        clip = clipft.OnnxCLIP(folder, threads=1)
        return clip.encode_images([Image.new("RGB", (40, 50))]), clip.encode_texts(["a b", "a longer caption"])

    def equal(found: tuple[np.ndarray, np.ndarray]) -> None:
        assert [part.shape[1] for part in found] == [json.loads((folder / "clipft_onnx.json").read_text())["dim"]] * 2

    fuzz(folder, load, equal, SECONDS)
