"""What a run holds out of training: by class as far as there are pictures; what an earlier run held out, again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from commands import run
from safetensors.numpy import load_file
from tiny_clip import picture

import clipft
from clipft.recipes.hold_out import Seen, Split, split_rows

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "control_data": "none"}


def labelled(*sizes: int) -> Any:
    """Rows of so many pictures a class."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    feature = datasets.ClassLabel(names=[f"c{label}" for label in range(len(sizes))])
    return datasets.Dataset.from_dict({"label": labels}, features=datasets.Features({"label": feature}))


def captioned(count: int) -> Any:
    return datasets.Dataset.from_dict({"caption": [str(row) for row in range(count)]})


def split(rows: Any, seen: Seen | None = None, *, first: int = 0, **options: Any) -> Split:
    """Pictures are numbered from ``first`` on."""
    pictures = [bytes([first + row]) for row in range(len(rows))]
    return split_rows(rows, pictures, seen or Seen(), **{"test": 0.2, "validation": None, "seed": 7, **options})


def after(done: Split) -> Seen:
    """What the next run knows of one on the same pictures."""
    return Seen().then(*([bytes([row]) for row in part] for part in (done.train, done.validation, done.test)))


@pytest.mark.parametrize("rows", [labelled(10, 20, 10), captioned(40)], ids=["labels", "captions"])
def test_where_there_are_enough_it_is_the_usual_stratified_split(rows: Any) -> None:
    by = "label" if "label" in rows.column_names else None
    numbered = rows.add_column("row", list(range(40)))
    rest, test = numbered.train_test_split(0.2, seed=7, stratify_by_column=by).values()
    train, validation = rest.train_test_split(0.1, seed=7, stratify_by_column=by).values()
    expected = (train["row"], validation["row"], test["row"])
    done = split(rows, validation=0.1)
    assert (done.train, done.validation, done.test) == tuple(list(part) for part in expected)
    assert not done.notes and not done.known


def test_few_shot_sets_give_one_row_of_each_class_before_a_second() -> None:
    rows = labelled(*[4] * 20)
    done = split(rows, test=0.0, validation=0.1)
    assert len(done.validation) == 8 and len({rows[row]["label"] for row in done.validation}) == 8
    assert sorted(done.train + done.validation) == list(range(80))
    assert "8 are held out" in done.notes[0] and "12 of 20 classes have none" in done.notes[0]
    assert split(rows, test=0.0, validation=0.1) == done != split(rows, test=0.0, validation=0.1, seed=8)


def test_a_long_tail_is_held_out_by_class_and_classes_of_one_train() -> None:
    rows = labelled(40, 10, 2, 1, 1)
    done = split(rows)
    held = Counter(rows[row]["label"] for row in done.test)
    assert sum(held.values()) == 11 and held[1] == 2 and held[2] == 1 and not held[3] and not held[4]
    assert {3, 4} <= {rows[row]["label"] for row in done.train}
    assert "2 of them for want of a second picture" in done.notes[0]


@pytest.mark.parametrize("rows", [labelled(1, 1, 1, 1, 1, 1), captioned(1)], ids=["classes of one", "a row"])
def test_where_nothing_can_be_held_out_it_is_said(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"data: \d rows are too few to hold some out; give --eval-data"):
        split(rows)


def test_what_was_held_out_once_is_not_trained_on_with_another_seed() -> None:
    first = split(labelled(20, 20), validation=0.1)
    again = split(labelled(20, 20), after(first), validation=0.1, seed=1)
    assert sorted(again.test) == sorted(first.test) and sorted(again.validation) == sorted(first.validation)
    assert sorted(again.train) == sorted(first.train) and again.known == len(first.test)
    without = split(labelled(20, 20), after(first), seed=1)
    assert sorted(without.train) == sorted(first.train)
    assert without.notes == [
        f"{len(first.validation)} pictures that chose the weights of an earlier run stay out of training"
    ]


def test_new_rows_are_split_as_ever() -> None:
    first = split(captioned(40))
    grown = split(captioned(90), after(first), seed=1)
    assert set(first.test) < set(grown.test) and len(grown.test) == 8 + 10 and grown.known == 8
    assert not set(first.train) & set(grown.test)
    other = split(captioned(40), after(first), first=100)
    assert other == split(captioned(40), first=100)


