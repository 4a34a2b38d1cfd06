"""Rows of Python objects: torchvision's data sets, lists of (picture, text), pandas' frames, and subsets of them.

A row is a dictionary with ``image`` and ``caption`` (a string or a list of them) and / or ``label``, whatever the
object gives. Nothing is copied: a picture is read when its row is.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from clipft.data.reading import BadRowError

__all__ = ["ObjectRows", "as_row", "as_rows", "object_name", "rows_of_pandas"]

_WANTED = "a (picture, text or class) pair or a dictionary with image and caption or label"


def as_rows(data: Any) -> Any:
    """A data set by rows: a ``datasets.Dataset`` as it is, any other with a length and rows by index as
    :class:`ObjectRows`.

    Raises:
        TypeError: no data set, one without a length, or several.
        ValueError: parts whose classes differ.
    """
    if isinstance(data, ObjectRows) or (isinstance(data, datasets.Dataset) and not _has_paths(data)):
        return data
    if isinstance(data, Mapping):
        raise TypeError(
            f"dataset: expected rows by index, got a {type(data).__name__} of {', '.join(map(str, data))}; of several "
            "data sets give one"
        )
    if isinstance(data, Subset):
        return as_rows(data.dataset).select([int(row) for row in data.indices])
    data = rows_of_pandas(data)
    iterable = isinstance(data, (torch.utils.data.IterableDataset, str, bytes, Path))
    if iterable or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        hint = "; clipft.load_pairs reads files" if isinstance(data, (str, Path)) else ""
        raise TypeError(f"dataset: expected one with a length and rows by index, got {type(data).__name__}{hint}")
    return ObjectRows(data)


def rows_of_pandas(data: Any) -> Any:
    """A frame's or a Series' rows as a list, since pandas counts by index and not by order; of all else, itself."""
    if not hasattr(data, "iloc"):
        return data
    return data.to_dict("records") if data.ndim > 1 else list(data)


def object_name(data: Any) -> str:
    """What messages call a data set that has no name."""
    kind = type(data).__name__
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _has_paths(data: datasets.Dataset) -> bool:
    return getattr(data.features.get("image"), "dtype", None) in ("string", "large_string")


class ObjectRows:
    """Rows of a data set by index, with what clipft needs of a ``datasets.Dataset``.

    Args:
        data: with a length; by index it gives pairs or dictionaries.
        rows: those that are meant; default: all.
        names: of the classes that labels number; default: what the data set says of itself.
        labels: of the rows, in place of its own.
    """

    def __init__(
        self,
        data: Any,
        rows: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        self._data, self._rows, self._labels = data, rows, labels
        self.names = _names_of(data) if names is None else list(names)

    @cached_property
    def column_names(self) -> list[str]:
        """The keys of the first row."""
        return list(self[0])

    @cached_property
    def features(self) -> dict[str, Any]:
        """``label`` as ``datasets.ClassLabel``, where its classes have names."""
        return {"label": datasets.ClassLabel(names=self.names)} if self.names else {}

    def __len__(self) -> int:
        return len(self._data) if self._rows is None else len(self._rows)

    def __getitem__(self, key: Any) -> Any:
        """A row, a column, or, of a slice, the columns of its rows."""
        if isinstance(key, slice):
            rows = [self[row] for row in range(*key.indices(len(self)))]
            return {name: [row.get(name) for row in rows] for name in self.column_names}
        if isinstance(key, str):
            return [self[row].get(key) for row in range(len(self))] if key == "image" else self._column(key)
        number = int(key) if self._rows is None else self._rows[key]
        row = as_row(_item(self._data, number), f"row {number}")
        return row if self._labels is None else {**row, "label": self._labels[key]}

    def _column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self._without_pictures]

    @cached_property
    def _without_pictures(self) -> list[dict[str, Any]]:
        rows = (self[row] for row in range(len(self)))
        return [{name: value for name, value in row.items() if name != "image"} for row in rows]

    def select(self, rows: Sequence[int]) -> ObjectRows:
        """These rows of it."""
        own = list(rows) if self._rows is None else [self._rows[row] for row in rows]
        return ObjectRows(self._data, own, self.names, self._labels and [self._labels[row] for row in rows])

    def labelled(self, labels: Sequence[int], names: Sequence[str] | None) -> ObjectRows:
        """The same with these labels."""
        return ObjectRows(self._data, self._rows, names, labels)


def _item(data: Any, row: int) -> Any:
    """A row as the data set gives it; of a plain folder of torchvision the picture's path, to be decoded as it is
    needed.
    """
    return data.samples[row] if _is_plain_folder(data) else data[row]


def _is_plain_folder(data: Any) -> bool:
    """Of torchvision, without which there is none, and loads as it does of its own accord."""
    if "torchvision" not in sys.modules:
        return False
    from torchvision.datasets import DatasetFolder
    from torchvision.datasets.folder import default_loader

    return (
        isinstance(data, DatasetFolder)
        and type(data).__getitem__ is DatasetFolder.__getitem__
        and data.loader is default_loader
        and data.transform is None
        and data.target_transform is None
    )


def _names_of(data: Any) -> list[str] | None:
    """The class names of a data set, in the order of its labels."""
    if isinstance(data, ConcatDataset):
        own = {tuple(_names_of_rows(as_rows(part)) or ()) for part in data.datasets}
        if len(own) > 1:
            raise ValueError(f"dataset: expected parts with the same classes, got {sorted(own)}")
        return list(own.pop()) or None
    features = getattr(data, "features", None)
    if isinstance(features, Mapping) and isinstance(features.get("label"), datasets.ClassLabel):
        return list(features["label"].names)
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    if not isinstance(names, (list, tuple)):
        return None
    first = [name[0] if isinstance(name, (list, tuple)) and name else name for name in names]  # of ImageNet's synonyms
    if not all(isinstance(name, str) for name in first):
        return None
    if twice := sorted({name for name in first if first.count(name) > 1}):
        raise ValueError(f"dataset: expected each of its classes once, got {', '.join(twice)} twice: rename them")
    number = getattr(data, "class_to_idx", None)
    known = isinstance(number, Mapping) and sorted(map(str, number)) == sorted(first)
    return sorted(first, key=number.__getitem__) if known and number is not None else first


def _names_of_rows(rows: Any) -> list[str] | None:
    feature = rows.features.get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


# ---- rows ----


def as_row(item: Any, place: str) -> dict[str, Any]:
    """A row as a dictionary; its picture is PIL's, or as a ``datasets.Dataset`` stores it.

    Raises:
        BadRowError: it is none.
    """
    if isinstance(item, Mapping):
        row = dict(item)
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        row = {"image": item[0], **_text_or_class(item[1], place)}
    else:
        raise BadRowError(place, f"expected {_WANTED}, got {_kind(item)}")
    if "image" in row:
        row["image"] = _picture(row["image"], place)
    return row


def _text_or_class(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)):
        return {"caption": value if isinstance(value, str) else list(value)}
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    if value is None or (number is not None and np.isnan(number)):
        return {}
    if number is not None and number.is_integer():
        return {"label": int(value)}
    raise BadRowError(place, f"expected a text, texts or the number of a class beside the picture, got {_kind(value)}")


def _picture(value: Any, place: str) -> Any:
    if isinstance(value, (str, Path)):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, (np.ndarray, torch.Tensor)):
        return value
    if value.dtype not in (np.uint8, torch.uint8):
        raise BadRowError(
            place,
            f"expected a PIL picture, a path or 8 bits a channel, got {_kind(value)}: leave out the data set's "
            "transform, the model has its own",
        )
    return Image.fromarray(value) if isinstance(value, np.ndarray) else value


def _kind(value: Any) -> str:
    of = f" of {value.dtype}" if isinstance(value, (np.ndarray, torch.Tensor)) else ""
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}{of}"
