"""Text tables, labels and captions: each row read as it stands, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_clip import class_folders, picture

import clipft
from clipft.data.reading import Reading
from clipft.data.sources import load_reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures for tables to name."""
    for index in range(6):
        picture(index)[0].save(tmp_path / f"{index}.png")
    return tmp_path


def read(path: Path, text: str | bytes, **options: Any) -> Any:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return clipft.load_pairs(path, **options)


def skipping(path: Path, text: str | bytes) -> tuple[list[Any], dict[str, list[str]]]:
    """The captions that are read, and what is left out."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    reading = Reading(skip=True)
    rows = load_reading(path, reading)
    assert reading.given == reading.read + sum(map(len, reading.left_out.values()))
    return rows["caption"][:], reading.left_out


def lines(rows: list[Any], **more: Any) -> str:
    own = (json.dumps({"image": f"{i}.png", "caption": text}, ensure_ascii=False) for i, text in enumerate(rows))
    return "".join(f"{line}\n" for line in own)


# ---- lines and encodings ----


def test_lines_end_at_newlines_alone(folder: Path) -> None:
    odd = ["a\u2028b", "c\u0085d", "e\x0bf", "g\x1ch"]
    assert read(folder / "t.jsonl", lines(odd))["caption"][:] == odd
    text = "image,caption\r\n" + "".join(f"{i}.png,{caption}\r\n" for i, caption in enumerate(odd))
    assert read(folder / "t.csv", text)["caption"][:] == odd
    quoted = 'image,caption\n0.png,"a dog,\nin a ""park"""\n1.png,b\n'
    assert read(folder / "t.csv", quoted)["caption"][:] == ['a dog,\nin a "park"', "b"]
    assert read(folder / "t.csv", "image,caption\n0.png,a\rb\n")["caption"][:] == ["a\rb"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_text(folder: Path, encoding: str) -> None:
    assert read(folder / "t.jsonl", lines(["ä", "b"]).encode(encoding))["caption"][:] == ["ä", "b"]
    assert read(folder / "t.csv", "image,caption\n0.png,ä\n".encode(encoding))["caption"][:] == ["ä"]


def test_another_encoding_is_named(folder: Path) -> None:
    table, objects = "image,caption\n0.png,a\n1.png,café\n".encode("latin-1"), lines(["a", "café"]).encode("latin-1")
    for name, data in (("t.csv", table), ("t.jsonl", objects)):
        with pytest.raises(
            ValueError, match=rf"{name}, (row 1|line 2): expected text in UTF-8, got the byte 0xe9.*enco"
        ):
            read(folder / name, data)
        assert read(folder / name, data, encoding="latin-1")["caption"][:] == ["a", "café"]
        assert skipping(folder / name, data)[0] == ["a"]
    assert (
        read(folder / "t.csv", "image,caption\n0.png,ä\n".encode("utf-16-le"), encoding="utf-16-le")["caption"][0]
        == "ä"
    )
    with pytest.raises(ValueError, match="encoding: expected a text encoding such as latin-1"):
        read(folder / "t.csv", table, encoding="klingon")


# ---- broken rows ----

ROWS = "".join(f"{i}.png,caption {i}\n" for i in range(1, 6))
BROKEN = {
    "a quote that never closes": '0.png,"big dog\n',
    "text after a quote": '0.png,"big" dog\n',
    "too few fields": "0.png\n",
    "too many fields": "0.png,red, and blue\n",
    "a NUL byte": "0.png,a\0b\n",
    "a NUL byte in a path": "0\0.png,a\n",
    "a field over the limit": f"0.png,{'x' * 140000}\n",
    "a quoted field over the limit": f'0.png,"{"x" * 140000}"\n',
    "no caption": "0.png, \n",
    "a list as text": "0.png,\"['a dog', 'b']\"\n",
    "a list of numpy's": "0.png,\"['a dog' 'b']\"\n",
    "a list with both quotes": '0.png,"[""a dog\'s bone"", \'b\']"\n',
    "an empty list": "0.png,[]\n",
    "an object": "0.png,\"{'raw': 'a dog'}\"\n",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_row_costs_no_other(folder: Path, fault: str) -> None:
    for place, row in enumerate(range(6)):
        parts = ROWS.splitlines(keepends=True)
        text = "image,caption\n" + "".join([*parts[:place], BROKEN[fault], *parts[place:]])
        with pytest.raises(ValueError, match=rf"t\.csv, row {row}: "):
            read(folder / "t.csv", text)
        captions, left_out = skipping(folder / "t.csv", text)
        assert captions == [f"caption {i}" for i in range(1, 6)]
        assert list(left_out.values()) == [[f"row {row}"]]


def test_brackets_alone_make_no_list(folder: Path) -> None:
    captions = ["[untitled]", "(1 of 2)", "[sic] a 'red' dog", "(the 'Ace')", "{x}", "[red] and [blue]"]
    assert read(folder / "t.jsonl", lines(captions))["caption"][:] == captions


def test_a_quote_that_closes_rows_later_is_seen(folder: Path) -> None:
    text = 'image\tcaption\n0.png\t"big dog\n1.png\tcat\n2.png\tx\n3.png\tend"\n4.png\tlast\n'
    with pytest.raises(ValueError, match="row 0: a quote that begins here and swallows rows"):
        read(folder / "t.tsv", text)
    assert skipping(folder / "t.tsv", text)[0] == ["cat", "x", 'end"', "last"]


def test_objects_that_are_none(folder: Path) -> None:
    deep = "[" * 100_000
    faults = ['{"image": ', "[1]", f'{{"image": "0.png", "caption": {deep}', '{"n":' + "9" * 5000 + "}", "\0"]
    faults += ['{"image": "0.png", "caption": "x\\ud800"}', '{"image": "\\ud800.png", "caption": "x"}']
    for fault in faults:
        good = lines(["a", "b"])
        with pytest.raises(ValueError, match=r"t\.jsonl, (line 3|row 2): ") as error:
            read(folder / "t.jsonl", good + fault + "\n")
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)
        assert skipping(folder / "t.jsonl", good + fault + "\n")[0] == ["a", "b"]


def test_half_a_character_in_ids_and_attributes(folder: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": "a", "id": "x", "kind": "k"} for i in range(3)]
    rows[0]["id"], rows[1]["kind"] = "x\ud800", "k\ud800"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(ValueError, match=r"t\.jsonl, row 1: expected text, got half a character in 'k\\ud800'"):
        read(folder / "t.jsonl", text, attribute_columns=["kind"])
    reading = Reading(skip=True, pictures_only=True, id_column="id")
    assert load_reading(folder / "t.jsonl", reading)["id"][:] == ["x", "x"]
    assert reading.line() == "read 2 of 3: 1 without an id: row 0"


def test_headers_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected each column once, got 'caption' more than once"):
        read(folder / "t.csv", "image,caption,caption\n0.png,a,b\n")
    with pytest.raises(ValueError, match="at least one row"):
        read(folder / "t.csv", "\n\n")


def test_paths_of_windows(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    picture(0)[0].save(folder / "a" / "b" / "0.png")
    picture(1)[0].save(folder / "a\\1.png")  # a name on this system
    text = "image,caption\na\\b\\0.png,x\na\\1.png,y\n"
    assert read(folder / "t.csv", text)["caption"][:] == ["x", "y"]
    with pytest.raises(ValueError, match="which leaves it"):
        read(folder / "t.csv", "image,caption\na\\..\\..\\x.png,x\n")


def test_odd_paths_are_bad_rows(folder: Path) -> None:
    (folder / "l1.png").symlink_to("l2.png")
    (folder / "l2.png").symlink_to("l1.png")
    names = ["l1.png", "x" * 300 + ".png", "~nobody/x.png", "http://example.org/x.png"]
    text = "image,caption\n0.png,a\n" + "".join(f"{name},x\n" for name in names)
    assert skipping(folder / "t.csv", text) == (["a"], {"without its file": [f"row {row}" for row in range(1, 5)]})
    for source in ("~no-such-user-here/x.csv", "x" * 5000 + "/y.csv", "./a\0b.csv"):
        with pytest.raises((ValueError, OSError), match="there is no"):
            clipft.load_pairs(source)


@pytest.mark.parametrize(
    "row", ['{"image": "LONG", "caption": "a"}', '{"LONG": 1}', '{"image": "0.png", "caption": ["LONG", 1]}']
)
def test_a_message_holds_no_more_than_the_first_of_a_value(folder: Path, row: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"t\.jsonl, row 1: ") as error:  # a picture as base64, for instance
        read(folder / "t.jsonl", lines(["a"]) + row.replace("LONG", "x" * 10**6) + "\n")
    assert len(str(error.value)) < 1000


# ---- labels ----


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_labels_are_no_classes(folder: Path, suffix: str) -> None:
    for odd in ([None, "nan?"], ["", " "], [float("nan"), 1.0]):
        labels = ["cat", "dog", " cat "] if isinstance(odd[1], str) else [1.0, 2, 1]
        own = [*labels, odd[0]]
        if suffix == ".jsonl":
            text = "".join(json.dumps({"image": f"{i}.png", "label": value}) + "\n" for i, value in enumerate(own))
            (folder / "t.jsonl").write_text(text)
        else:
            table = pyarrow.table({"image": [f"{i}.png" for i in range(4)], "label": pyarrow.array(own)})
            pyarrow.parquet.write_table(table, folder / "t.parquet")
        with pytest.raises(ValueError, match="row 3: expected a label, got"):
            clipft.load_pairs(folder / f"t{suffix}")
        rows = clipft.load_pairs(folder / f"t{suffix}", on_bad_row="skip")
        if isinstance(labels[0], str):
            assert (rows.features["label"].names, rows["label"][:]) == (["cat", "dog"], [0, 1, 0])
        else:
            assert rows["label"][:] == [1, 2, 1]


def test_a_list_is_no_label(folder: Path) -> None:
    text = '{"image": "0.png", "label": ["a", "b"]}\n{"image": "1.png", "label": "a"}\n'
    with pytest.raises(ValueError, match="row 0: expected one label, got a list"):
        read(folder / "t.jsonl", text)


def test_labels_with_classes_of_their_own(folder: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [picture(i)[0] for i in range(3)], "label": [0, -1, 1]}, features)
    rows.to_parquet(folder / "t.parquet")
    with pytest.raises(ValueError, match="row 1: expected the number of one of 2 classes, got -1"):
        clipft.load_pairs(folder / "t.parquet")
    assert clipft.load_pairs(folder / "t.parquet", on_bad_row="skip")["label"][:] == [0, 1]


# ---- Parquet ----


def test_parquet_is_read_where_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache to write to or to be stale, and a path is no pattern."""
    place = folder / "a[0]" / "t?.parquet"
    place.parent.mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/none")
    bytes_of = [(folder / f"{i}.png").read_bytes() for i in range(3)]
    for captions in (["a", "b", "c"], ["d", "e", "f"]):
        pyarrow.parquet.write_table(pyarrow.table({"image": bytes_of, "caption": captions}), place)
        assert clipft.load_pairs(place)["caption"][:] == captions
    monkeypatch.setattr("clipft.data.stored._IN_MEMORY", 0)
    assert clipft.load_pairs(place)["caption"][:] == captions
    assert clipft.load_pairs(place)[2]["image"].size == (50, 40)
    for junk in (b"PAR1junk", b"", place.read_bytes()[:-200]):
        (folder / "junk.parquet").write_bytes(junk)
        with pytest.raises(ValueError, match=r"junk\.parquet: expected a Parquet file"):
            clipft.load_pairs(folder / "junk.parquet")


# ---- folders of tables ----


def test_a_folder_is_read_as_data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither a README's configuration nor a name decides what is read."""
    outside = tmp_path_factory.mktemp("outside")
    image = [(folder / "0.png").read_bytes()]
    pyarrow.parquet.write_table(pyarrow.table({"image": image, "caption": ["outside"]}), outside / "secret.parquet")
    files = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {outside}/secret.parquet\n"
    (folder / "README.md").write_text(f"---\n{files}---\n")
    (folder / "t.csv").write_text("image,caption\n0.png,inside\n")
    reading = Reading()
    assert load_reading(folder, reading)["caption"][:] == ["inside"]
    assert reading.line() == "read 1 of 6: 5 not in the table"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_metadata_beside_pictures(folder: Path, suffix: str) -> None:
    names = ["train_0.png", "test 1.png", "b.png"]
    for sub in ("x", "y"):
        (folder / "d" / sub).mkdir(parents=True)
        for i, name in enumerate(names):
            picture(i)[0].save(folder / "d" / sub / name)
        rows = [{"file_name": name, "text": f"{sub} {name}"} for name in names]
        target = folder / "d" / sub / f"metadata{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
        elif suffix == ".jsonl":
            target.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            target.write_text("file_name,text\n" + "".join(f"{row['file_name']},{row['text']}\n" for row in rows))
    picture(0)[0].save(folder / "d" / "y" / "more.png")
    reading = Reading()
    rows = load_reading(folder / "d", reading)
    assert rows["caption"][:] == [f"{sub} {name}" for sub in ("x", "y") for name in names]
    assert reading.left_out == {"not in the table": ["y/more.png"]}


def test_strays_beside_class_folders(folder: Path) -> None:
    root = class_folders(folder / "classes", 8)
    for name in ("test_1", "train 2"):
        picture(0)[0].save(root / "red" / f"{name}.png")
    (root / "notes.csv").write_text("who,when\nme,now\n")
    (root / "red" / "more.jsonl").write_text("junk\n")
    (root / "x.tar").write_bytes(b"")
    reading = Reading()
    assert len(load_reading(root, reading)) == 10
    assert reading.line() == "read 10 of 13: 2 table beside the classes, 1 shard beside the classes"
    (root / "list.csv").write_text("image,label\nred/0.png,red\n")
    with pytest.raises(ValueError, match=r"has class folders, and list\.csv, which lists pictures too: give the file"):
        clipft.load_pairs(root)


# ---- splits ----


def splits(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        class_folders(root / name, 8 + 4 * number)
    return root


def test_folders_of_splits(folder: Path) -> None:
    root = splits(folder / "a", "train", "val", "test")
    found = {split: len(clipft.load_pairs(root, split=split)) for split in ("train", "val", "test", None)}
    assert found == {"train": 8, "val": 12, "test": 16, None: 8}
    assert len(clipft.load_pairs(f"{root}:test")) == 16
    reading = Reading()
    load_reading(root, reading, purpose="test")
    assert reading.line() == "split test, read 16 of 16"
    with pytest.raises(ValueError, match=r"split: expected one of test, train, val of .*, got 'dev'"):
        clipft.load_pairs(root, split="dev")
    with pytest.raises(ValueError, match="split: expected the split of"):
        clipft.load_pairs(f"{root}:test", split="val")
    validation = Reading()
    assert len(load_reading(splits(folder / "c", "train", "valid"), validation, purpose="test")) == 12
    with pytest.raises(ValueError, match="val and validation are both names of a validation set"):
        load_reading(splits(folder / "e", "train", "val", "validation"), Reading(), purpose="test")
    picture(0)[0].save(folder / "train:1.png")
    (folder / "t.csv:test").mkdir()
    class_folders(folder / "t.csv:test", 8)
    assert len(clipft.load_pairs(folder / "t.csv:test")) == 8  # a path goes before SOURCE:SPLIT


def test_sub_folders_that_are_classes_all_the_same(folder: Path) -> None:
    for names in (("train", "tram"), ("test", "val")):
        root = folder / "-".join(names)
        for name in names:
            (root / name).mkdir(parents=True)
            picture(0)[0].save(root / name / "0.png")
        assert clipft.load_pairs(root).features["label"].names == sorted(names)
        with pytest.raises(ValueError, match="has no splits, got 'test'"):
            clipft.load_pairs(root, split="test")


def test_tables_named_as_splits(folder: Path) -> None:
    def table(name: str, count: int) -> None:
        (folder / "d").mkdir(exist_ok=True)
        rows = "".join(f"../{i}.png,{name} {i}\n" for i in range(count))
        (folder / "d" / name).write_text("image,caption\n" + rows)

    table("train-00000-of-00002.csv", 2)
    table("train-00001-of-00002.csv", 3)
    table("test-00000-of-00001.csv", 1)
    assert len(clipft.load_pairs(folder / "d", allow_outside=True)["caption"]) == 3  # of two files, joined by picture
    assert clipft.load_pairs(folder / "d", split="test", allow_outside=True)["caption"][:] == [
        "test-00000-of-00001.csv 0"
    ]
    for name in ("pairs_train.csv", "pairs_test.csv"):
        table(name, 2)
    with pytest.raises(ValueError, match=r"pairs_test\.csv.* may be a split each; give one of"):
        clipft.load_pairs(folder / "d")


def test_saved_splits_stay_in_their_folder(folder: Path) -> None:
    import datasets
    from tiny_clip import captioned

    saved = datasets.DatasetDict({"train": captioned(3), "test": captioned(2)})
    saved.save_to_disk(folder / "saved")
    assert (len(clipft.load_pairs(folder / "saved")), len(clipft.load_pairs(f"{folder}/saved:test"))) == (3, 2)
    state = json.loads((folder / "saved" / "train" / "state.json").read_text())
    own = state["_data_files"][0]["filename"]
    hidden = json.dumps(state | {"_format_type": "numpy", "_format_columns": ["image"]})
    for name in (f"../test/{own}", "..", "", "é" * 200):  # 400 bytes, which no file's name has
        state["_data_files"][0]["filename"] = name
        (folder / "saved" / "train" / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="names files outside of it"):
            clipft.load_pairs(folder / "saved")
    (folder / "saved" / "train" / "state.json").write_text(hidden)
    assert clipft.load_pairs(f"{folder}/saved:train")[0].keys() >= {"image", "caption"}
    saved["train"].select([]).save_to_disk(folder / "none")
    with pytest.raises(ValueError, match=r"none: state\.json.*expected at least one row, found none"):
        clipft.load_pairs(folder / "none")
    for name in ("../x", ".."):
        (folder / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
        with pytest.raises(ValueError, match="names splits outside of its folder"):
            clipft.load_pairs(folder / "saved")


def test_each_line_of_a_row_is_looked_at(tmp_path: Path) -> None:
    picture(0)[0].save(tmp_path / "0.png")
    for bad, message in ((b"\xe9", "0xe9"), (b"\0", "a NUL byte")):
        (tmp_path / "t.csv").write_bytes(b'image,caption\n0.png,"one line\nand ' + bad + b'"\n')
        with pytest.raises(ValueError, match=rf"t\.csv, row 0: .*{message}"):
            clipft.load_pairs(tmp_path / "t.csv")
