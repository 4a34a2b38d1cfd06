"""The account of what was read and left out: its arithmetic, its line, and who says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run
from tiny_clip import picture

from clipft.data.reading import BadRowError, Reading
from clipft.data.sources import load_reading


def test_the_line_and_its_json() -> None:
    reading = Reading(skip=True, source="pictures/")
    reading.finish(118)
    for number in range(9):
        reading.leave_out(".heic (install pillow-heif)", f"pictures/cat/{number}.heic")
    for name in ("a", "b", "c"):
        reading.leave_out("hidden", f"pictures/.{name}")
    with reading.row():
        raise BadRowError("pictures/cat/7.jpg", "the image cannot be read", "unreadable")
    assert reading.line() == "read 118 of 131: 9 .heic (install pillow-heif), 3 hidden, 1 unreadable: cat/7.jpg"
    account = reading.to_json()
    assert (account["given"], account["read"], account["line"]) == (131, 118, reading.line())
    assert account["left_out"]["hidden"] == {"count": 3, "names": [".a", ".b", ".c"]}
    assert reading.skipped == ["pictures/cat/7.jpg: the image cannot be read"]
    reading.leave_out("unreadable", "x\x1b[2J\ny.jpg", "x")
    assert "2 unreadable: cat/7.jpg, x\\x1b[2J\\ny.jpg" in reading.line()
    names = ("\u732b\u3000\u72ac.jpg", "\U0001f469\u200d\U0001f52c.jpg", "caf\u00e9\u00a0\u2013 100%.jpg")
    for name in names:  # with an ideographic space, a joiner and a space that does not break
        odd = Reading(skip=True)
        odd.leave_out("unreadable", name, f"{name}: the image cannot be read")
        assert odd.line().endswith(f": {name}") and name in odd.summary()
    with pytest.raises(BadRowError, match="row 1: expected a caption"), Reading().row():
        raise BadRowError("t.csv, row 1", "expected a caption")


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Nine rows of a table: one without its file, one without a caption, two of one picture that cannot be read."""
    for index in range(5):
        picture(index)[0].save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = [*(f"{index}.png" for index in range(5)), "0.png", "broken.png", "broken.png", "none.png"]
    rows = [{"image": name, "caption": f"number {row}" if row != 3 else ""} for row, name in enumerate(names)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


LINE = "read 5 of 9: 2 unreadable: row 6, row 7, 1 without a caption: row 3, 1 without its file: row 8"


def test_rows_of_one_picture_are_each_counted(faulty: Path) -> None:
    reading = Reading(skip=True)
    assert len(load_reading(faulty, reading)) == 4  # rows 0 and 5 are one picture
    assert sorted(reading.line().split(", ")) == sorted(LINE.split(", "))
    assert [len(own) for own in reading.places] == [2, 1, 1, 1]


def test_every_verb_says_it(base: Path, faulty: Path, tmp_path: Path) -> None:
    skip = ("--on-bad-row", "skip")
    said = {
        "evaluate": run("evaluate", "--model", base, "--data", faulty, "--output", tmp_path / "s.json", *skip).output,
        "embed": run("embed", "--model", base, "--data", faulty, "--output", tmp_path / "v.parquet", *skip).output,
        "doctor": run("doctor", faulty, "--json", tmp_path / "d.json").output,
    }
    train = ("train", "--model", base, "--data", faulty, "--eval-data", faulty, "--epochs", 0, *skip)
    said["train"] = run(*train, "--output", tmp_path / "run").output
    for verb, output in said.items():
        read = 6 if verb == "embed" else 5  # which needs no caption
        assert f"{faulty}: read {read} of 9: " in " ".join(output.split()), verb
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["reading"].keys() == {"data", "eval_data"}
    found = [
        report["reading"]["data"],
        json.loads((tmp_path / "s.json").read_text())["reading"]["data"],
        json.loads((tmp_path / "d.json").read_text())["statistics"]["data"]["reading"],
    ]
    assert [(own["given"], own["read"], own["left_out"]["unreadable"]["count"]) for own in found] == [(9, 5, 2)] * 3
    for page in (tmp_path / "run" / "report.html", tmp_path / "s.html"):
        assert "read 5 of 9: " in page.read_text()


def test_splits_and_columns_from_every_verb(base: Path, tmp_path: Path) -> None:
    """And errors name the options, not Python's arguments."""
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 12), ("test", 3)):
        rows = [{"photo": f"{split}{i}.png", "words": f"{split} {i}"} for i in range(count)]
        for i in range(count):
            picture(i)[0].save(data / f"{split}{i}.png")
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--image-column", "photo", "--caption-column", "words")
    verbs = {
        "evaluate": ("evaluate", "--model", base, "--data"),
        "doctor": ("doctor",),
        "embed": ("embed", "--model", base, "--output", tmp_path / "v.parquet", "--data"),
        "train": ("train", "--model", base, "--output", tmp_path / "run", "--epochs", 0, "--data"),
    }
    for verb, words in verbs.items():
        refused = run(*words, f"{data}:test")
        assert "name it with --image-column" in refused.stderr, verb
        both = [(split, how) for split in ("train", "test") for how in ((f"{data}:{split}",), (data, "--split", split))]
        for split, how in [("train", (data,))] if verb == "train" else both:
            said = " ".join(run(*words, *how, *columns).output.split())
            count = {"train": 12, "test": 3}[split]
            assert f"split {split}, read {count} of {count}" in said, verb
    assert "split test, read 3 of 3" in run(*verbs["evaluate"], data, *columns).output  # never train in silence
