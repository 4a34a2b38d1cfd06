"""Data sets that a program gives as objects: torchvision's, lists of pairs, frames, and subsets of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_clip import captioned, labelled, picture, tiny_clip
from tiny_trainer import losses, same, trainer_of
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import clipft
from clipft.data.reading import Reading
from clipft.data.rows import PairRows
from clipft.data.sources import load_reading
from clipft.recipes.doctor import examine

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "control_data": "none"}


def pairs(count: int) -> list[tuple[Image.Image, str]]:
    return [(row["image"], row["caption"]) for row in captioned(count)]


class Classed(Dataset[Any]):
    """As torchvision's CIFAR: pairs, and the names of the classes."""

    classes = ("red", "green", "blue", "yellow")

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return picture(index)[0], index % 4


# ---- what trains ----


def test_pairs_train_as_the_same_rows_of_datasets_do(tmp_path: Path) -> None:
    want = trainer_of(tmp_path, captioned(8), captioned(8))
    given = trainer_of(tmp_path, pairs(8), {"test": Subset(pairs(16), range(8))})
    for trainer in (want, given):
        trainer.train()
    assert losses(given) == losses(want) and same(given.model, want.model)
    metrics = {name.replace("eval_test_", "eval_"): value for name, value in given.evaluate().items()}
    assert metrics["eval_image_to_text_mAP"] == want.evaluate()["eval_image_to_text_mAP"]


def test_a_folder_of_torchvision_trains_as_the_folder_does(colours: Path, tmp_path: Path) -> None:
    want = clipft.train(tiny_clip(), colours, tmp_path / "want", **QUICK)
    own = clipft.train(tiny_clip(), ImageFolder(colours), tmp_path / "own", **QUICK, eval_data=None)
    assert same(own.model, want.model) and own.after == want.after
    assert "ImageFolder" in (own.folder / "report.json").read_text()


def test_subsets_keep_the_names_of_classes(colours: Path) -> None:
    rows, folder = clipft.load_pairs(colours), ImageFolder(colours)
    for data in (rows, folder, ConcatDataset([folder, folder]), Classed()):
        subset = PairRows(Subset(Subset(data, range(1, 8)), [3, 0]))
        whole = PairRows(data)
        assert subset.captions() == [whole[4]["captions"], whole[1]["captions"]]
        assert subset[0]["label"] == whole[4]["label"]
        assert np.array_equal(subset[0]["image"], whole[4]["image"])


def test_parts_with_other_classes_are_refused(colours: Path) -> None:
    with pytest.raises(ValueError, match="parts with the same classes"):
        PairRows(ConcatDataset([ImageFolder(colours), Dogs(4)]))


class Dogs(Classed):
    classes = ("pug", "collie", "husky", "boxer")


def test_numbers_without_names_say_what_has_names() -> None:
    numbered = [(image, 1) for image, _ in pairs(4)]
    with pytest.raises(ValueError, match="without names") as error:
        PairRows(numbered)
    assert "torchvision" in str(error.value)
    model, processor = tiny_clip()
    found = clipft.evaluate_zero_shot(model, processor, numbered, ["a", "b"], resamples=0)
    assert sum(row["support"] for row in found["per_class"]) == 4


def test_a_label_that_is_not_known_is_no_class() -> None:
    rows = labelled(4).map(lambda row, index: {"label": -1 if index == 2 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match="row 2: expected a label from 0 to 3, got -1"):
        PairRows(rows).captions()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pairs.csv", "clipft.load_pairs reads files"),
        ({"train": [], "test": []}, "of several data sets give one"),
        (iter([]), "a length and rows by index"),
    ],
)
def test_what_is_no_data_set_is_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PairRows(data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a dog", Image.new("RGB", (4, 4))), "beside the picture, got a Image"),
        ((Image.new("RGB", (4, 4)), "a", "b"), "got 3 values"),
        ((torch.zeros(3, 4, 4), 1), "torch.float32: leave out the data set's transform"),
    ],
)
def test_what_is_no_row_is_named(row: Any, message: str) -> None:
    rows = [*pairs(2), row]
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        clipft.load_pairs(rows)
    _, processor = tiny_clip()
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
        clipft.CLIPDataCollator(processor)(rows)


def test_a_transform_that_makes_tensors_is_named(colours: Path) -> None:
    with pytest.raises(ValueError, match=r"ImageFolder, row 0: .*leave out the data set's transform"):
        clipft.train(tiny_clip(), ImageFolder(colours, transform=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float)])))


# ---- what is read, by one account ----


