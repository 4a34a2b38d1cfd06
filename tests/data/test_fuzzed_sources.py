"""Pictures, tables, Parquet and shards with bytes flipped, cut, joined and lied: each is read, or ends in one line that
names the file, soon and in little memory.

``CLIPFT_FUZZED`` is the number of inputs of each kind; a longer run is the same with more.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_clip import encoded, picture

from clipft.data.pictures import EncodedPicture, UnreadablePictureError, naming, open_picture, picture_formats, to_rgb
from clipft.data.reading import Reading
from clipft.data.sources import load_reading

COUNT = int(os.environ.get("CLIPFT_FUZZED", "120"))
SECONDS, MEGABYTES = 2.0, 200  # of the processor's time an input; over the plain run
NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]
WORDS = [
    b"\0",
    b"\xff\xfe",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"{",
    b"[" * 5000,
    b"9" * 5000,
    b"-1",
    b"../",
    b"\\ud800",
    b"1e999",
]


def damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(out) + 1)
        match rng.choice(["flip", "flip", "cut", "join", "lie", "word", "remove"]):
            case "flip" if place < len(out):
                out[place] ^= 1 << rng.randrange(8)
            case "cut":
                del out[place:]
            case "join":
                out += other if rng.random() < 0.5 else out[:place]
            case "lie":
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
                out[place : place + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            case "word":
                out[place:place] = rng.choice(WORDS)
            case "remove":
                del out[place : place + rng.randrange(1, 600)]
    return bytes(out)


def megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def fuzz(path: Path, plain: list[bytes], read: Callable[[Path, bool], object]) -> None:
    """``read`` gets the path of each damaged input; the second time with bad rows left out."""
    rng = random.Random(path.name)
    for data in plain:
        path.write_bytes(data)
        read(path, False)
    before, outcomes = megabytes(), {"read": 0, "refused": 0}
    for number in range(COUNT):
        data = damaged(rng, rng.choice(plain), rng.choice(plain))
        path.write_bytes(data)
        for skip in (False, True):
            start = time.process_time()
            try:
                read(path, skip)
                outcomes["read"] += 1
            except (ValueError, OSError) as error:
                said = str(error)
                assert path.name in said, f"input {number}: {said}"
                assert len(said) < 20_000, f"input {number}: {len(said)} characters"
                outcomes["refused"] += 1
            assert time.process_time() - start < SECONDS, f"input {number}"
    assert megabytes() - before < MEGABYTES
    assert min(outcomes.values()) > 0


def load(path: Path, skip: bool) -> None:
    reading = Reading(skip=skip)
    rows = load_reading(path, reading)
    for number in range(len(rows)):
        with naming(reading.place(number)):
            assert rows[number]["caption"] is not None


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


@pytest.mark.parametrize("group", ["usual", "others"])
def test_pictures(tmp_path: Path, group: str) -> None:
    usual = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
    plain = []
    for name in picture_formats():
        if (name in usual) == (group == "usual") and name in Image.SAVE:
            plain.append(saved(name))
    assert len(plain) > 5

    def read(path: Path, skip: bool) -> None:
        if skip:
            picture = EncodedPicture(path.read_bytes(), path.name)
            try:
                to_rgb(picture.decode(8))
            except ValueError as error:
                if isinstance(error, UnreadablePictureError):
                    raise
                raise ValueError(f"{path.name}: {error}") from error  # of a mode that has no range
        else:
            open_picture(path)

    fuzz(tmp_path / f"{group}.png", plain, read)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [(f"{i}.png", f'words, "{i}" \u2028') for i in range(4)]
    if kind == "jsonl":
        text = "".join(json.dumps({"image": image, "caption": words}) + "\n" for image, words in rows)
    else:
        between = "\t" if kind == "tsv" else ","
        quoted = [(image, '"' + words.replace('"', '""') + '"') for image, words in rows]
        text = "".join(between.join(row) + "\n" for row in [("image", "caption"), *quoted])
    fuzz(tmp_path / f"t.{kind}", [text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")], load)


def test_parquet(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    plain = []
    for images in ([png(i) for i in range(4)], ["0.png"] * 4):
        for options in ({}, {"compression": "none", "use_dictionary": False}):
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": list("abcd")}), out, **options)
            plain.append(out.getvalue())
    fuzz(tmp_path / "t.parquet", plain, load)


def test_parquet_that_swells(tmp_path: Path) -> None:
    """Some kilobytes that say 160 MB."""
    table = pyarrow.table({"image": ["0.png"] * 160, "caption": ["x" * 1_000_000] * 160})
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"t\.parquet: expected a Parquet file \(more than 100 MB in 160 rows"):
        load_reading(path, Reading(skip=True))


def test_shards(tmp_path: Path) -> None:
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
    fuzz(tmp_path / "s.tar", plain, load)
