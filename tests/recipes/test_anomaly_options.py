"""What is not normal, by both doors: ``clipft.anomaly`` and ``clipft anomaly``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import run
from PIL import Image
from surfaces import surface
from tiny_clip import tiny_clip

import clipft

HOLE = (20, 60)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, normal pictures, and a folder with a good, a bad and a broken one."""
    root = tmp_path_factory.mktemp("anomaly")
    for part in tiny_clip():
        part.save_pretrained(root / "model")
    for name, picture in {
        **{f"normal/{seed}.png": surface(seed) for seed in range(4)},
        "new/left/good.png": surface(8),
        "new/right/bad.png": surface(9, HOLE),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    (root / "new" / "right" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut")
    return root


def command(place: Path, *options: Any) -> Any:
    return run("anomaly", "--model", place / "model", "--data", place / "new", *options)


def test_both_doors_give_scores_and_maps_in_the_order_of_the_pictures(place: Path, tmp_path: Path) -> None:
    done = command(place, "--normal", place / "normal", "--output", tmp_path / "s.csv", "--maps", tmp_path / "maps")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["image"] for row in rows] == ["left/good.png", "right/bad.png", "right/broken.png"]
    good, bad, broken = rows
    assert 0 < float(good["score"]) < float(bad["score"]) < 1
    assert not good["error"]
    assert broken["score"] == ""
    assert "right/broken.png: the image cannot be read" in broken["error"]
    assert "1 of 3 pictures cannot be read" in done.output
    found = np.load(tmp_path / "maps" / "right" / "bad.npy")
    assert found.shape == (60, 90)
    assert found.dtype == np.float32
    row, column = divmod(int(found.argmax()), 90)
    assert (15 <= row < 45, 55 <= column < 85) == (True, True)
    with Image.open(tmp_path / "maps" / "right" / "bad.png") as drawn:
        assert drawn.size == (90, 60)
    assert not (tmp_path / "maps" / "right" / "broken.npy").exists()

    again = clipft.anomaly(str(place / "model"), place / "new", normal=place / "normal")
    assert [one.score for one in again[:2]] == [float(good["score"]), float(bad["score"])]
    assert np.array_equal(again[1].map, found)
    assert (again[2].score, again[2].map) == (None, None)
    assert again.to_table()["image"].to_pylist() == [row["image"] for row in rows]


def test_other_tables(place: Path, tmp_path: Path) -> None:
    for suffix in ("jsonl", "parquet"):
        assert command(place, "--normal", place / "normal", "--output", tmp_path / f"s.{suffix}").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert lines == pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert lines[2]["score"] is None


def test_bad_pictures_are_kept_left_out_or_the_end(place: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"image\n{place}/new/left/good.png\n{place}/new/none.png\n{place}/new/right/bad.png\n")
    how: dict[str, Any] = {"normal": place / "normal", "allow_outside": True}
    kept = clipft.anomaly(str(place / "model"), table, **how)
    assert [one.score is None for one in kept] == [False, True, False]
    assert len(clipft.anomaly(str(place / "model"), table, on_bad_row="skip", **how)) == 2
    with pytest.raises((ValueError, OSError), match=r"none\.png"):
        clipft.anomaly(str(place / "model"), table, on_bad_row="error", **how)
    with pytest.raises(ValueError, match=r"normal: right/broken\.png: the image cannot be read"):
        clipft.anomaly(str(place / "model"), table, normal=place / "new", allow_outside=True)


def test_pictures_in_memory(place: Path) -> None:
    found = clipft.anomaly(tiny_clip(), [surface(8), surface(9, HOLE)], normal=[surface(seed) for seed in range(4)])
    assert [one.image for one in found] == ["row 0", "row 1"]
    assert found[0].score is not None and found[1].score is not None
    assert found[0].score < found[1].score


def test_a_memory_is_written_read_and_extended(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    wrote = command(place, "--normal", place / "normal", "--memory", file, "--output", tmp_path / "a.jsonl")
    assert wrote.exit_code == 0, wrote.output
    assert command(place, "--memory", file, "--output", tmp_path / "b.jsonl").exit_code == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()

    refused = command(place, "--memory", file, "--normal", place / "normal")
    assert (refused.exit_code, "is there: leave normal away" in refused.output) == (2, True)
    size = file.stat().st_size
    extended = command(place, "--memory", file, "--normal", place / "new" / "left", "--extend")
    assert extended.exit_code == 0, extended.output
    assert "of 5 normal pictures, in" in extended.output
    assert file.stat().st_size > size
    scores = {one.image: one.score for one in clipft.anomaly(str(place / "model"), place / "new", memory=str(file))}
    first = {line["image"]: line["score"] for line in map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())}
    assert scores["left/good.png"] < first["left/good.png"]  # which it knows now

    other = tmp_path / "other"
    for part in tiny_clip(seed=1):
        part.save_pretrained(other)
    refused = run("anomaly", "--model", other, "--data", place / "new", "--memory", file)
    assert refused.exit_code == 2
    assert "--memory: expected a memory of this model, found one of" in refused.output


def test_words_alone_and_beside_pictures(place: Path) -> None:
    words = {"normal_text": ["a good tile"], "anomaly_text": ["a cracked tile", "a tile with a hole"]}
    alone = clipft.anomaly(str(place / "model"), place / "new", **words)
    assert all(0 < one.score < 1 for one in alone[:2] if one.score is not None)
    assert alone[0].map.shape == (60, 90)
    memory = clipft.anomaly(str(place / "model"), place / "new", normal=place / "normal")
    both = clipft.anomaly(str(place / "model"), place / "new", normal=place / "normal", **words)
    for one, other, mean in zip(alone[:2], memory, both, strict=False):
        assert mean.score == pytest.approx((one.score + other.score) / 2, abs=1e-5)  # type: ignore[operator]
        assert np.allclose(mean.map, (one.map + other.map) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "normal, memory, normal_text: expected normal pictures"),
        ({"normal_text": "a good tile"}, "anomaly_text: expected at least one text"),
        ({"anomaly_text": "a bad tile"}, "normal_text: expected at least one text"),
        ({"normal_text": "a good tile", "anomaly_text": " "}, "anomaly_text: expected texts, got an empty one"),
        ({"normal": "left"}, "normal: expected at least 2 normal pictures, found 1"),
        ({"normal": "nothing"}, "normal: expected a file, a folder"),
        ({"memory": "m.safetensors"}, "memory: there is no"),
        ({"normal": "left", "extend": True}, "extend: expected a memory that is there"),
    ],
)
def test_what_cannot_be_done_is_said(place: Path, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "normal" in options:
        options["normal"] = str(place / "new" / options["normal"])
    if "memory" in options:
        options["memory"] = str(tmp_path / options["memory"])
    with pytest.raises((ValueError, OSError)) as error:
        clipft.anomaly(str(place / "model"), place / "new", **options)
    assert str(error.value).startswith(said)


def test_onnx_encoders_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "clipft_onnx.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found clipft_onnx\.json: ONNX encoders, which embed"):
        clipft.anomaly(str(tmp_path), place / "new", normal=place / "normal")


