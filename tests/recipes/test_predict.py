"""clipft.predict: rows in the order of the pictures, whatever fails, and from whatever the model is stored as."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripts import Script
from tiny_clip import COLOURS, class_folders, picture, tiny_clip
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.inference.encode import Encoder
from clipft.models.formats import CALIBRATION_KEY
from clipft.recipes import predict as recipe

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def headed() -> tuple[Any, Any]:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES)
    clipft.add_head(model, processor, ["square", "bar", "frame"], name="shape")
    return model, processor


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 pictures, two that cannot be read, and a text."""
    folder = class_folders(tmp_path_factory.mktemp("new"), 12)
    (folder / "blue" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "green" / "0.heic").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def names_of(folder: Path) -> list[str]:
    """Sub-folder by sub-folder, as they are gone through."""
    return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.suffix in (".png", ".heic")]


# ---- rows ----


def test_rows_are_those_of_classify_and_bad_ones_keep_their_place(headed: tuple[Any, Any], new: Path) -> None:
    found = clipft.predict(headed, new, top=2)
    rows = list(found)
    assert [row["image"] for row in rows] == names_of(new) and len(found) == 14
    bad = {row["image"]: row for row in rows if row["error"]}
    assert list(bad) == ["blue/3.png", "green/0.heic"] and found.errors == 2
    assert "cannot identify" in bad["blue/3.png"]["error"] and "install pillow-heif" in bad["green/0.heic"]["error"]
    assert all(row["class"] is row["probability"] is row["class_2"] is None for row in bad.values())
    good = [row for row in rows if not row["error"]]
    wanted = clipft.classify(*headed, [new / row["image"] for row in good]).numpy()
    order = np.argsort(-wanted, axis=1)
    for place, suffix in enumerate(("", "_2")):
        assert [row[f"class{suffix}"] for row in good] == [NAMES[own[place]] for own in order]
        np.testing.assert_allclose(
            [row[f"probability{suffix}"] for row in good], -np.sort(-wanted)[:, place], rtol=1e-5
        )


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_each_kind_has_the_same_rows(headed: tuple[Any, Any], new: Path, tmp_path: Path, ending: str) -> None:
    wanted = clipft.predict(headed, new, head=["label", "shape"], top=2).to_table()
    assert wanted.column_names[:4] == ["image", "head", "class", "probability"]
    assert wanted["head"].to_pylist() == ["label", "shape"] * 14
    found = clipft.predict(headed, new, tmp_path / f"out{ending}", head=["label", "shape"], top=2)
    assert found.to_table().equals(wanted) and list(found) == wanted.to_pylist()
    assert [entry.name for entry in tmp_path.iterdir()] == [f"out{ending}"]


def test_a_class_called_unknown_is_not_taken_for_one(new: Path) -> None:
    how: dict[str, Any] = {"classes": ["unknown", "red"]}
    with pytest.raises(ValueError, match=r"threshold: expected 0, since a class is called 'unknown', .* got 0\.5"):
        clipft.predict(tiny_clip(), new, threshold=0.5, **how)
    found = clipft.predict(tiny_clip(), new, **how)
    assert {row["class"] for row in found} <= {"unknown", "red", None}
    assert sum(found.counts.values()) == len(found) - found.errors


def test_below_the_threshold_a_class_is_unknown(headed: tuple[Any, Any], new: Path) -> None:
    plain = [row["probability"] for row in clipft.predict(headed, new, on_bad_row="skip")]
    middle = float(np.median(plain))
    for found in (clipft.predict(headed, new, threshold=middle, on_bad_row="skip"), calibrated(headed, new, middle)):
        assert [row["class"] == "unknown" for row in found] == [value < middle for value in plain]
        assert found.counts["label", "unknown"] == sum(value < middle for value in plain)
    assert all(row["class"] != "unknown" for row in calibrated(headed, new, middle, threshold=0.0))


def calibrated(headed: tuple[Any, Any], data: Path, known: float, **options: Any) -> Any:
    """By a threshold that the model's configuration has."""
    model, _ = headed
    setattr(model.config, CALIBRATION_KEY, {"label": {"temperature": 1.0, "threshold": known}})
    try:
        return clipft.predict(headed, data, on_bad_row="skip", **options)
    finally:
        delattr(model.config, CALIBRATION_KEY)


