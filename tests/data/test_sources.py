"""clipft.load_pairs: folders, tables, what is stored, and rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from tiny_clip import COLOURS, captioned, class_folders, encoded, picture, smooth

import clipft


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in a sub-folder, for tables to name."""
    (tmp_path / "data" / "img").mkdir(parents=True)
    for index in range(4):
        picture(index)[0].save(tmp_path / "data" / "img" / f"{index}.png")
    return tmp_path / "data"


def test_class_folders(tmp_path: Path) -> None:
    dataset = clipft.load_pairs(class_folders(tmp_path, 9))
    assert dataset.features["label"].names == sorted(COLOURS)
    assert len(dataset) == 9
    assert dataset[0]["image"].size == (50, 40)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in empty"):
        clipft.load_pairs(tmp_path)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows as a table of the kind that the name says."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\n".join(delimiter.join(map(str, line)) for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("image", "caption"), [("image", "caption"), ("filepath", "title"), ("file_name", "Text")])
def test_tables(folder: Path, suffix: str, image: str, caption: str) -> None:
    rows = [{image: f"img/{i}.png", caption: f"caption {i}", "more": i} for i in range(4)]
    dataset = clipft.load_pairs(write(folder / f"pairs{suffix}", rows))
    assert sorted(dataset.column_names) == ["caption", "image"]
    assert dataset["caption"][:] == [f"caption {i}" for i in range(4)]
    assert np.array_equal(np.asarray(dataset[2]["image"]), np.asarray(picture(2)[0]))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_several_captions_a_row(folder: Path, suffix: str) -> None:
    rows = [{"image": f"img/{i}.png", "captions": [f"{i}", f"{i} again"]} for i in range(3)]
    dataset = clipft.load_pairs(write(folder / f"pairs{suffix}", rows))
    assert dataset[1]["caption"] == ["1", "1 again"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_with_the_same_picture_are_one(folder: Path, suffix: str) -> None:
    rows = [{"image": f"img/{i % 2}.png", "caption": f"caption {i}"} for i in range(4)]
    dataset = clipft.load_pairs(write(folder / f"pairs{suffix}", rows))
    assert dataset["caption"][:] == [["caption 0", "caption 2"], ["caption 1", "caption 3"]]


def test_bytes_in_parquet(folder: Path) -> None:
    rows = [{"image": (folder / f"img/{i}.png").read_bytes(), "text": f"caption {i}"} for i in range(4)]
    dataset = clipft.load_pairs(write(folder / "pairs.parquet", rows))
    assert np.array_equal(np.asarray(dataset[3]["image"]), np.asarray(picture(3)[0]))
    captioned(3).to_parquet(folder / "images.parquet")  # the way datasets stores pictures
    assert clipft.load_pairs(folder / "images.parquet")[1]["image"].size == (50, 40)


def test_labels_in_tables(folder: Path) -> None:
    rows = [{"image": f"img/{i}.png", "label": ["wool", "silk"][i % 2]} for i in range(4)]
    dataset = clipft.load_pairs(write(folder / "pairs.csv", rows))
    assert dataset.features["label"].names == ["silk", "wool"]
    assert dataset["label"][:] == [1, 0, 1, 0]
    rows = [{"image": f"img/{i}.png", "label": i} for i in range(4)]
    assert clipft.load_pairs(write(folder / "numbers.csv", rows))["label"][:] == [0, 1, 2, 3]


def test_a_saved_data_set(tmp_path: Path) -> None:
    captioned(3).save_to_disk(tmp_path / "saved")
    assert clipft.load_pairs(tmp_path / "saved")["caption"][:] == captioned(3)["caption"][:]


def test_columns_by_name(folder: Path) -> None:
    path = write(folder / "pairs.csv", [{"photo": "img/0.png", "words": "a"}, {"photo": "img/1.png", "words": "b"}])
    dataset = clipft.load_pairs(path, image_column="photo", caption_column="words")
    assert dataset["caption"][:] == ["a", "b"]
    with pytest.raises(ValueError, match=r"column with images \(image, .*found \['photo', 'words'\]"):
        clipft.load_pairs(path)
    with pytest.raises(ValueError, match="column with captions"):
        clipft.load_pairs(path, image_column="photo")
    with pytest.raises(ValueError, match="caption_column: expected one of"):
        clipft.load_pairs(path, image_column="photo", caption_column="nope")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("path", ["../secret.png", "img/../../secret.png", "/etc/hostname"])
def test_a_table_cannot_reach_outside_its_folder(folder: Path, suffix: str, path: str) -> None:
    picture(0)[0].save(folder.parent / "secret.png")
    rows = [{"image": "img/0.png", "caption": "a"}, {"image": path, "caption": "b"}]
    with pytest.raises(ValueError, match=r"row 1: expected an image inside .* which leaves it"):
        clipft.load_pairs(write(folder / f"pairs{suffix}", rows))


def test_a_parquet_of_images_cannot_reach_outside_its_folder(folder: Path) -> None:
    picture(0)[0].save(folder.parent / "secret.png")
    image = {"bytes": None, "path": "../secret.png"}
    rows = datasets.Dataset.from_list([{"image": image, "caption": "a"}])
    rows.to_parquet(folder / "pairs.parquet")
    with pytest.raises(ValueError, match="which leaves it"):
        clipft.load_pairs(folder / "pairs.parquet")


def test_a_link_cannot_reach_outside_the_folder(folder: Path) -> None:
    picture(0)[0].save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(ValueError, match="which leaves it"):
        clipft.load_pairs(write(folder / "pairs.csv", [{"image": "link.png", "caption": "a"}]))


def test_bad_tables_name_file_and_row(folder: Path) -> None:
    good = {"image": "img/0.png", "caption": "a"}
    with pytest.raises(ValueError, match=r"pairs\.csv, row 1: expected a caption"):
        clipft.load_pairs(write(folder / "pairs.csv", [good, {"image": "img/1.png", "caption": ""}]))
    with pytest.raises(FileNotFoundError, match=r"pairs\.csv, row 1: there is no image 'img/9\.png'"):
        clipft.load_pairs(write(folder / "pairs.csv", [good, {"image": "img/9.png", "caption": "b"}]))
    (folder / "pairs.csv").write_text("image,caption\nimg/0.png,red, and blue\n")
    with pytest.raises(ValueError, match="row 0: expected 2 fields"):
        clipft.load_pairs(folder / "pairs.csv")
    (folder / "pairs.jsonl").write_text('{"image": "img/0.png", "caption": "a"}\n{"image": \n')
    with pytest.raises(ValueError, match="line 2: expected one JSON object"):
        clipft.load_pairs(folder / "pairs.jsonl")
    (folder / "pairs.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ending in \.csv"):
        clipft.load_pairs(folder / "pairs.xlsx")
    with pytest.raises(FileNotFoundError, match="no 'none/there"):
        clipft.load_pairs("none/there.csv")


# ---- rows that cannot be used ----


@pytest.fixture
def faulty(folder: Path) -> Path:
    """A table of four good rows and four bad ones: no caption, no file, a cut-off picture, a picture that is none."""
    whole = encoded(smooth(300, 300)).data
    (folder / "img" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "img" / "text.png").write_bytes(b"no picture")
    rows = [{"image": f"img/{i}.png", "caption": f"caption {i}"} for i in range(4)]
    rows[1:1] = [{"image": "img/0.png", "caption": " "}, {"image": "img/9.png", "caption": "x"}]
    rows += [{"image": "img/cut.jpg", "caption": "cut"}, {"image": "img/text.png", "caption": "text"}]
    return write(folder / "pairs.jsonl", rows)


def test_bad_rows_are_errors_or_left_out_and_counted(faulty: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="row 1: expected a caption"):
        clipft.load_pairs(faulty)
    dataset = clipft.load_pairs(faulty, on_bad_row="skip")
    assert dataset["caption"][:] == [f"caption {i}" for i in range(4)]
    assert "left out 4 of 8 rows" in caplog.text
    for row, fault in ((1, "expected a caption"), (2, "there is no image"), (6, "truncated"), (7, "cannot identify")):
        assert any(f"row {row}" in part and fault in part for part in caplog.text.split("; "))
    with pytest.raises(ValueError, match="on_bad_row: expected 'error' or 'skip', got 'warn'"):
        clipft.load_pairs(faulty, on_bad_row="warn")


def test_bad_rows_of_other_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path / "classes", 8)
    (tmp_path / "classes" / "red" / "broken.png").write_bytes(b"")
    assert len(clipft.load_pairs(tmp_path / "classes", on_bad_row="skip")) == 8
    good = encoded(smooth(64, 64)).data
    rows = [{"image": good, "text": "a"}, {"image": good[:900], "text": "b"}, {"image": good, "text": ""}]
    write(tmp_path / "pairs.parquet", [*rows, {"image": good, "text": "d"}])
    caplog.clear()
    assert clipft.load_pairs(tmp_path / "pairs.parquet", on_bad_row="skip")["caption"][:] == ["a", "d"]
    assert "row 1: the image cannot be read" in caplog.text
    assert "row 2: expected a caption" in caplog.text
    (tmp_path / "pairs.csv").write_text("image,caption\nx.png,red, and blue\n")
    with pytest.raises(ValueError, match="at least one row"):
        clipft.load_pairs(tmp_path / "pairs.csv", on_bad_row="skip")


def test_paths_may_leave_the_folder_where_allowed(folder: Path) -> None:
    picture(0)[0].save(folder.parent / "outside.png")
    for path in ("../outside.png", str(folder.parent / "outside.png")):
        table = write(folder / "pairs.csv", [{"image": path, "caption": "a"}])
        with pytest.raises(ValueError, match="--allow-outside-paths"):
            clipft.load_pairs(table)
        assert clipft.load_pairs(table, allow_outside=True)[0]["image"].size == (50, 40)
