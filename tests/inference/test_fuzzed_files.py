"""Exports and vector files with damage made at random: they give what their files hold, or end in one line."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import LIARS, fuzz, lie_json
from PIL import Image
from surfaces import surface
from tiny_clip import tiny_clip

import clipft
from clipft.inference.anomaly import PatchMemory
from clipft.inference.vectors import Description, VectorFile

SECONDS = 4.0


def test_onnx(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "export", ignore=shutil.ignore_patterns("*.int8.onnx")))
    described = json.loads((folder / "clipft_onnx.json").read_text())
    del described["files"], described["parity"]  # as a stranger's, without digests
    (folder / "clipft_onnx.json").write_text(json.dumps(described))

    def load() -> tuple[np.ndarray, np.ndarray]:
        clip = clipft.OnnxCLIP(folder, threads=1)
        return clip.encode_images([Image.new("RGB", (40, 50))]), clip.encode_texts(["a b", "a longer caption"])

    def equal(found: tuple[np.ndarray, np.ndarray]) -> None:
        assert [part.shape[1] for part in found] == [json.loads((folder / "clipft_onnx.json").read_text())["dim"]] * 2

    fuzz(folder, load, equal, SECONDS)


def lie_parquet(rng: random.Random, data: bytes) -> bytes:
    """Columns of other types, or none; descriptions that are none."""
    values = np.eye(4, dtype=np.float32)
    table = pq.read_table(io.BytesIO(data))
    described = lie_json(rng, table.schema.metadata[b"clipft"])
    ids = (table["id"], pa.array([1, 2, 3, 4]), pa.array(["a", None, "b", "c"]), pa.array([b"\xff"] * 4))
    columns = {
        "id": rng.choice(ids),
        rng.choice(("embedding", "embedding", "vector")): rng.choice(
            (
                table["embedding"],
                pa.array(values.tolist()),
                pa.array([[1.0], [], None, [2.0]]),
                pa.FixedSizeListArray.from_arrays(pa.array([None] * 16, pa.float32()), 4),
                pa.FixedSizeListArray.from_arrays(pa.array(range(16)), 4),
                pa.array(["x"] * 4),
            )
        ),
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({b"clipft": described}), file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["v.npy", "v.parquet"])
def test_vectors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".parquet", lie_parquet)
    path = tmp_path / "vectors" / name
    path.parent.mkdir()
    vectors = np.eye(4, 5, dtype=np.float32)
    VectorFile(["a", "b", "c", "d"], vectors, Description("images", "demo", "0", "pictures")).write(path)
    for beside in path.parent.glob("*.json"):  # as a stranger's, without digests
        beside.write_text(
            json.dumps({key: own for key, own in json.loads(beside.read_text()).items() if key != "files"})
        )

    def equal(file: VectorFile) -> None:
        assert file.vectors.dtype == np.float32 and np.isfinite(file.vectors).all() and file.vectors.ndim == 2
        assert len(file.ids) == len(file.vectors) and all(isinstance(own, str) for own in file.ids)

    fuzz(path.parent, lambda: VectorFile.read(path), equal, SECONDS / 3)


def test_a_parquet_file_that_swells(tmp_path: Path) -> None:
    """Some kilobytes that say 120 MB."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(30_000_000, np.float32)), 500)
    table = pa.table([pa.array(["x"] * 60_000), vectors], names=["id", "embedding"])
    pq.write_table(table, tmp_path / "v.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"v\.parquet: expected a file that clipft embed wrote \(more than 1\d\d MB"):
        VectorFile.read(tmp_path / "v.parquet")


def test_a_folder_of_vectors(tmp_path: Path) -> None:
    folder = tmp_path / "img_emb"
    folder.mkdir()
    for number in range(2):
        np.save(folder / f"img_emb_{number}.npy", np.eye(3, 4, dtype=np.float16))

    def equal(file: VectorFile) -> None:
        assert len(file.ids) == len(file.vectors) and np.isfinite(file.vectors).all()

    fuzz(folder, lambda: VectorFile.read(folder), equal, SECONDS / 6)


def test_memory(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    PatchMemory.fit(model, processor, [surface(seed) for seed in range(2)], zoom=2).save(tmp_path / "m.safetensors")

    def equal(memory: PatchMemory) -> None:
        assert memory.levels and memory.layers and memory.normal_scores
        for level in memory.levels:
            assert level.patches.shape[1:] == level.mean.shape == level.std.shape
            assert all(bool(one.isfinite().all()) for one in (level.patches, level.mean, level.std))

    fuzz(tmp_path, lambda: PatchMemory.load(tmp_path / "m.safetensors"), equal, SECONDS / 2)
