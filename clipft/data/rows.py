"""Rows of a data set as training and evaluation see them.

A data set has the columns ``image``, ``caption`` (a string or a list of them) and / or ``label``. Every random choice
of a training row (which caption, which crop) is drawn from (seed, epoch, index) alone, so a resumed run sees what the
unbroken one would have seen, with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import datasets
import numpy as np
from datasets.features.image import image_to_bytes
from PIL import Image
from torch.utils.data import Dataset

from clipft.data.objects import as_rows
from clipft.data.pictures import UNREADABLE, EncodedPicture, naming, read_file
from clipft.data.reading import BadRowError
from clipft.data.slices import read_slice, shard_of

__all__ = [
    "DEFAULT_TEMPLATES",
    "MISSING",
    "PairRows",
    "Picture",
    "check_class_names",
    "class_names_of",
    "class_targets",
    "class_text",
    "column_names",
    "column_values",
    "index_texts",
    "read_row",
    "read_stored",
    "render",
    "stored_images",
    "stored_pictures",
]


def check_class_names(class_names: Sequence[str]) -> None:
    """Two or more."""
    if isinstance(class_names, str) or len(class_names) < 2:
        raise ValueError(f"class_names: expected at least two names, got {class_names!r}")


MISSING = -100  # torch's ignore_index
_CHUNK = 256  # rows that are looked at together


# ---- texts and labels ----


def index_texts(captions: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[str]]:
    """For each image the indices of its texts, and the distinct texts in order of first appearance."""
    number: dict[str, int] = {}
    texts_of = [sorted({number.setdefault(text, len(number)) for text in own}) for own in captions]
    return texts_of, list(number)


DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_text(name: str) -> str:
    """A class name as it stands in a caption: ``long_sleeve`` is "long sleeve"."""
    return name.replace("_", " ")


# ---- rows ----


class PairRows(Dataset[dict[str, Any]]):
    """A view of a data set for the collator: rows of ``image``, ``captions`` (a list), and ``label`` where captions
    come from it.

    An index may be a pair (epoch, i), or (epoch, i, repeat): the row then carries it as ``draw``, which makes it a
    training row. A data set without captions gets them from its class names through ``templates``. With
    ``images=False`` rows come without their pictures, for a collator that has features of them, and carry ``index``
    instead. With ``encoded=True`` the pictures are not decoded yet
    (:class:`clipft.data.pictures.EncodedPicture`), where the data set has their files. With ``captions=False`` rows
    come without them, for a loss that needs none. ``heads`` names data columns with the classes of each: rows then
    carry ``targets``, the class in each of them.
    """

    def __init__(
        self,
        dataset: Any,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        images: bool = True,
        encoded: bool = False,
        captions: bool = True,
        heads: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        dataset = as_rows(dataset)
        if len(dataset) == 0:
            raise ValueError("dataset: expected at least one row, got none")
        self.dataset = dataset
        columns = column_names(dataset)
        if "image" not in columns:
            raise ValueError(f"dataset: expected a column 'image', found {sorted(columns)}; clipft.load_pairs renames")
        self.targets = {name: class_targets(dataset, name, classes) for name, classes in (heads or {}).items()}
        self.has_captions = captions
        self._class_captions: list[list[str]] | None = None
        if captions and "caption" not in columns:
            self._class_captions = _class_captions(dataset, columns, templates)
        self._images, self._encoded = images, encoded
        self._source = (stored_pictures(dataset) or dataset) if images else _drop_images(dataset, columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        row = read_row(self._source, index, encoded=self._encoded)
        pair: dict[str, Any] = {"captions": self._captions_of(row, index)} if self.has_captions else {}
        if self._images:
            pair["image"] = row["image"]
        else:
            pair["index"] = index
        if self._class_captions is not None:
            pair["label"] = self._class_of(row, index)
        if self.targets:
            pair["targets"] = [int(own[index]) for own in self.targets.values()]
        if isinstance(key, tuple):
            pair["draw"] = key
        return pair

    def captions(self) -> list[list[str]]:
        """The captions of every row, without decoding pictures where the data set allows it."""
        column = "caption" if self._class_captions is None else "label"
        return [self._captions_of({column: value}, index) for index, value in enumerate(self.dataset[column])]

    def _captions_of(self, row: dict[str, Any], index: int) -> list[str]:
        if self._class_captions is not None:
            return self._class_captions[self._class_of(row, index)]
        given = row.get("caption")
        captions = [given] if isinstance(given, str) else list(given or ())
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise ValueError(f"row {index}: expected a caption or a list of captions, got {given!r}")
        return captions

    def _class_of(self, row: dict[str, Any], index: int) -> int:
        label, classes = row.get("label"), len(self._class_captions or ())
        if label is None or not 0 <= label < classes:  # -1 is how datasets write an unknown ClassLabel
            raise ValueError(f"row {index}: expected a label from 0 to {classes - 1}, got {label!r}")
        return int(label)


def _drop_images(dataset: Any, columns: list[str]) -> Any:
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    return dataset.select_columns([name for name in ("caption", "label") if name in columns])


def read_row(dataset: Any, index: int, *, encoded: bool = False) -> dict[str, Any]:
    """``dataset[index]``, of a data set of :func:`stored_pictures` with the picture decoded or, if ``encoded``, as an
    :class:`EncodedPicture`. One that cannot be read is an error that names its row.
    """
    try:
        row = cast(dict[str, Any], dataset[index])
    except BadRowError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"row {index}: the image cannot be read ({error})") from error
    if isinstance(row.get("image"), dict):
        name = f"row {index} ({row['image']['path']})" if row["image"].get("path") else f"row {index}"
        with naming(name):
            picture = EncodedPicture(read_stored(row["image"]), name)
            row["image"] = picture if encoded else picture.decode()
    return row


class Picture(datasets.Image):  # type: ignore[misc]
    """``datasets.Image``, opened as :mod:`clipft.data.pictures` opens all pictures; saved, it is its parent."""

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """A PIL picture, upright."""
        if not isinstance(value, dict):
            return value
        name = value.get("path") or "image"
        with naming(name):
            return EncodedPicture(read_stored(value), name).decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datasets.Image) and (self.mode, self.decode) == (other.mode, other.decode)

    __hash__ = None  # type: ignore[assignment]  # as its parent's


def stored_pictures(dataset: Any) -> datasets.Dataset | None:
    """The data set with its pictures as they are stored, ``{"bytes": ..., "path": ...}``, if it stores files."""
    if not isinstance(dataset, datasets.Dataset) or not isinstance(dataset.features.get("image"), datasets.Image):
        return None
    return dataset.cast_column("image", datasets.Image(decode=False))


def stored_images(rows: Any) -> Iterator[Any]:
    """Of each row the picture as it is stored; of rows that are pictures or paths, these."""
    stored = stored_pictures(rows)
    if stored is None:
        yield from rows
        return
    for start in range(0, len(stored), _CHUNK):
        yield from stored[start : start + _CHUNK]["image"]


def read_stored(image: Any) -> bytes:
    """The file of a picture of :func:`stored_pictures`; of one that has none, a file that holds it whole."""
    if isinstance(image, Image.Image):
        return cast(bytes, image_to_bytes(image))
    if image["bytes"] is not None:
        return image["bytes"]
    return read_slice(image["path"]) if shard_of(image["path"]) else read_file(image["path"])


def column_names(dataset: Any) -> list[str]:
    """Columns of a ``datasets.Dataset``, else the keys of the first row."""
    return list(as_rows(dataset).column_names)


def column_values(dataset: Any, column: str) -> list[Any]:
    """A column's values, without decoding pictures where the data set allows it."""
    return list(as_rows(dataset)[column])


