"""clipft doctor: each check finds its fault, and says nothing about data without one."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from PIL import Image
from rich.console import Console
from tiny_clip import class_folders, tiny_clip

import clipft
from clipft.console import PlainConsole
from clipft.recipes.doctor import doctor, examine


def photograph(seed: int) -> Image.Image:
    """Coloured clouds: smooth, and unlike those of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(12):
        photograph(number).save(folder / f"{number}.jpg", quality=95)
    return table(folder, [{"image": f"{n}.jpg", "caption": f"a cloud, number {n}"} for n in range(12)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base"))


def save(folder: Path, scale: float | None = None, **preprocessing: Any) -> Path:
    model, processor = tiny_clip()
    if scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(scale))
    for name, value in preprocessing.items():
        setattr(processor.image_processor, name, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def faults(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in result["findings"] if finding["status"] != "ok"}


def test_clean_data_and_model_have_no_findings(clean: Path, base: Path, tmp_path: Path) -> None:
    result = run("doctor", clean, "--json", tmp_path / "out" / "findings.json")
    assert result.exit_code == 0, result.output
    assert "no problems" in result.output
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert not faults(found)
    statistics = found["statistics"]["data"]
    assert (statistics["rows"], statistics["usable"], statistics["distinct_captions"]) == (12, 12, 12)
    assert statistics["width"] == {"min": 160, "median": 160, "max": 160}
    assert statistics["kinds"] == {"JPEG RGB": 12}
    assert not faults(examine(str(clean), model=str(base)))


def test_the_same_from_python(clean: Path, base: Path, tmp_path: Path) -> None:
    (clean.parent / "cut.jpg").write_bytes((clean.parent / "5.jpg").read_bytes()[:1500])
    data = table(clean.parent, [*map(json.loads, clean.read_text().splitlines()), {"image": "cut.jpg", "caption": "x"}])
    command = run("doctor", data, "--model", base, "--json", tmp_path / "one.json")
    printed = io.StringIO()
    found = clipft.doctor(data, model=clipft.load(base), json=tmp_path / "two.json", console=Console(file=printed))
    assert found == json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    assert [problem["check"] for problem in found.problems] == ["unreadable rows"] and repr(found) == "1 problem"
    assert printed.getvalue().splitlines()[-1] == command.output.splitlines()[-1] == "1 problem"
    rows = clipft.doctor(clipft.load_pairs(data), console=Console(file=io.StringIO()))
    assert rows.problems[0]["examples"][0].startswith("data, row 12: the image cannot be read")
    with pytest.raises(TypeError, match="did you mean 'caption_column'"):
        clipft.doctor(data, caption_colum="text")


def test_names_that_are_no_utf8_are_counted_and_written(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 8)
    for name in (b".caf\xe9.jpg", b"caf\xe9.docx", b"caf\xe9.csv"):
        Path(os.fsdecode(os.fsencode(data) + b"/" + name)).write_bytes(b"x")
    found = clipft.doctor(data, json=tmp_path / "found.json", console=PlainConsole(file=io.StringIO()))
    reading = found["statistics"]["data"]["reading"]
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8")) == found
    assert reading["line"].startswith("read 8 of 11: ") and reading["left_out"]["hidden"]["names"] == [".caf\udce9.jpg"]


def test_the_old_module_is_still_the_function() -> None:
    assert vars(doctor)["examine"] is examine  # as `from clipft import doctor` gave it
    with pytest.warns(DeprecationWarning) if "clipft.doctor" not in sys.modules else contextlib.nullcontext():
        module = importlib.import_module("clipft.doctor")
    assert module.examine is examine and clipft.doctor is module
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        clipft.doctor("none.csv")


def test_rows_captions_and_pictures(clean: Path, base: Path, tmp_path: Path) -> None:
    folder = clean.parent
    (folder / "same.jpg").write_bytes((folder / "3.jpg").read_bytes())
    photograph(4).resize((96, 72)).save(folder / "smaller.jpg", quality=60)
    (folder / "cut.jpg").write_bytes((folder / "5.jpg").read_bytes()[:1500])
    Image.fromarray((np.asarray(photograph(20).convert("L")) * 16.0).astype(np.uint16)).save(folder / "dark.png")
    photograph(21).resize((30, 20)).save(folder / "tiny.png")
    rows = [json.loads(line) for line in clean.read_text().splitlines()]
    rows[0]["caption"] = rows[1]["caption"]
    rows[2]["caption"] = "a very long caption that goes on and on"
    names = ("same.jpg", "smaller.jpg", "cut.jpg", "dark.png", "tiny.png", "none.jpg")
    data = table(folder, rows + [{"image": name, "caption": f"of {name}"} for name in names])
    result = run("doctor", data, "--model", base, "--json", tmp_path / "findings.json")
    assert result.exit_code == 1
    assert "5 problems" in result.output
    found = faults(json.loads((tmp_path / "findings.json").read_text()))
    assert {name: (finding["status"], finding["count"]) for name, finding in found.items()} == {
        "unreadable rows": ("problem", 2),
        "duplicate captions": ("note", 1),
        "caption length": ("problem", 1),
        "duplicate pictures": ("problem", 1),
        "near-duplicate pictures": ("problem", 1),
        "brightness": ("problem", 1),
        "size": ("note", 1),
    }
    assert "row 17: there is no image 'none.jpg'" in found["unreadable rows"]["examples"][0]
    assert "row 14: the image cannot be read" in found["unreadable rows"]["examples"][1]
    assert found["duplicate pictures"]["examples"] == ["row 3, row 12"]
    assert found["near-duplicate pictures"]["examples"][0].startswith("row 4, row 13 (")
    assert found["brightness"]["examples"][0].startswith("row 15 uses 6.")


def test_leakage(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    photograph(30).save(folder / "new.png")
    photograph(7).save(folder / "again.jpg", quality=50)
    (folder / "same.jpg").write_bytes((clean.parent / "8.jpg").read_bytes())
    captions = {"new.png": "new", "again.jpg": "a cloud, number 7", "same.jpg": "same"}
    test = table(folder, [{"image": name, "caption": caption} for name, caption in captions.items()])
    found = faults(examine(str(clean), eval_data=str(test)))
    assert {name: (finding["status"], finding["count"]) for name, finding in found.items()} == {
        "leakage of pictures": ("problem", 2),
        "leakage of captions": ("note", 1),
    }
    examples = found["leakage of pictures"]["examples"]
    assert examples[0] == "row 2 of the test set, row 8 of the training set (the same file)"
    assert examples[1].startswith("row 1 of the test set, row 7 of the training set (")


def test_many_equal_pictures_are_one_group(clean: Path) -> None:
    folder, rows = clean.parent, [json.loads(line) for line in clean.read_text().splitlines()]
    data = (folder / "3.jpg").read_bytes()
    for number in range(300):  # the same file, and files that differ in what follows the picture
        (folder / f"same{number}.jpg").write_bytes(data if number < 200 else data + bytes([number - 200]))
        rows.append({"image": f"same{number}.jpg", "caption": f"copy {number}"})
    found = faults(examine(str(table(folder, rows))))
    assert found["duplicate pictures"]["count"] == 1
    assert found["duplicate pictures"]["examples"][0].endswith(", row 20 and 191 more")
    assert found["near-duplicate pictures"]["count"] == 100  # each like the first, not each like each
    assert found["near-duplicate pictures"]["examples"][0] == "row 3, row 212 (0 of 256 signs differ)"


def test_plain_pictures_are_told_apart_by_their_colour(tmp_path: Path) -> None:
    colours = {"red": (255, 0, 0), "white": (255, 255, 255), "black": (0, 0, 0), "reddish": (253, 1, 2)}
    for name, colour in colours.items():
        Image.new("RGB", (60, 50), colour).save(tmp_path / f"{name}.png")
    data = table(tmp_path, [{"image": f"{name}.png", "caption": name} for name in colours])
    near = faults(examine(str(data)))["near-duplicate pictures"]
    assert near["examples"] == ["row 0, row 3 (0 of 256 signs differ)"]


def test_class_balance(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "even", 16)
    for path in (folder / "red").iterdir():
        path.unlink()
    for number in range(40):
        photograph(number).save(folder / "red" / f"{number}.png")
    (folder / "white").mkdir()
    photograph(50).save(folder / "white" / "one.png")
    balance = faults(examine(str(folder)))["class balance"]
    assert balance["status"] == "problem"
    assert balance["examples"][0] == "white: 1"
    (folder / "white" / "one.png").unlink()
    (folder / "white").rmdir()
    assert "red: 40" in faults(examine(str(folder)))["class balance"]["examples"]
    other = class_folders(tmp_path / "other", 16)
    (other / "red").rename(other / "violet")
    assert faults(examine(str(folder), eval_data=str(other)))["classes of both sets"]["examples"] == ["red", "violet"]


@pytest.mark.parametrize(
    ("change", "check", "status", "text"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "preprocessing", "problem", "image_mean: "),
        ({"resample": 2}, "preprocessing", "problem", "resample: "),
        ({"do_normalize": False}, "preprocessing", "problem", "do_normalize: False"),
        ({"scale": 100.0}, "logit scale", "note", "100.0, ceiling 100"),
        ({"scale": 120.0}, "logit scale", "problem", "120.0, ceiling 100"),
    ],
)
def test_a_model_that_has_drifted(
    clean: Path, tmp_path: Path, change: dict[str, Any], check: str, status: str, text: str
) -> None:
    model = save(tmp_path / "model", **change)
    found = faults(examine(str(clean), model=str(model)))
    assert list(found) == [check]
    assert found[check]["status"] == status
    assert text in found[check]["summary"] + "".join(found[check]["examples"])


def test_a_processor_of_another_size_is_an_error(clean: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "model", crop_size={"height": 48, "width": 48})
    result = run("doctor", str(clean), "--model", str(model))
    assert result.exit_code == 2
    assert "makes [3, 48, 48] of a picture, the model in config.json takes [3, 32, 32]" in " ".join(
        result.stderr.split()
    )


def test_user_errors() -> None:
    result = run("doctor", "/no/data.csv")
    assert result.exit_code == 2
    assert "there is no '/no/data.csv'" in result.stderr


def test_real_pictures_have_no_duplicates(data_folder: Path) -> None:
    """Radiographs look alike, and are still told apart."""
    found = faults(examine(str(data_folder / "chest_xray"), eval_data=str(data_folder / "clothing")))
    assert set(found) == {"classes of both sets"}