# ---- sources ----


def test_tables_shards_patterns_files_and_objects(headed: tuple[Any, Any], new: Path, tmp_path: Path) -> None:
    pictures = [picture(number)[0] for number in range(3)]
    wanted = [row["class"] for row in clipft.predict(headed, pictures)]
    for number, own in enumerate(pictures):
        own.save(tmp_path / f"{number}.png")
    (tmp_path / "table.csv").write_text("image,name\n2.png,c\ngone.png,x\n0.png,a\n")
    rows = list(clipft.predict(headed, str(tmp_path / "table.csv"), id_column="name"))
    assert [row["class"] for row in rows] == [wanted[2], None, wanted[0]]
    assert [row["image"] for row in rows] == ["c", "row 1", "a"] and "there is no image 'gone.png'" in rows[1]["error"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name in ("2.png", "1.png"):
            tar.add(tmp_path / name, name)
            tar.add(tmp_path / "table.csv", f"{name[0]}only.txt")
    rows = list(clipft.predict(headed, str(tmp_path / "shard.tar")))
    assert [row["class"] for row in rows] == [wanted[2], None, wanted[1], None]
    assert [row["image"] for row in rows][::2] == ["shard.tar/2.png", "shard.tar/1.png"]
    for source in (str(tmp_path / "*.png"), pictures, [tmp_path / f"{number}.png" for number in range(3)]):
        assert [row["class"] for row in clipft.predict(headed, source)] == wanted
    assert [row["class"] for row in clipft.predict(headed, tmp_path / "1.png")] == [wanted[1]]
    assert [row["class"] for row in clipft.predict(headed, pictures[1])] == [wanted[1]]


def test_pictures_that_cannot_be_read_are_left_out_or_end_all(headed: tuple[Any, Any], new: Path) -> None:
    rows = list(clipft.predict(headed, new, on_bad_row="skip"))
    assert [row["image"] for row in rows] == [
        name for name in names_of(new) if name not in ("blue/3.png", "green/0.heic")
    ]
    with pytest.raises(ValueError, match="heic is not opened"):
        clipft.predict(headed, new, on_bad_row="error")
    with pytest.raises(ValueError, match=r"3\.png: the image cannot be read"):
        clipft.predict(headed, new / "blue", on_bad_row="error")


# ---- classes ----


def test_classes_by_name_are_zero_shot_ones(new: Path) -> None:
    model, processor = tiny_clip()
    found = clipft.predict((model, processor), new / "red", classes="red,blue", template="{} colour")
    classes = clipft.embed(model, processor, texts=["red colour", "blue colour"])
    images = clipft.embed(model, processor, images=sorted((new / "red").iterdir()))
    wanted = (model.logit_scale.exp() * images @ classes.t()).softmax(1).detach().numpy().max(axis=1)
    np.testing.assert_allclose([row["probability"] for row in found], wanted, rtol=1e-5)


def test_the_classes_of_a_run_s_folder(base: Path, new: Path, tmp_path: Path) -> None:
    run = shutil.copytree(base, tmp_path / "run")
    with pytest.raises(ValueError, match=r"classes: expected names to choose from.*run has no head"):
        clipft.predict(run, new)
    report = {"after": {"zero_shot": {"per_class": [{"class": name} for name in NAMES]}}}
    (run / "report.json").write_text(json.dumps(report))
    (run / "config.yaml").write_text("template: ['{} things']\n")
    found = clipft.predict(run, new)
    assert found.classes == {"zero_shot": tuple(NAMES)}
    assert list(found) == list(clipft.predict(base, new, classes=NAMES, template="{} things"))
    for name in ("report.json", "config.yaml"):
        (run / name).unlink()
    config = json.loads((run / "config.json").read_text())
    own = {"zero_shot": {"temperature": 3.0, "classes": NAMES, "templates": ["{} things"]}}
    (run / "config.json").write_text(json.dumps(config | {CALIBRATION_KEY: own}))
    again = clipft.predict(run, new)  # what a model was calibrated for it knows too
    assert [row["class"] for row in again] == [row["class"] for row in found]
    assert sum(row["probability"] or 0 for row in again) != sum(row["probability"] or 0 for row in found)
    other = clipft.predict(run, new, template="some {}")  # but no temperature with other words
    assert list(other) == list(clipft.predict(base, new, classes=NAMES, template="some {}"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": "one"}, "classes: expected two names or more"),
        ({"classes": "a,b,a"}, "classes: expected two names or more, each once"),
        ({"classes": "a,b", "head": "label"}, "classes, head: expected one of the two"),
        ({"head": "colour"}, "head: expected one of the model's heads, label, shape, got colour"),
        ({"template": "a {}"}, "template: expected with classes that are told by their names"),
        ({"top": 5}, "top: expected at most 4, as many as there are classes, got 5"),
        ({"threshold": 1.5}, "threshold: expected at least 0.0 and at most 1.0, got 1.5"),
        ({"output": "out.txt"}, r"output: expected a name that ends in .csv, .jsonl, .parquet, got 'out.txt'"),
        ({"sheet": "out.jpg"}, "sheet: expected a name that ends in .png, got 'out.jpg'"),
        ({"int8": True}, "int8: expected with a model's folder or name"),
        ({"data": []}, "data: expected at least one picture, got an empty list"),
        ({"data": "nothing/*.png"}, r"data: expected files, none match 'nothing/\*.png'"),
    ],
)
def test_what_does_not_fit_is_named(
    headed: tuple[Any, Any], new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ValueError, match=said)
        if options != {"data": "nothing/*.png"}
        else pytest.raises(OSError, match=said)
    ):
        clipft.predict(headed, options.pop("data", new), **options)


