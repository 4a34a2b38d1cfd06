"""Pictures, tables, Parquet and shards with bytes flipped, cut, joined and lied: each is read, or ends in one line that
names the file, soon and in little memory.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import fuzz
from PIL import Image
from tiny_clip import captioned, encoded, picture

from clipft.data.inspection import read_mask
from clipft.data.pictures import EncodedPicture, naming, open_picture, picture_formats, to_rgb
from clipft.data.reading import Reading
from clipft.data.sources import load_reading
from clipft.data.text_tables import read_text_lines

SECONDS = 1.0
SKIP = pytest.mark.parametrize("skip", [False, True])


def fuzz_file(path: Path, forms: Sequence[bytes], load: Callable[[], Any]) -> None:
    fuzz(path.parent, load, lambda rows: None, SECONDS, forms={path.name: forms})


def load(path: Path, skip: bool) -> int:
    """The number of rows, all of which were read."""
    reading = Reading(skip=skip)
    rows = load_reading(path, reading)
    for number in range(len(rows)):
        with naming(reading.place(number)):
            row = rows[number]
        assert isinstance(row["caption"], str | list) and row["image"].size
    assert len(rows)
    return len(rows)


# ---- readers ----


def png(number: int) -> bytes:
    return encoded(picture(number)[0], format="PNG").data


def saved(name: str) -> bytes:
    for mode in ("RGB", "1", "P"):
        out = io.BytesIO()
        try:
            picture(1)[0].resize((32, 32)).convert(mode).save(out, name)
            return out.getvalue()
        except Exception:  # it takes another mode
            continue
    raise ValueError(name)


@SKIP
@pytest.mark.parametrize("group", ["usual", "others"])
def test_pictures(tmp_path: Path, group: str, skip: bool) -> None:
    usual = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    without_range = ("SPIDER",) if skip else ()  # of floats, which are opened and no RGB
    names = [name for name in picture_formats() if name in Image.SAVE and name not in without_range]
    plain = [saved(name) for name in names if (name in usual) == (group == "usual")]
    assert len(plain) > 5
    path = tmp_path / f"{group}.png"

    def read() -> Any:
        if not skip:
            return open_picture(path).size
        with naming(str(path)):
            return to_rgb(EncodedPicture(path.read_bytes(), path.name).decode(8)).size

    fuzz_file(path, plain, read)


@SKIP
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path: Path, kind: str, skip: bool) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [(f"{i}.png", f'words, "{i}" \u2028') for i in range(4)]
    if kind == "jsonl":
        text = "".join(json.dumps({"image": image, "caption": words}) + "\n" for image, words in rows)
    else:
        between = "\t" if kind == "tsv" else ","
        quoted = [(image, '"' + words.replace('"', '""') + '"') for image, words in rows]
        text = "".join(between.join(row) + "\n" for row in [("image", "caption"), *quoted])
    path, forms = tmp_path / f"t.{kind}", [text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")]
    fuzz_file(path, forms, lambda: load(path, skip))


@SKIP
def test_parquet(tmp_path: Path, skip: bool) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    plain = []
    for images in ([png(i) for i in range(4)], ["0.png"] * 4):
        for options in ({}, {"compression": "none", "use_dictionary": False}):
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": list("abcd")}), out, **options)
            plain.append(out.getvalue())
    fuzz_file(tmp_path / "t.parquet", plain, lambda: load(tmp_path / "t.parquet", skip))


def test_parquet_without_rows_or_with_texts_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"words", b"caf\xe9"]).buffers())
    for table, message in (
        (pyarrow.table({"image": [b"", b""], "caption": texts}), r"t\.parquet: expected a Parquet file \(.*UTF8"),
        (pyarrow.table({"image": [b""], "caption": [""]})[:0], r"t\.parquet: expected at least one row, found none"),
    ):
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(ValueError, match=message):
            load_reading(path, Reading(skip=True))


def test_parquet_that_swells(tmp_path: Path) -> None:
    """Some kilobytes that say 160 MB."""
    table = pyarrow.table({"image": ["0.png"] * 160, "caption": ["x" * 1_000_000] * 160})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"t\.parquet: expected a Parquet file \(more than 100 MB in 160 rows"):
        load_reading(path, Reading(skip=True))


@SKIP
def test_saved_data_sets(tmp_path: Path, skip: bool) -> None:
    folder = tmp_path / "saved"
    captioned(4).save_to_disk(folder)

    def named() -> int:
        try:
            return load(folder, skip)
        except ValueError as error:
            if f"{folder}, row " not in str(error):
                raise
            raise ValueError(f"{folder}/data-00000-of-00001.arrow: {error}") from error  # rows go by the folder

    fuzz(folder, named, lambda rows: None, SECONDS)


def test_saved_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": captioned(4), "test": captioned(2)}).save_to_disk(folder)

    def named() -> int:
        try:
            return load(Path(f"{folder}:train"), False)
        except ValueError as error:
            if str(folder) not in str(error):
                raise
            raise ValueError(f"{folder}/dataset_dict.json: {str(error)[:500]}") from error  # splits go by the folder

    fuzz(folder, named, lambda rows: None, SECONDS)


def test_masks(tmp_path: Path) -> None:
    plain = [saved(name) for name in ("PNG", "TIFF", "BMP")]
    path = tmp_path / "0_mask.png"
    fuzz_file(path, plain, lambda: read_mask(path).shape)


def test_lines(tmp_path: Path) -> None:
    """Of classes, or of queries."""
    path = tmp_path / "classes.txt"
    fuzz_file(path, ["red\nblé\n\nyellow\n".encode(coding) for coding in ("utf-8", "utf-8-sig")], lambda: lines(path))


def lines(path: Path) -> int:
    found = read_text_lines(path)
    assert all(line.strip() == line and line for line in found)
    return len(found)


@SKIP
def test_shards(tmp_path: Path, skip: bool) -> None:
    plain = []
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
            for i in range(4):
                name = f"far/{i}" if tar_format == tarfile.USTAR_FORMAT else f"{'far/' * 40}é{i}"
                files = {"png": png(i), "txt": b"words", "json": b'{"caption": "other"}'}
                for ending, data in files.items():
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        plain.append(out.getvalue())
    fuzz_file(tmp_path / "s.tar", plain, lambda: load(tmp_path / "s.tar", skip))
