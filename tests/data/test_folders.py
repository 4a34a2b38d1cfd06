"""clipft.load_pairs on folders: every entry is read, or counted and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny_clip import class_folders, picture

import clipft
from clipft.data.reading import Reading
from clipft.data.sources import load_reading


def draw(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number)[0].save(path, format="PNG")


def read(folder: Path, **options) -> tuple[list[tuple[str, object]], Reading]:
    """Each row's path in the folder and its caption or class, and the account."""
    reading = Reading(**options)
    rows = load_reading(folder, reading)
    column = "caption" if "caption" in rows.column_names else "label"
    names = rows.features["label"].names if column == "label" else None
    paths = [os.path.relpath(path, folder) for [path] in reading.places]
    return [(path, names[value] if names else value) for path, value in zip(paths, rows[column], strict=True)], reading


# ---- class folders ----


def test_sub_folders_of_classes_are_read(tmp_path: Path) -> None:
    names = ["cat/1.png", "cat/a/2.png", "cat/a/b/3.PNG", "dog/train/4.png", "dog/test/1.jfif", "dog/5"]
    draw(*(tmp_path / name for name in names))
    rows, reading = read(tmp_path)
    assert sorted(rows) == sorted((name, name[:3]) for name in names)
    assert reading.line() == "read 6 of 6"


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    class_folders(tmp_path, 8)
    hidden = ["._x.jpg", "red/.ipynb_checkpoints/1.png", "__MACOSX/red/1.png", "blue/Thumbs.db", "red/desktop.ini"]
    draw(*(tmp_path / name for name in hidden), tmp_path / "above.png")
    (tmp_path / "red" / "notes.txt").write_text("of another kind\n")
    (tmp_path / "LICENSE").write_text("words\n")
    rows, reading = read(tmp_path)
    assert {key: len(names) for key, names in reading.left_out.items()} == {
        "hidden": 5,
        "of another kind": 2,
        "in no class folder": 1,
    }
    assert (len(rows), reading.read, reading.given) == (8, 8, 16)
    assert "__MACOSX" in reading.left_out["hidden"]
    draw(tmp_path / "__background__" / "1.png")  # a name that begins so is no system's
    assert ("__background__/1.png", "__background__") in read(tmp_path)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photo.heic", r"red/photo\.heic: \.heic is not opened: install pillow-heif"),
        ("plan.svg", r"red/plan\.svg: \.svg is not opened: convert to"),
        ("pipe.png", r"red/pipe\.png: expected a file, found a pipe"),
        ("loop.png", r"red/loop\.png: expected a file, found .* a link to nothing"),
        (b"caf\xe9.png", r"red/caf\\xe9\.png: expected a name in UTF-8"),
        ("broken.png", r"red/broken\.png: the image cannot be read"),
    ],
    ids=str,
)
def test_a_picture_that_cannot_be_opened_is_a_bad_row(tmp_path: Path, name: str | bytes, message: str) -> None:
    class_folders(tmp_path, 8)
    path = os.path.join(os.fsencode(tmp_path / "red"), os.fsencode(name))  # noqa: PTH118  (bytes)
    if name == "pipe.png":
        os.mkfifo(path)
    elif name == "loop.png":
        os.symlink(path, path)  # noqa: PTH211
    else:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(b"no picture")
    if name != "broken.png":  # which is seen when its turn comes
        with pytest.raises(ValueError, match=message):
            clipft.load_pairs(tmp_path)
    rows, reading = read(tmp_path, skip=True)
    assert (len(rows), reading.given) == (8, 9)
    [why] = reading.skipped
    with pytest.raises(ValueError, match=message):
        raise ValueError(why)


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "root", 8)
    draw(tmp_path / "elsewhere" / "1.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "red" / "up").symlink_to(root)
    (root / "red again").symlink_to(root / "red")
    os.mkfifo(root / "red" / "control")  # of another kind
    rows, reading = read(root)
    assert (len(rows), reading.line()) == (
        9,
        "read 9 of 12: 2 a link to a folder that was read, 1 of another kind",
    )


def test_classes_without_pictures(tmp_path: Path) -> None:
    class_folders(tmp_path, 8)
    (tmp_path / "void" / "deep").mkdir(parents=True)
    with pytest.raises(ValueError, match="no pictures in void"):
        clipft.load_pairs(tmp_path)
    rows, reading = read(tmp_path, skip=True)
    assert (len(rows), reading.line()) == (8, "read 8 of 9: 1 without pictures: void")
    draw(tmp_path / "one" / "all" / "cat" / "1.png")
    with pytest.raises(ValueError, match=r"found 1 sub-folders; give .*/one/all itself\?; for captions a text beside"):
        clipft.load_pairs(tmp_path / "one")


def test_what_stands_beside_splits_is_counted(tmp_path: Path) -> None:
    for part in ("train", "test"):
        class_folders(tmp_path / part, 8)
    draw(tmp_path / "__MACOSX" / "train" / "1.png", tmp_path / "lost.png", tmp_path / ".x.png")
    assert read(tmp_path)[1].line() == "split train, read 8 of 11: 2 hidden, 1 beside the splits"
    (tmp_path / "test.csv").write_text("image,caption\ntest/red/0.png,a\n")
    with pytest.raises(ValueError, match=r"has test, train, and test\.csv, which lists pictures too: give the file"):
        read(tmp_path)
    assert len(clipft.load_pairs(f"{tmp_path}:test")) == 8


def test_of_a_table_beside_the_classes_the_columns_alone_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_folders(tmp_path, 8)
    columns = {"id": [1], "blob": [b"x"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "features.parquet")
    (tmp_path / "notes.csv").write_text('id,note\n1,first\n2,"a quote that is open\n')
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", lambda *_: pytest.fail("rows were read"))
    assert read(tmp_path)[1].line() == "read 8 of 10: 2 table beside the classes"
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "text": ["a"]}), tmp_path / "features.parquet")
    with pytest.raises(ValueError, match=r"has class folders, and features\.parquet, which lists pictures too"):
        read(tmp_path)


