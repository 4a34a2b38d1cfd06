"""Labels: missing ones, other names for classes, and what a test set is scored against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from commands import run
from tiny_clip import COLOURS, labelled, picture, tiny_clip

import clipft
from clipft.data.classes import says_nothing
from clipft.recipes.doctor import examine

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "control_data": "none"}
CODES = {"red": "n00000001", "green": "n00000002", "blue": "n00000003", "yellow": "n00000004"}


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 24 pictures with names as ImageNet has them, and words for them in a file."""
    folder = tmp_path_factory.mktemp("coded")
    for index in range(24):
        image, _, colour = picture(index)
        (folder / CODES[colour]).mkdir(exist_ok=True)
        image.save(folder / CODES[colour] / f"{index}.png")
    (folder / "words.txt").write_text("".join(f"{code}\t{name}\n" for name, code in CODES.items()))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test set of two of the four colours."""
    folder = tmp_path_factory.mktemp("two")
    for index in (40, 41, 44, 45, 48, 49):
        image, _, colour = picture(index)
        (folder / colour).mkdir(exist_ok=True)
        image.save(folder / colour / f"{index}.png")
    return folder


def classes_of(part: dict[str, Any]) -> list[str]:
    return [row["class"] for row in part["per_class"]]


# ---- labels ----


@pytest.mark.parametrize(
    "value", ["", " ", "nan", "NaN", "null", None, float("nan"), ["cat"], "['cat', 'dog']", "[0, 1]", "[]"]
)
def test_what_is_no_label_is_a_bad_row(tmp_path: Path, value: Any) -> None:
    picture(0)[0].save(tmp_path / "0.png")
    rows = [{"image": "0.png", "label": label} for label in ("cat", value)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2.*label|t\.jsonl, row 1.*label"):
        clipft.load_pairs(tmp_path / "t.jsonl")
    assert len(clipft.load_pairs(tmp_path / "t.jsonl", on_bad_row="skip")) == 1


def test_one_class_however_it_is_written(tmp_path: Path) -> None:
    for number in range(4):
        picture(number)[0].save(tmp_path / f"{number}.png")
    (tmp_path / "t.csv").write_text("image,label\n0.png,cat\n1.png, cat \n2.png,1.0\n3.png,1\n")
    read = clipft.load_pairs(tmp_path / "t.csv")
    assert read.features["label"].names == ["1", "cat"] and read["label"] == [1, 1, 0, 0]


def test_one_number_in_two_ways_is_refused(tmp_path: Path) -> None:
    picture(0)[0].save(tmp_path / "0.png")
    picture(1)[0].save(tmp_path / "1.png")
    table = tmp_path / "t.csv"
    table.write_text("image,label\n0.png,01\n1.png,1\n")
    with pytest.raises(ValueError, match=r"t\.csv: expected each label written in one way, got '01' and '1'"):
        clipft.load_pairs(table)
    table.write_text("image,label\n0.png,01\n1.png,02\n")
    assert list(clipft.load_pairs(table)["label"]) == [1, 2]
    table.write_text("image,label\n0.png,01\n1.png,1a\n")
    assert clipft.load_pairs(table).features["label"].names == ["01", "1a"]


# ---- names ----


def test_class_names_are_given_by_a_file(coded: Path) -> None:
    want = clipft.evaluate(tiny_clip(), labelled(24))
    for names in (coded / "words.txt", {code: name for name, code in CODES.items()}):
        found = clipft.evaluate(tiny_clip(), coded, class_names=names)
        assert classes_of(found["zero_shot"]) == list(COLOURS)
        assert found["zero_shot"]["accuracy"] == want["zero_shot"]["accuracy"]


def test_numbers_become_classes_by_their_names(tmp_path: Path) -> None:
    names = list(COLOURS)
    rows = labelled(8)
    numbered = rows.cast_column("label", datasets.Value("int64"))
    (tmp_path / "words.txt").write_text("".join(f"{n}\t{name}\n" for n, name in enumerate(names)), encoding="utf-16")
    want = clipft.evaluate(tiny_clip(), rows)
    assert clipft.evaluate(tiny_clip(), numbered, class_names=tmp_path / "words.txt") == want
    assert clipft.evaluate(tiny_clip(), numbered, classes=names) == want
    with pytest.raises(ValueError, match="--class-names"):
        clipft.evaluate(tiny_clip(), numbered)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("n00000001 red\n", "line 1: expected a class, a tab and its name in words, got 'n00000001 red'"),
        ("n00000001\tred\nn00000001\tblue\n", "line 2: expected one name of n00000001"),
        ("n00000001\tred\nn00000002\tred\n", "expected each name once, got red for several classes"),
        ("dog\tpug\n", "expected names of its classes"),
    ],
)
def test_a_file_of_names_that_does_not_fit(coded: Path, tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        examine(coded, class_names=tmp_path / "names.txt")


def test_doctor_names_classes_without_words(coded: Path) -> None:
    names = coded / "words.txt"
    for options, status in (({}, "note"), ({"class_names": names}, "ok")):
        found = {finding["check"]: finding for finding in examine(coded, **options)["findings"]}["class names"]
        assert found["status"] == status and bool(found["examples"]) == (status == "note")
    assert "n00000001" in run("doctor", coded).output
    assert "class names are words" in run("doctor", coded, "--class-names", names).output


@pytest.mark.parametrize("name", ["n02085620", "001.Albatross", "AnnualCrop", "7", "class_3", "cls_03", "0 - zero"])
def test_names_that_say_nothing(name: str) -> None:
    assert says_nothing(name)


@pytest.mark.parametrize("name", ["red", "Black footed albatross", "3d_printer", "iPhone", "USA", "猫", "a", "T-shirt"])
def test_names_that_say_something(name: str) -> None:
    assert not says_nothing(name)


# ---- what a test set is scored against ----


def test_a_test_set_that_lacks_classes(colours: Path, two: Path, tmp_path: Path) -> None:
    """It is scored against those of training, of the run that is evaluated, of probe data, or those given."""
    names = sorted(COLOURS)
    alone = clipft.evaluate(tiny_clip(), two)["zero_shot"]
    assert classes_of(alone) == ["green", "red"]
    done = clipft.train(tiny_clip(), colours, tmp_path / "run", eval_data=two, early_stopping_patience=1, **QUICK)
    assert classes_of(done.after["zero_shot"]) == names
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["after"]["zero_shot"]["classes"], report["after"]["zero_shot"]["classes_with_pictures"]) == (4, 2)
    assert report["test"]["data"].endswith("which has 2 of 4 classes")
    assert "which has 2 of 4 classes" in (tmp_path / "run" / "report.html").read_text()

    evaluated = run("evaluate", "--model", tmp_path / "run", "--data", two, "--output", tmp_path / "score.json")
    assert evaluated.exit_code == 0 and "which has 2 of 4 classes" in " ".join(evaluated.output.split())
    score = json.loads((tmp_path / "score.json").read_text())["zero_shot"]
    assert score["accuracy"] == done.after["zero_shot"]["accuracy"] and classes_of(score) == names

    probed = clipft.evaluate(tiny_clip(), two, probe_data=colours, knn_k=3)
    assert [classes_of(probed[part]) for part in ("zero_shot", "linear_probe", "knn")] == [names] * 3
    for given in (["green,red,pink"], ["green", "red", "pink"]):
        assert classes_of(clipft.evaluate(tiny_clip(), two, classes=given)["zero_shot"]) == ["green", "red", "pink"]
    (tmp_path / "classes.txt").write_text("green\nred\npink, or so\n")
    of_file = clipft.evaluate(str(tmp_path / "run"), two, classes=str(tmp_path / "classes.txt"))["zero_shot"]
    assert classes_of(of_file) == ["green", "red", "pink, or so"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [(["green,blue"], "all classes of the test set, red are missing"), (["green"], "two names or more")],
)
def test_classes_that_do_not_fit(two: Path, classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipft.evaluate(tiny_clip(), two, classes=classes)