def test_rows_that_were_all_trained_on_are_held_out_with_a_word() -> None:
    trained = Seen(train=frozenset(bytes([row]) for row in range(40)))
    done = split(captioned(40), trained)
    assert len(done.test) == 8 and not done.known and "it knows those held out now" in done.notes[0]


def test_with_data_to_test_on_all_rows_train() -> None:
    first = split(captioned(40))
    assert sorted(split(captioned(40), after(first), test=0.0).train) == list(range(40))


def test_a_damaged_memory_is_an_error(tmp_path: Path) -> None:
    Seen(frozenset([b"0123456789abcdef"])).save(tmp_path)
    (path,) = tmp_path.iterdir()
    assert Seen.of_model(tmp_path).train == {b"0123456789abcdef"} and not Seen.of_model(tmp_path).test
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"clipft_rows.safetensors: .* cannot be read .* remove it"):
        Seen.of_model(tmp_path)


def test_runs_from_a_run_its_folder_its_merged_model_and_its_checkpoint_test_on_its_rows(
    base: Path, colours: Path, tmp_path: Path
) -> None:
    first = clipft.train(str(base), str(colours), tmp_path / "first", lora_r=2, seed=1, **QUICK)
    (checkpoint,) = (tmp_path / "first" / "checkpoints").glob("checkpoint-*")
    held = load_file(tmp_path / "first" / "clipft_rows.safetensors")["test"]
    assert len(held) == 8
    folder, merged = tmp_path / "first", tmp_path / "merged"
    assert run("merge", "--model", folder, "--output", merged).exit_code == 0
    starts = [first, (first.model, first.processor), folder, folder / "merged", merged, checkpoint]
    for number, start in enumerate(starts):
        output = tmp_path / str(number)
        clipft.train(start, str(colours), output, seed=2, **QUICK)
        assert (load_file(output / "clipft_rows.safetensors")["test"] == held).all()
        name = json.loads((output / "report.json").read_text())["test"]["data"]
        assert name == f"8 pictures of {colours}, held out of training by an earlier run of the model too"
    clipft.train(str(base), str(colours), tmp_path / "other", seed=2, **QUICK)
    assert (load_file(tmp_path / "other" / "clipft_rows.safetensors")["test"] != held).any()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train, val and test of class folders, of 16, 4 and 6 pictures."""
    for part, first, count in (("train", 0, 16), ("val", 16, 4), ("test", 20, 6)):
        for index in range(first, first + count):
            drawn, _, name = picture(index)
            folder = tmp_path / "root" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            drawn.save(folder / f"{index}.png")
    return tmp_path / "root"


def test_a_root_of_splits_brings_its_own_sets(base: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    def sizes(output: Path) -> list[int]:
        stored = load_file(output / "clipft_rows.safetensors")
        return [len(stored[part]) for part in ("train", "validation", "test")]

    clipft.train(str(base), root, tmp_path / "one", **QUICK)
    assert sizes(tmp_path / "one") == [16, 0, 6]
    said = " ".join(capsys.readouterr().out.split())
    assert f"testing on 6 pictures of {root}:test" in said and f"{root}:val is not read" in said
    clipft.train(str(base), root, tmp_path / "two", early_stopping_patience=1, **QUICK)
    assert sizes(tmp_path / "two") == [16, 4, 6]
    reading = json.loads((tmp_path / "two" / "report.json").read_text())["reading"]
    assert reading.keys() == {"data", "eval_data", "validation"}
    (root / "test").rename(tmp_path / "elsewhere")
    clipft.train(str(base), root, tmp_path / "three", early_stopping_patience=1, **QUICK)
    assert sizes(tmp_path / "three") == [14, 2, 4]  # a lone val is the test set
    clipft.train(str(base), root, tmp_path / "four", eval_data=tmp_path / "elsewhere", wise_ft=True, **QUICK)
    assert sizes(tmp_path / "four") == [16, 4, 6]
