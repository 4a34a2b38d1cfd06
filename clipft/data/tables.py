"""Tables in text files: rows of .csv, .tsv and .jsonl, joined by the picture that they name.

Rows with the same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate
pictures, they would be each other's negatives.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets

from clipft.data.columns import (
    attribute_value,
    check_attributes,
    checked_captions,
    encode_attribute,
    encode_labels,
    find_columns,
)
from clipft.data.reading import Reading
from clipft.data.shards import shard_of

__all__ = ["add_row", "dataset_of_pictures", "from_table_rows", "read_csv", "read_jsonl", "safe_path"]


def read_csv(path: Path, delimiter: str, reading: Reading) -> list[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, without those left out."""
    rows = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for number, row in enumerate(reader):
            with reading.row():
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, row {number}: expected {len(reader.fieldnames or ())} fields, as in the header; a "
                        f"field that holds {delimiter!r} must be quoted"
                    )
                rows.append((number, row))
    return rows


def read_jsonl(path: Path, reading: Reading) -> list[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, without those left out."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        with reading.row():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number + 1}: expected one JSON object a line ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {type(row).__name__}")
            rows.append((number, row))
    return rows


def from_table_rows(rows: list[tuple[int, dict[str, Any]]], path: Path, reading: Reading) -> datasets.Dataset:
    """Numbered rows of a table whose image column holds paths."""
    if not rows:
        raise ValueError(f"{path}: expected at least one row, found none")
    keys = rows[0][1].keys()
    names = find_columns(list(keys), str(path), reading.named)
    check_attributes(list(keys), names, str(path), reading)
    pictures: dict[str, dict[str, Any]] = {}
    for number, row in rows:
        where = f"{path}, row {number}"
        with reading.row():
            if row.keys() != keys:
                raise ValueError(f"{where}: expected the keys of row {rows[0][0]}, {sorted(keys)}, got {sorted(row)}")
            image = safe_path(row[cast(str, names[0])], path.parent, where, reading)
            add_row(pictures, image, row, names[1:], where, reading.attributes)
    return dataset_of_pictures(pictures, names[1:], str(path), reading)


def add_row(
    pictures: dict[str, dict[str, Any]],
    image: str,
    row: dict[str, Any],
    names: Sequence[str | None],
    where: str,
    attributes: Sequence[str],
) -> None:
    """Add a row to the picture that it names."""
    caption, label = names
    captions = checked_captions(row[caption], where) if caption else []
    known = pictures.get(image, {})
    if label and known.get("label", row[label]) != row[label]:
        raise ValueError(
            f"{where}: expected the label of an earlier row with this image, {known['label']!r}, got {row[label]!r}"
        )
    values = {name: attribute_value(row[name]) for name in attributes}
    for name, value in values.items():
        earlier = known.get("attributes", values)[name]
        if None not in (earlier, value) and earlier != value:
            raise ValueError(f"{where}: expected {name} of an earlier row with this image, {earlier!r}, got {value!r}")
        values[name] = earlier if value is None else value
    picture = pictures.setdefault(image, {"captions": [], "places": [], "label": row[label] if label else None})
    picture["captions"] += captions
    picture["places"].append(where)
    picture["attributes"] = values


def dataset_of_pictures(
    pictures: dict[str, dict[str, Any]], names: Sequence[str | None], where: str, reading: Reading
) -> datasets.Dataset:
    """The data set of pictures by path or address."""
    if not pictures:
        raise ValueError(f"{where}: expected at least one row that can be used, found none")
    caption, label = names
    columns: dict[str, list[Any]] = {"image": list(pictures)}
    features: dict[str, Any] = {"image": datasets.Image()}
    if caption:
        columns["caption"] = [picture["captions"] for picture in pictures.values()]
        features["caption"] = datasets.List(datasets.Value("string"))
        if all(len(captions) == 1 for captions in columns["caption"]):
            columns["caption"] = [captions[0] for captions in columns["caption"]]
            features["caption"] = datasets.Value("string")
    if label:
        columns["label"], features["label"] = encode_labels([picture["label"] for picture in pictures.values()])
    for name in reading.attributes:
        values = [picture["attributes"][name] for picture in pictures.values()]
        columns[name], features[name] = encode_attribute(values, name, where)
    reading.places = [picture["places"] for picture in pictures.values()]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def safe_path(value: Any, folder: Path, where: str, reading: Reading) -> str:
    """The absolute path of an image named in a table, or its address in a shard; it must exist and lie in the table's
    folder.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected the path of an image, got {value!r}")
    shard = shard_of(value)
    path = (folder / (shard or value)).resolve()
    if not reading.allow_outside and not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{where}: expected an image inside {folder}, the file's folder, got {value!r}, which leaves it; if that "
            "is meant, allow_outside=True (--allow-outside-paths)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no image {value!r} in {folder}")
    return value if shard else str(path)
