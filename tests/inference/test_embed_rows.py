"""What clipft embed makes of rows: one vector each, under an id that names it; and vector files of any origin."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipft.cli import app
from clipft.cli.search import _pictures_of
from clipft.inference.encode import Encoder
from clipft.inference.npy import load_npy
from clipft.inference.vectors import Description, VectorFile, embed_to_file

SHADES = {"a": 20, "b": 120, "c": 250}


def pixels(picture: Any) -> Any:
    shade = np.asarray(picture.convert("L").resize((1, 1)), np.float32)[0, 0] / 255
    return np.array([shade, 1.0 - shade], np.float32)


def encoder(texts: Callable[[Any], Any] = lambda texts: np.ones((len(texts), 2), np.float32)) -> Encoder:
    """Of a picture its shade, and what lacks to white."""
    return Encoder(pixels, np.stack, texts, lambda: "shade")


@pytest.fixture(autouse=True)
def _shades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.inference.encode.load_encoder", lambda *args, **kwargs: encoder())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shade in SHADES.items():
        Image.new("RGB", (9, 7), (shade, shade, shade)).save(tmp_path / f"{name}.png")
    return tmp_path


def command(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def embedded(data: Any, output: Path, *options: Any) -> VectorFile:
    command("embed", "--model", "none", "--data", data, "--output", output, *options)
    return VectorFile.read(output)


def shades(file: VectorFile) -> list[int]:
    return [round(255 * float(vector[0])) for vector in file.vectors]


# ---- rows and ids ----


def test_a_table_gives_a_vector_for_each_row(folder: Path) -> None:
    (folder / "t.csv").write_text("image,number\na.png,7\nb.png,8\na.png,7\nc.png,9\n")  # pictures are enough
    file = embedded(folder / "t.csv", folder / "v.parquet")
    assert file.ids == ["a.png", "b.png", "a.png", "c.png"] and shades(file) == [20, 120, 20, 250]
    file = embedded(folder / "t.csv", folder / "v.npy", "--id-column", "number")
    assert file.ids == ["7", "8", "7", "9"] and shades(file) == [20, 120, 20, 250]
    said = command(
        "embed", "--data", folder / "t.csv", "--model", "x", "--output", folder / "w.npy", "--id-column", "no", status=2
    )
    assert "--id-column: expected one of its columns ['image', 'number'], got 'no'" in said


def test_stored_pictures_and_shards_have_ids(folder: Path) -> None:
    data = [(folder / f"{name}.png").read_bytes() for name in SHADES]
    for name, paths in {"bytes": [None] * 3, "paths": ["x/1.png", "x/2.png", None]}.items():
        stored = [{"bytes": own, "path": path} for own, path in zip(data, paths, strict=True)]
        pq.write_table(pa.table({"image": stored}), folder / f"{name}.parquet")
    file = embedded(folder / "bytes.parquet", folder / "v.npy")
    assert file.ids == [f"{folder}/bytes.parquet:{row}" for row in range(3)] and shades(file) == list(SHADES.values())
    file = embedded(folder / "paths.parquet", folder / "v.npy")
    assert file.ids == ["x/1.png", "x/2.png", f"{folder}/paths.parquet:2"]
    with tarfile.open(folder / "s.tar", "w") as tar:
        for number, own in enumerate(data):
            head = tarfile.TarInfo(f"part/{number}.png")
            head.size = len(own)
            tar.addfile(head, io.BytesIO(own))
    file = embedded(folder / "s.tar", folder / "v.npy")
    assert file.ids == [f"s.tar/part/{number}.png" for number in range(3)] and shades(file) == list(SHADES.values())


def test_a_table_in_each_split_is_read_where_its_column_is_named(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / "root" / split).mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(folder / "root" / split / "p.png")
        (folder / "root" / split / "t.jsonl").write_text(json.dumps({"pic": "p.png", "key": split}))
    how = ("embed", "--model", "x", "--data", folder / "root", "--output", folder / "v.npy", "--image-column", "pic")
    assert "--split: expected one of test, train of" in command(*how, status=2)
    assert embedded(f"{folder}/root:test", folder / "v.npy", "--image-column", "pic", "--id-column", "key").ids == [
        "test"
    ]


def test_a_folder_gives_its_pictures_and_counts_the_rest(folder: Path) -> None:
    (folder / "t.csv").write_text("image\na.png\n")
    (folder / ".hidden.png").write_bytes(b"")
    said = command("embed", "--model", "x", "--data", folder, "--output", folder.parent / "v.parquet")
    assert "read 3 of 5: 1 hidden, 1 table beside the pictures" in said
    with tarfile.open(folder / "s.tar", "w"):
        pass
    said = command("embed", "--model", "x", "--data", folder, "--output", folder.parent / "v.parquet", status=2)
    assert "s.tar, which holds pictures too" in said


def test_rows_that_are_left_out_are_listed(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "t.csv").write_text("image\na.png\nbad.png\nnone.png\nc.png\n")
    file = embedded(folder / "t.csv", folder / "v.parquet", "--on-bad-row", "skip")
    assert file.ids == ["a.png", "c.png"] and shades(file) == [20, 250]
    assert ["none.png" in file.description.left_out[0], "row 1" in file.description.left_out[1]] == [True, True]
    assert len(file.description.left_out) == 2
    said = command("embed", "--model", "x", "--data", folder / "t.csv", "--output", folder / "w.npy", status=2)
    assert "row 2: there is no image 'none.png'" in said


# ---- a run ----


def test_one_pool_of_workers_reads_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.inference.shards.SHARD", 2)
    pools, start = [], torch.utils.data.DataLoader.__iter__

    def counted(loader: Any) -> Any:
        pools.append(loader.num_workers)
        return start(loader)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", counted)
    paths = [folder / f"{name}.png" for name in "abcabca"]
    done: list[int] = []
    what = Description("images", "m", "shade", "s")
    file = folder / "v.npy"
    ids = list("abcabca")
    embed_to_file(encoder(), paths, ids, file, what, batch_size=3, num_workers=1, done=done.append)
    assert pools == [1] and sum(done) == 7
    assert shades(VectorFile.read(file)) == [20, 120, 250, 20, 120, 250, 20]


def test_nan_of_a_model_is_an_error(folder: Path) -> None:
    def texts(rows: Any) -> Any:
        vectors = np.ones((len(rows), 2), np.float32)
        vectors[1] = np.nan
        return vectors

    what = Description("texts", "m", "i", "s")
    with pytest.raises(ValueError, match="b: the model gives NaN or Inf for it and 0 more of 3"):
        embed_to_file(encoder(texts), list("abc"), list("abc"), folder / "v.npy", what, skip=True)
    broken = Encoder(pixels, lambda pictures: np.full((len(pictures), 2), np.inf, np.float32), texts, lambda: "i")
    paths = [folder / "a.png"]
    with pytest.raises(ValueError, match=r"a: the model gives NaN or Inf"):
        embed_to_file(broken, paths, ["a"], folder / "w.npy", Description("images", "m", "i", "s"), skip=True)


def test_a_run_goes_on_with_the_same_pictures_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.inference.shards.SHARD", 1)
    (folder / "z.png").write_bytes(b"no picture")
    arguments = ["embed", "--model", "none", "--data", folder, "--output", folder.parent / "out" / "v.npy"]
    assert "z.png: the image cannot be read" in command(*arguments, status=2)
    Image.new("RGB", (9, 7), (77, 77, 77)).save(folder / "a.png")
    assert "whose pictures differ; --restart forgets it" in command(*arguments, status=2)
    (folder / "z.png").unlink()
    command(*arguments, "--restart")
    assert shades(VectorFile.read(arguments[-1])) == [77, 120, 250]


# ---- files ----


def test_folders_of_clip_retrieval_are_read_and_searched(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    for name in ("img_emb", "metadata"):
        (tmp_path / name).mkdir()
    for number in (2, 10):  # in the order of the numbers
        vectors = np.array([[number, 0], [0, number]], np.float16)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", vectors)
        rows = {"image_path": [f"{number}/0.jpg", f"{number}/1.jpg"]}
        pq.write_table(pa.table(rows), tmp_path / "metadata" / f"metadata_{number}.parquet")
    file = VectorFile.read(tmp_path)
    assert file.ids == ["2/0.jpg", "2/1.jpg", "10/0.jpg", "10/1.jpg"]
    assert file.vectors.tolist() == [[1, 0], [0, 1]] * 2
    Image.new("RGB", (4, 4)).save(tmp_path / "black.png")
    said = command("search", "--index", tmp_path, "--model", "m", "--image", tmp_path / "black.png", "-k", 1)
    assert "does not say which model" in said and "2/1.jpg" in said
    (tmp_path / "metadata" / "metadata_2.parquet").unlink()
    assert VectorFile.read(tmp_path).ids[:2] == ["img_emb_2.npy:0", "img_emb_2.npy:1"]


def _npy(header: dict[str, Any], data: bytes = b"\0" * 48) -> bytes:
    text = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize("rows", [10**12, 10**30, -3, 4])
def test_an_array_that_lies_about_its_size_is_refused(rows: int, tmp_path: Path) -> None:
    lie = {"descr": "<f4", "fortran_order": False, "shape": (rows, 4)}
    (tmp_path / "v.npy").write_bytes(_npy(lie))
    (tmp_path / "v.npy.json").write_text(
        json.dumps({"ids": list("abc"), "kind": "", "model": "", "identity": "", "source": ""})
    )
    for path in (tmp_path / "v.npy", tmp_path):
        with pytest.raises(ValueError, match=r"v\.npy"):
            VectorFile.read(path)


@pytest.mark.parametrize("header", [b"{'shape': (3, 4)", b"\x00", b"(" * 5000, b"'''", b"{'descr': '<f4', "])
def test_an_array_whose_header_is_no_literal_is_refused(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match=r"v\.npy: its header cannot be read"):
        load_npy(tmp_path / "v.npy")


@pytest.mark.parametrize("what", ["numbers", "nested", "list", "words", "nulls", "nan", "no sidecar"])
def test_files_that_are_none_of_ours_are_refused(what: str, tmp_path: Path) -> None:
    described = {"kind": "texts", "model": "m", "identity": "i", "source": "s"}
    columns: dict[str, Any] = {
        "list": pa.array([[1.0, 2.0]], pa.list_(pa.float32())),
        "words": pa.array(["x"]),
        "nulls": pa.array([None], pa.list_(pa.float32(), 2)),
    }
    path = tmp_path / ("v.parquet" if what in columns else "v.npy")
    if what in columns:
        table = pa.table({"id": ["a"], "embedding": columns[what]})
        pq.write_table(table.replace_schema_metadata({b"clipft": json.dumps(described).encode()}), path)
    else:
        np.save(path, np.array([[np.nan if what == "nan" else 1.0]], np.float32))
        beside = (
            "[" * 100_000 if what == "nested" else json.dumps({"ids": [1] if what == "numbers" else ["a"], **described})
        )
        if what != "no sidecar":
            (tmp_path / "v.npy.json").write_text(beside)
    with pytest.raises(ValueError, match=r"v\.(npy|parquet)"):
        VectorFile.read(path)


def test_ids_open_pictures_of_the_source_only(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    Image.new("RGB", (3, 3)).save(source / "in.png")
    (source / "link.png").symlink_to(folder / "a.png")
    found = _pictures_of(str(source))
    assert found("in.png").size == (3, 3)
    for name in ("../a.png", str(folder / "a.png"), "link.png", "no.png", "nul\0.png", "x" * 5000):
        assert found(name) is None
    assert _pictures_of(str(source), allow_outside=True)("../a.png").size == (9, 7)
    assert _pictures_of("user/name-of-the-hub")("in.png") is None
    rows = datasets.Dataset.from_dict({"image": [str(folder / "b.png")], "key": ["own"]})
    rows.cast_column("image", datasets.Image()).map(lambda row: row).to_parquet(str(folder / "p.parquet"))
    assert _pictures_of(str(folder / "p.parquet"), {"id_column": "key"}) is not None
