"""Sources made at random from known rows with known damage: rows read + rows named = rows made, values equal.

``CLIPFT_RANDOM_SOURCES`` is the number of sources of each kind; a longer run is the same with more.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from clipft.data.reading import Reading
from clipft.data.sources import load_reading

COUNT = int(os.environ.get("CLIPFT_RANDOM_SOURCES", "3"))
ROWS = 24
WORDS = ["a cat", "ein Hund,", 'said "so"', "写真", "\u2028", "🐱", "tab\there", "line\nbreak", "'", ";", "[x]", "1.0"]
FORMATS = {".png": "PNG", ".PNG": "PNG", ".bmp": "BMP", ".tiff": "TIFF", ".webp": "WEBP", ".ppm": "PPM", ".jfif": "PNG"}


@dataclass
class Row:
    name: str
    words: str
    pixels: np.ndarray
    ending: str
    damage: str | None

    @property
    def file(self) -> str:
        return self.name + self.ending

    @property
    def data(self) -> bytes:
        out = io.BytesIO()
        options = {"lossless": True} if self.ending == ".webp" else {}
        Image.fromarray(self.pixels).save(out, FORMATS[self.ending], **options)
        return b"broken" if self.damage == "broken picture" else out.getvalue()


def make_rows(rng: random.Random, kinds: list[str]) -> list[Row]:
    rows = []
    for number in range(ROWS):
        pixels = np.frombuffer(rng.randbytes(6 * 5 * 3), np.uint8).reshape(6, 5, 3)
        words = " ".join([f"n{number}", *rng.sample(WORDS, rng.randrange(4)), "."])
        damage = rng.choice(kinds) if number > 3 and rng.random() < 0.3 else None
        rows.append(Row(f"n{number:03d}", words, pixels, rng.choice(list(FORMATS)), damage))
    return rows


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_extras(rng: random.Random, folder: Path, names: list[str]) -> int:
    chosen = rng.sample(names, rng.randrange(len(names) + 1))
    for name in chosen:
        write(folder / name, b"extra")
    return len(chosen)


def write_pictures(rng: random.Random, folder: Path, rows: list[Row], subs: list[str]) -> None:
    for row in rows:
        row.name = rng.choice(subs) + row.name
        if row.damage == "heic":
            row.ending = ".heic"
            write(folder / row.file, b"\0\0\0\x18ftypheic")
        elif row.damage == "pipe":
            (folder / row.file).parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(folder / row.file)
        elif row.damage != "no picture":
            write(folder / row.file, row.data)


# ---- kinds of sources: each writes one, and says what to load and how many entries besides the rows it has ----


def class_folders(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, int]:
    write_pictures(rng, folder, rows, ["cat/", "dog/", "dog/a/b/", "cat/test/", "bird, x/", "cat/dog/"])
    for name in ("cat", "dog", "bird, x"):  # so that none is without
        write(folder / name / "one.png", make_rows(rng, [""])[0].data)
    names = [".DS_Store", "__MACOSX/cat/1.png", "cat/._1.png", "notes.md", "dog/labels.xml", "lost.png", "cat/x.txt"]
    return folder, write_extras(rng, folder, names)


def side_cars(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, int]:
    write_pictures(rng, folder, rows, ["", "00000/", "00001/", "10_cat/", "deep/er/"])
    for row in rows:
        texts = {"latin-1": b"caf\xe9", "blank": b" \n", "large": b"x" * (2 << 20)}
        if row.damage == "no text":
            continue
        if row.damage == "bad json" or (row.damage is None and rng.random() < 0.3):
            data = b"{" if row.damage else json.dumps({"caption": row.words, "n": 1}).encode()
            write(folder / f"{row.name}.json", data)
        else:
            write(folder / f"{row.name}.txt", texts.get(row.damage or "", f"{row.words}\n".encode()))
    return folder, write_extras(rng, folder, [".x.png", "00000_stats.json", "README.rst", "00000/gone.txt"])


def tables(kind: str):
    def make(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, int]:
        write_pictures(rng, folder, rows, ["", "a/", "b c/"])
        names = {"metadata.csv": ("file_name", "text")}.get(kind, ("image", "caption"))
        lines = [
            {names[0]: f"../{row.file}" if row.damage == "outside" else row.file, names[1]: row.words} for row in rows
        ]
        for row, line in zip(rows, lines, strict=True):
            if row.damage == "blank":
                line[names[1]] = "" if kind.endswith("csv") else None
        path = folder / (kind if "." in kind else f"t.{kind}")
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
        else:
            path.write_bytes(b"".join(text_lines(kind, names, rows, lines)))
        if kind == "metadata.csv":
            return folder, write_extras(rng, folder, ["more.png", "a/more.jpg", "._a.png", "more.csv"])
        return path, 0

    return make


def text_lines(kind: str, names: tuple[str, str], rows: list[Row], lines: list[dict[str, str]]) -> list[bytes]:
    if kind == "jsonl":
        texts = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines]
        return [
            {"broken row": b'{"image": \n', "latin-1": b'{"image": "caf\xe9"}\n'}.get(row.damage or "", text)
            for row, text in zip(rows, texts, strict=True)
        ]
    delimiter = "\t" if kind == "tsv" else ","
    texts = [delimiter.join(names).encode() + b"\n"]
    for row, line in zip(rows, lines, strict=True):
        out = io.StringIO()
        csv.writer(out, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(line.values())
        start = b"a.png" + delimiter.encode()
        broken = {"broken row": start * 2 + b"\n", "latin-1": start + b"caf\xe9\n"}
        texts.append(broken.get(row.damage or "", out.getvalue().encode()))
    return texts


def parquet_of_bytes(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, int]:
    images = [None if row.damage == "no picture" else row.data for row in rows]
    captions = [None if row.damage == "blank" else row.words for row in rows]
    table = pyarrow.table({"image": pyarrow.array(images, pyarrow.binary()), "caption": captions})
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=rng.choice([5, 100]))
    return folder / "t.parquet", 0


def shards(rng: random.Random, folder: Path, rows: list[Row]) -> tuple[Path, int]:
    extra = write_extras(rng, folder, [".part.tar", "00000_stats.json", "log.xml"])
    cut = rng.randrange(8, ROWS - 8)
    for number, own in enumerate((rows[:cut], rows[cut:])):
        members: list[tuple[str, bytes]] = []
        for row in own:
            row.name = rng.choice(["", "d/", "v1_"]) + row.name
            texts = {"latin-1": b"caf\xe9", "large": b"x" * (2 << 20), "blank": b" "}
            if row.damage != "no picture":
                members.append((row.file.lower(), row.data))
            if row.damage == "bad json" or (row.damage is None and rng.random() < 0.4):
                data = b"[{" if row.damage else json.dumps({"caption": row.words}).encode()
                members.append((f"{row.name}.json", data))
            elif row.damage != "no text":
                members += [(f"{row.name}.txt", texts.get(row.damage or "", row.words.encode()))]
            members += [(f"{row.name}.txt", b"again")] * (row.damage == "twice")
        if rng.random() < 0.5:
            rng.shuffle(members)
        with tarfile.open(
            folder / f"s-{number}.tar", "w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
        ) as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder, extra


KINDS = {
    "class folders": (class_folders, ["broken picture", "heic", "pipe"]),
    "side-cars": (side_cars, ["broken picture", "no text", "latin-1", "blank", "large", "bad json", "heic"]),
    "csv": (tables("csv"), ["broken picture", "no picture", "blank", "broken row", "latin-1", "outside"]),
    "tsv": (tables("tsv"), ["broken picture", "no picture", "blank", "broken row", "latin-1", "outside"]),
    "jsonl": (tables("jsonl"), ["broken picture", "no picture", "blank", "broken row", "latin-1", "outside"]),
    "metadata.csv": (tables("metadata.csv"), ["broken picture", "no picture", "blank"]),
    "parquet": (tables("parquet"), ["broken picture", "no picture", "blank", "outside"]),
    "parquet of bytes": (parquet_of_bytes, ["broken picture", "no picture", "blank"]),
    "shards": (shards, ["broken picture", "no picture", "no text", "bad json", "latin-1", "large", "blank", "twice"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(COUNT))
def test_every_row_is_read_or_named(kind: str, seed: int, tmp_path: Path) -> None:
    make, damage = KINDS[kind]
    rng = random.Random(f"{kind} {seed}")
    rows = make_rows(rng, damage)
    source, extra = make(rng, tmp_path, rows)
    reading = Reading(skip=True)
    dataset = load_reading(source, reading)

    good = [row for row in rows if row.damage is None]
    fixed = 3 * (kind == "class folders")  # that are not among the rows
    assert (reading.read, reading.given) == (len(good) + fixed, len(rows) + extra + fixed), reading.line()
    found = dict(zip((place for [place] in reading.places), dataset, strict=True))
    for number, row in enumerate(rows):
        place = next((place for place in found if is_place(place, row, number, kind)), None)
        assert (place is not None) == (row.damage is None), row
        if place is None:
            named = [name for own in reading.left_out.values() for name in own]
            assert any(is_place(name, row, number, kind) for name in named), (row, named)
        else:
            assert np.array_equal(np.asarray(found[place]["image"]), row.pixels), row
            if "label" in dataset.column_names:
                assert dataset.features["label"].names[found[place]["label"]] == row.name.partition("/")[0]
            else:
                assert found[place]["caption"] == row.words


def is_place(place: str, row: Row, number: int, kind: str) -> bool:
    if kind in ("class folders", "side-cars", "shards"):
        name = re.escape(row.name.lower())
        return re.search(rf"(^|[/ ]){name}(\.\w+)?$", place.lower()) is not None
    match = re.search(r"(row|line) (\d+)$", place)
    return match is not None and int(match[2]) == number + (match[1] == "line")