def test_rows_without_a_path_have_maps_too(place: Path, tmp_path: Path) -> None:
    files = [place / "new" / name for name in ("left/good.png", "right/bad.png")]
    found = clipft.anomaly(str(place / "model"), files, normal=place / "normal", maps=tmp_path / "maps")
    assert [one.file is not None and one.file.is_file() for one in found] == [True, True]
    data = datasets.Dataset.from_dict(
        {"image": [surface(0), surface(1)]}, datasets.Features({"image": datasets.Image()})
    )
    found = clipft.anomaly(str(place / "model"), data, normal=place / "normal", maps=tmp_path / "rows")
    assert len({one.file for one in found}) == 2
    assert all(np.array_equal(one.map, np.load(one.file)) for one in found if one.file is not None)


def test_two_pictures_of_one_name_have_no_maps(place: Path, tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp"):
        (tmp_path / "twice").mkdir(exist_ok=True)
        surface(0).save(tmp_path / "twice" / name)
    options = {"normal": place / "normal", "maps": tmp_path / "maps"}
    with pytest.raises(ValueError, match=r"maps: expected pictures with names of their own, a\.(bmp|png) and a\."):
        clipft.anomaly(str(place / "model"), tmp_path / "twice", **options)
    with pytest.raises(ValueError, match=r"output: expected a name that ends in \.csv"):
        clipft.anomaly(str(place / "model"), place / "new", tmp_path / "s.txt", normal=place / "normal")