def test_bad_rows_of_objects_are_counted(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number, path in enumerate(paths):
        picture(number)[0].save(path)
    rows = [(paths[0], "a"), (paths[1], None), (tmp_path / "gone.png", "c"), (tmp_path / "broken.png", "d")]
    reading = Reading(skip=True)
    assert load_reading([*rows, (paths[0], "e")], reading)["caption"] == [["a", "e"]]
    assert reading.line() == ("read 2 of 5: 1 without a caption: row 1, 1 without its file: row 2, 1 unreadable: row 3")
    with pytest.raises(ValueError, match="list, row 1: expected a caption"):
        clipft.load_pairs(rows)
    reading = Reading(skip=True)
    opened = [(Image.open(paths[0]), "a"), (Image.open(paths[1]), " "), (Image.open(paths[2]), ["b", "c"])]
    assert load_reading(opened, reading)["caption"] == ["a", ["b", "c"]]
    assert reading.line() == "read 2 of 3: 1 without a caption: row 1"


def test_frames_go_by_order_and_name_their_columns(tmp_path: Path) -> None:
    for number in range(4):
        picture(number)[0].save(tmp_path / f"{number}.png")
    frame = pd.DataFrame(
        {"where": [str(tmp_path / f"{n}.png") for n in range(4)], "says": list("abcd"), "kind": [1.0, 2.0, 1.0, 2.0]}
    )
    shuffled = frame.sample(frac=1, random_state=0)
    read = clipft.load_pairs(shuffled, image_column="where", caption_column="says", label_column="kind")
    assert read["caption"] == list(shuffled["says"]) and read["label"] == [int(kind) for kind in shuffled["kind"]]
    series = pd.Series(
        [(path, text) for path, text in zip(shuffled["where"], shuffled["says"], strict=True)], [3, 1, 0, 2]
    )
    assert clipft.load_pairs(series)["caption"][:] == PairRows(series).dataset["caption"] == list(shuffled["says"])
    plain = shuffled.rename(columns={"where": "image", "says": "caption"})
    assert PairRows(plain).captions() == [[text] for text in shuffled["says"]]


def test_numbers_of_classes_may_be_of_any_kind() -> None:
    kinds = [0, 1.0, np.int64(2), np.float32(3.0), torch.tensor(1), np.array(2.0)]
    read = clipft.load_pairs([(picture(n)[0], kind) for n, kind in enumerate(kinds)])
    assert read["label"] == [0, 1, 2, 3, 1, 2]
    for odd in (0.5, True):
        with pytest.raises(ValueError, match="the number of a class beside the picture, got a "):
            clipft.load_pairs([(picture(0)[0], odd)])


def test_words_as_labels_are_classes() -> None:
    rows = [{"img": picture(n)[0], "class": picture(n)[2]} for n in range(6)]
    read = clipft.load_pairs(rows)
    assert read.features["label"].names == ["blue", "green", "red", "yellow"]
    assert PairRows(read).captions()[0] == ["a photo of a red."]


def test_doctor_and_evaluate_read_objects(colours: Path) -> None:
    folder = ImageFolder(colours)
    of_folder, of_object = (examine(data)["statistics"]["data"] for data in (str(colours), folder))
    assert {**of_folder, "source": "", "reading": ""} == {**of_object, "source": "", "reading": ""}
    model = tiny_clip()
    want = clipft.evaluate(model, colours, probe_data=clipft.load_pairs(colours), knn_k=3)
    assert clipft.evaluate(model, folder, probe_data=Subset(folder, range(len(folder))), knn_k=3) == want


# ---- embeddings, and pandas' order ----


def test_embeddings_of_objects_in_their_order(colours: Path) -> None:
    model, processor = tiny_clip()
    folder = ImageFolder(colours)
    want = clipft.embed(model, processor, images=[picture for picture, _ in folder])
    assert torch.equal(clipft.embed(model, processor, images=folder), want)
    assert torch.equal(clipft.embed(model, processor, images=list(folder)), want)
    paths = pd.Series([path for path, _ in folder.samples])
    order = np.random.default_rng(0).permutation(len(paths))[:20]
    assert torch.equal(clipft.embed(model, processor, images=paths[order]), want[order])
    texts = pd.Series(["a", "bb", "ccc"], index=[2, 0, 1])
    assert torch.equal(
        clipft.embed(model, processor, texts=texts), clipft.embed(model, processor, texts=["a", "bb", "ccc"])
    )
    names = pd.Series(folder.classes, index=[3, 1, 0, 2])
    found = clipft.evaluate_zero_shot(model, processor, folder, names, resamples=0)
    assert found == clipft.evaluate_zero_shot(model, processor, folder, folder.classes, resamples=0)