# ---- texts beside pictures ----


def test_texts_beside_pictures_are_captions(tmp_path: Path) -> None:
    """As kohya's scripts and img2dataset have them, in sub-folders and with parquet beside."""
    names = ["0.png", "cat/1.png", "10_dog/2.png", "a.b.png"]
    draw(*(tmp_path / name for name in names))
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f" caption of {name}\n")
        (tmp_path / name).with_suffix(".json").write_text(json.dumps({"caption": "other", "url": "http://x"}))
    table = pyarrow.table({"url": ["http://x"], "caption": ["other"], "key": ["0"], "status": ["success"]})
    pyarrow.parquet.write_table(table, tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    rows, reading = read(tmp_path)
    assert sorted(rows) == sorted((name, f"caption of {name}") for name in names)
    assert reading.line() == "read 4 of 6: 1 text without a picture, 1 table beside the pictures"
    (tmp_path / "list.csv").write_text("image,caption\n0.png,other\n")
    with pytest.raises(ValueError, match=r"has texts beside its pictures, and list\.csv, which lists pictures too"):
        clipft.load_pairs(tmp_path)


def test_captions_in_json_beside_pictures(tmp_path: Path) -> None:
    draw(*(tmp_path / f"{i}.png" for i in range(3)))
    for i in range(3):
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": f"of {i}", "mood": "glad", "class": i}))
    assert read(tmp_path)[0] == [(f"{i}.png", f"of {i}") for i in range(3)]
    dataset = clipft.load_pairs(tmp_path, caption_column="mood", attribute_columns=["class"])
    assert (dataset["caption"][:], dataset["class"][:]) == (["glad"] * 3, [0, 1, 2])


def test_a_bad_text_is_a_bad_row(tmp_path: Path) -> None:
    draw(*(tmp_path / f"{i}.png" for i in range(6)))
    texts = [b"fine", b"caf\xe9", b"x" * (2 << 20), b" \n", b"nul\0"]  # and none
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    rows, reading = read(tmp_path, skip=True)
    assert rows == [("0.png", "fine")]
    assert [why.removeprefix(f"{tmp_path}/")[:38] for why in reading.skipped] == [
        "1.txt: expected text in UTF-8, got the",
        "2.txt: expected a text of at most 1 MB",
        "4.txt: expected text, got a NUL byte; ",
        "3.png: expected a caption or a list of",
        "5.png: expected a caption or a list of",
    ]
    assert (reading.read, reading.given) == (1, 6)


def test_a_few_texts_make_no_captions_of_classes(tmp_path: Path) -> None:
    class_folders(tmp_path, 8)
    (tmp_path / "red" / "0.txt").write_text("0 .5 .5 .1 .1")
    for path in tmp_path.glob("*/*.png"):
        path.with_suffix(".json").write_text('{"version": "5.0", "shapes": []}')  # as labelme leaves them
    assert read(tmp_path)[1].line() == "read 8 of 17: 9 of another kind"
