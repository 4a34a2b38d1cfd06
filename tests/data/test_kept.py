"""Pictures alone: every row of a source at its place, whatever is wrong with it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clipft.data.kept import kept_rows
from clipft.data.reading import BadRowError, Reading
from clipft.data.sources import read_pairs


def rows_of(source: Path | str, image_column: str | None = None) -> list[tuple[str, str]]:
    """Of each row its name, and what is wrong with it."""
    reading = Reading(named=(image_column, None, None), skip=True, pictures_only=True)
    rows = kept_rows(read_pairs(source, None, reading, "all"), reading)
    for row in range(len(rows)):
        if rows.fault(row) is not None:
            with pytest.raises(BadRowError):
                rows[row]
        else:
            assert Path(rows[row]["image"]["path"]).name.endswith(("png", "jpg"))
    assert [one is None for one in rows.stored()] == [rows.fault(row) is not None for row in range(len(rows))]
    return [(rows.name(row), rows.fault(row) or "") for row in range(len(rows))]


def alike(found: list[tuple[str, str]], wanted: list[tuple[str, str]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (_, why), (_, words) in zip(found, wanted, strict=True):
        assert bool(why) == bool(words) and words in why


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("0.png", "1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_rows_of_tables(folder: Path) -> None:
    lines = ["image,note", "2.png,a", '"1.png,open', "gone.png,b", "0.png,c", "0.png", "1.png,\0", "1.png,d"]
    (folder / "t.csv").write_text("\n".join(lines))
    alike(
        rows_of(folder / "t.csv"),
        [
            ("2.png", ""),
            ("row 1", "a quote"),
            ("row 2", "there is no image 'gone.png'"),
            ("0.png", ""),
            ("row 4", "expected 2 fields"),
            ("row 5", "a NUL byte"),
            ("1.png", ""),
        ],
    )
    objects = ['{"image": "gone.png"}', "", "[1]", '{"image": "1.png"}', '{"other": 1}', '{"image": "0.png"}']
    (folder / "t.jsonl").write_text("\n".join(objects))
    alike(
        rows_of(folder / "t.jsonl"),
        [
            ("row 0", "there is no image"),
            ("line 3", "expected a JSON object"),
            ("1.png", ""),
            ("row 4", "expected the keys of row 0"),
            ("0.png", ""),
        ],
    )


def test_pictures_of_folders_and_patterns(folder: Path) -> None:
    below = folder / "many" / "below"
    below.mkdir(parents=True)
    for place in (folder / "many", below):
        (place / "a.png").symlink_to(folder / "0.png")
        (place / "b.heic").touch()
        (place / "c.png").symlink_to(folder / "0.png")
        (place / "d.png").symlink_to("nowhere")
    own = [("a.png", ""), ("b.heic", ".heic is not opened"), ("c.png", ""), ("d.png", "a link to nothing")]
    alike(rows_of(folder / "many"), [*own, *((f"below/{name}", why) for name, why in own)])
    alike(rows_of(str(below / "*")), [(str(below / name), why) for name, why in own])


def test_what_cannot_be_opened_stands_behind_the_samples_of_a_folder(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "0.png", "x.png")
    (folder / "3.heic").touch()
    found = rows_of(folder, "png")
    assert [(Path(name).name, bool(why)) for name, why in found] == [("x.png", False), ("3.heic", True)]


def test_a_picture_without_an_ending_whose_name_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "0.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff"))
    found = rows_of(folder)
    assert [bool(why) for _, why in found].count(True) == 1 and any("\\xff" in name for name, _ in found)


def test_samples_of_shards_and_what_of_them_is_damaged(folder: Path) -> None:
    for shard, names in (("a", ("1.png", "2.txt")), ("b", ("3.png", "4.json", "5.png"))):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name in names:
                data = (folder / "0.png").read_bytes() if name.endswith("png") else json.dumps({}).encode()
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[:1024] + b"\1" * 512)  # the second header
    alike(
        rows_of(str(folder / "*.tar")),
        [
            ("a.tar/1.png", ""),
            (str(folder / "a.tar"), "expected an uncompressed tar file"),
            ("b.tar/3.png", ""),
            (f"{folder / 'b.tar'}, 4", "expected a picture"),
            ("b.tar/5.png", ""),
        ],
    )