def test_what_a_folder_lacks_is_named(base: Path, new: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected pictures in it or below"):
        clipft.predict(base, tmp_path, classes="a,b")
    result = CliRunner().invoke(
        app, ["predict", "--model", str(base), "--data", str(new), "--output", str(tmp_path / "o.csv"), "--int8"]
    )
    assert result.exit_code == 2 and "--int8: chooses between the encoders of an ONNX folder" in result.output
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES, name="one")
    assert clipft.predict((model, processor), new).classes == {"one": tuple(NAMES)}
    clipft.add_head(model, processor, NAMES, name="two")
    with pytest.raises(ValueError, match="head: expected one or more of the model's heads, one, two"):
        clipft.predict((model, processor), new)


# ---- interruptions ----


def test_an_interrupted_call_goes_on(
    headed: tuple[Any, Any], new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [(row["image"], row["class"], row["error"]) for row in clipft.predict(headed, new)]
    seen: list[int] = []
    monkeypatch.setattr("clipft.inference.shards.SHARD", 3)
    encoder_of = recipe.encoder_of

    def dying(*args: Any) -> Encoder:
        encoder = encoder_of(*args)

        def images(pixels: Any) -> Any:
            seen.append(len(pixels))
            if len(seen) == 3:
                raise KeyboardInterrupt
            return encoder.images(pixels)

        return Encoder(encoder.transform, images, encoder.texts, encoder.identity)

    monkeypatch.setattr(recipe, "encoder_of", dying)
    path = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        clipft.predict(headed, new, path)
    assert not path.exists()
    with pytest.raises(ValueError, match="an interrupted run is there, whose top differ; --restart forgets it"):
        clipft.predict(headed, new, path, top=2)
    again = clipft.predict(headed, new, path)
    assert [(row["image"], row["class"], row["error"]) for row in again] == wanted
    assert seen[:3] == seen[:2] + seen[3:4] and sum(seen) == 12 + seen[2]  # but for what was lost, once each
    clipft.predict(headed, new, path, restart=True, top=2)


def test_a_call_that_is_killed_goes_on(base: Path, new: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    how: dict[str, Any] = {"classes": "red,blue", "batch_size": 2}
    wanted = list(clipft.predict(base, new, tmp_path / "whole.csv", **how))
    done = Script(_KILLED, base, new, path, json.dumps(how)).finish()
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = tmp_path / ".out.csv.parts"
    whole = len(list(parts.glob("*.parquet")))
    assert not path.exists() and whole >= 1
    done = Script(_KILLED.replace("== 5", "== 99"), base, new, path, json.dumps(how)).finish()
    rest = sum(row["error"] is None for row in wanted[3 * whole :])
    assert done.returncode == 0 and f"encoded {rest}\n" in done.stdout, (done.stdout, done.stderr)
    assert not parts.exists()
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


_KILLED = """
import json, os, signal, sys
import clipft, clipft.inference.shards
from clipft.inference.encode import Encoder
from clipft.recipes import predict as recipe
clipft.inference.shards.SHARD = 3
encoder_of, seen = recipe.encoder_of, []
def dying(*args):
    own = encoder_of(*args)
    def images(pixels):
        seen.append(len(pixels))
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return own.images(pixels)
    return Encoder(own.transform, images, own.texts, own.identity)
recipe.encoder_of = dying
model, data, path, how = sys.argv[1:]
clipft.predict(model, data, path, **json.loads(how))
print("encoded", sum(seen))
"""


# ---- from training to answers ----


def alike(found: Any, wanted: list[Any], near: float) -> None:
    """The same rows, whose probabilities are so near, and the same classes where that decides."""
    found = list(found)
    assert [(row["image"], row["error"]) for row in found] == [(row["image"], row["error"]) for row in wanted]
    for own, row in zip(found, wanted, strict=True):
        if not row["error"]:
            assert own["probability"] == pytest.approx(row["probability"], abs=near)
            assert own["class"] == row["class"] or row["probability"] - row["probability_2"] < 2 * near


def test_onnx_and_its_int8_encoders_answer_as_torch(exported: tuple[Path, Any], new: Path) -> None:
    folder, parity = exported
    model, processor = tiny_clip()
    clipft.add_head(model, processor, NAMES)
    wanted = list(clipft.predict((model, processor), new, top=2))
    for int8, near in ((False, 1e-4), (True, 0.05)):
        alike(clipft.predict(folder, new, int8=int8, top=2), wanted, near)
        clip = clipft.OnnxCLIP(folder, int8=int8)
        alike(clipft.predict(clip, new, top=2), wanted, near)
        pictures = [new / "red" / "0.png", new / "red" / "4.png"]
        torch_like = clipft.classify(model, processor, pictures).numpy()
        np.testing.assert_allclose(clipft.classify(clip, None, pictures).numpy(), torch_like, atol=near)
    assert parity["fp32"]["same_class"] == {"label": 1.0}


def test_from_training_to_the_same_answers_everywhere(base: Path, colours: Path, new: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    clipft.train(
        str(base), str(colours), run, head="text", epochs=2, batch_size=8, lr=1e-3, control_data="none", seed=0
    )
    _, processor = clipft.load(run)
    quantized = clipft.quantize(run)
    quantized.save_pretrained(tmp_path / "int8")
    processor.save_pretrained(tmp_path / "int8")
    parity = clipft.export_onnx(run, directory=tmp_path / "onnx")
    assert parity["fp32"]["same_class"] == {"label": 1.0, "zero_shot": 1.0}
    wanted = list(clipft.predict(run, new, top=2))
    alike(clipft.predict(tmp_path / "int8", new, top=2), wanted, 0.05)
    alike(clipft.predict(tmp_path / "onnx", new, top=2), wanted, 1e-4)
    named = list(clipft.predict(tmp_path / "onnx", new, head="zero_shot"))
    by_text = list(clipft.predict(tmp_path / "onnx", new, classes=NAMES))
    assert [row["class"] for row in named] == [row["class"] for row in by_text]


def test_the_command_and_its_sheet(headed: tuple[Any, Any], new: Path, tmp_path: Path) -> None:
    model, processor = headed
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    line = ["predict", "--model", str(tmp_path / "model"), "--data", str(new), "--output", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(app, [*line, "--sheet", str(tmp_path / "out.png"), "--head", "label", "--top", "2"])
    assert result.exit_code == 0, result.output
    assert "2 cannot be read: blue/3.png, green/0.heic" in result.output and "14 rows in" in result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = list(clipft.predict(headed, new, top=2))
    assert [row["class"] for row in rows] == [row["class"] for row in wanted]
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 300