def class_names_of(dataset: Any, column: str = "label") -> list[str] | None:
    """The names behind the column ``label``, or another, if the data set has them."""
    feature = (as_rows(dataset).features or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def class_targets(dataset: Any, column: str, class_names: Sequence[str]) -> np.ndarray[Any, Any]:
    """[N] int64: for each row the place of its class in ``class_names``, which need not be those of the data set;
    ``MISSING`` where it has none.

    Raises:
        ValueError: no such column, or a class that is not among the names.
    """
    if column not in column_names(dataset):
        raise ValueError(
            f"dataset: expected a column {column!r} with the classes {list(class_names)[:5]}, found "
            f"{sorted(column_names(dataset))}"
        )
    own, place = class_names_of(dataset, column), {name: number for number, name in enumerate(class_names)}

    def target(value: Any) -> int:
        if value is None or value == -1:  # how datasets write an unknown ClassLabel
            return MISSING
        if own is None and not isinstance(value, str):
            return int(value) if 0 <= value < len(class_names) else -1
        return place.get(value if own is None else own[value], -1)

    values = column_values(dataset, column)
    targets = np.array([target(value) for value in values], dtype=np.int64)
    if (targets == -1).any():
        other = sorted({str(values[row] if own is None else own[values[row]]) for row in (targets == -1).nonzero()[0]})
        raise ValueError(f"dataset: column {column!r}: expected classes among {list(class_names)}, found {other[:10]}")
    return targets


def _class_captions(dataset: Any, columns: list[str], templates: Sequence[str]) -> list[list[str]]:
    names = class_names_of(dataset)
    if "label" not in columns or names is None:
        raise ValueError(
            "dataset: expected a column 'caption', or a column 'label' with class names to make captions from "
            "(datasets.ClassLabel, or `classes` as torchvision's data sets have them, and each Subset of one); found "
            f"{sorted(columns)}{' without names' if 'label' in columns else ''}"
        )
    return [render(templates, name) for name in names]


def render(templates: Sequence[str], name: str) -> list[str]:
    """Captions of one class. A template has exactly one ``{}``."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected a list of strings with {{}}, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: expected exactly one {{}} in each, got {template!r}")
    return [template.replace("{}", class_text(name)) for template in templates]
