"""Data sets that a program gives as objects, read with the same account, columns and bad rows as files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Subset

from clipft.data.columns import checked_captions, class_of, encode_labels, find_columns
from clipft.data.compact import Each, Lazy, row_name
from clipft.data.objects import ObjectRows, as_rows, object_name, rows_of_pandas
from clipft.data.pictures import UNREADABLE
from clipft.data.reading import NO_FILE, UNREADABLE_KIND, BadRowError, Reading
from clipft.data.splits import chosen_split
from clipft.data.stored import canonical, holds_paths
from clipft.data.tables import from_table_rows

__all__ = ["read_object"]


def read_object(data: Any, split: str | None, reading: Reading, purpose: str) -> Any:
    """The rows of a ``datasets.Dataset`` or ``DatasetDict``, of a pandas frame, or of any data set with a length and
    rows by index (:mod:`clipft.data.objects`). Rows in memory that hold the paths of their pictures are a table: those
    of one picture are joined.
    """
    where = reading.source or object_name(data)
    reading.source, reading.allow_outside = where, True  # the program's own paths, not a stranger's
    if isinstance(data, datasets.DatasetDict):
        reading.split = chosen_split(list(data), split, purpose, where)
        data = data[reading.split]
    elif split not in (None, "train"):
        raise ValueError(f"split: {where} has no splits, got {split!r}")
    data = as_rows(data) if isinstance(data, Subset) else rows_of_pandas(data)
    if isinstance(data, datasets.Dataset):
        return _from_dataset(data, where, reading)
    if isinstance(data, (list, tuple)) and data and isinstance(data[0], Mapping):
        return _from_records(data, where, reading)
    rows = as_rows(data)
    if isinstance(data, (list, tuple)) and data and _path_of(rows[0]):
        named = [{"image": _path_of(row), **{name: row.get(name) for name in rows.column_names[1:]}} for row in rows]
        return _from_paths(named, where, reading)
    return _checked(rows, where, reading)


def _from_dataset(data: datasets.Dataset, where: str, reading: Reading) -> Any:
    if data.format["type"] == "custom":  # its rows are what the user's function makes of them
        return data
    data = data.with_format(None)
    if not holds_paths(data.features, where, reading):
        return canonical(data, where, None, reading)
    used = [*find_columns(data.column_names, where, reading.named), *reading.attributes]
    return _from_paths(data.select_columns([name for name in used if name]).to_list(), where, reading)


def _from_records(data: Sequence[Mapping[str, Any]], where: str, reading: Reading) -> Any:
    names = find_columns(list(data[0]), where, reading.named)
    if isinstance(data[0][str(names[0])], (str, Path)):
        return _from_paths(data, where, reading)
    usual = {own: name for own, name in zip(names, ("image", "caption", "label"), strict=True) if own}
    return _checked(as_rows([{name: row.get(own) for own, name in usual.items()} for row in data]), where, reading)


def _from_paths(rows: Sequence[Mapping[str, Any]], where: str, reading: Reading) -> datasets.Dataset:
    table = [{name: str(value) if isinstance(value, Path) else value for name, value in row.items()} for row in rows]
    return from_table_rows([(Path(where), number, row) for number, row in enumerate(table)], where, reading)


def _checked(rows: ObjectRows, where: str, reading: Reading) -> ObjectRows:
    """Each row read once, its text or class looked at."""
    if reading.attributes:
        raise ValueError(f"attribute_columns: {where} has no columns of classes; give a datasets.Dataset or a table")
    reading.places = Each(Lazy(partial(row_name, where), range(len(rows))))
    good, labels = [], []
    for number in range(len(rows)):
        with reading.row():
            labels.append(_label(rows, number, reading.place(number)))
            good.append(number)
    if not good:
        raise ValueError(f"{where}: expected at least one row that can be used, found none")
    if len(good) < len(rows):
        reading.keep(good)
        rows = rows.select(good)
    if "label" not in rows.column_names or rows.names:
        return rows
    numbers, feature = encode_labels(labels, where)
    return rows.labelled(numbers, feature.names if isinstance(feature, datasets.ClassLabel) else None)


def _label(rows: ObjectRows, number: int, place: str) -> str:
    """A row's class by name, "" where rows have none."""
    try:
        row = rows[number]
    except BadRowError as error:
        raise BadRowError(place, str(error).partition(": ")[2], error.kind) from error
    except UNREADABLE as error:
        raise BadRowError(place, f"the image cannot be read ({error})", UNREADABLE_KIND) from error
    path = _path_of(row)
    if path is not None and not Path(path).is_file():
        raise BadRowError(place, f"there is no image {path!r}", NO_FILE)
    if "caption" in rows.column_names:
        checked_captions(row.get("caption"), place)
    return class_of(row.get("label"), rows.names, place) if "label" in rows.column_names else ""


def _path_of(row: Mapping[str, Any]) -> str | None:
    image = row.get("image")
    return image["path"] if isinstance(image, dict) and image["bytes"] is None else None
