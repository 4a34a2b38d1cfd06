"""Rows of tables, whatever file they are of, joined by the picture that they name.

Rows with the same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate
pictures, they would be each other's negatives.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import datasets
import pyarrow as pa

from clipft.data.columns import (
    NO_ID,
    NO_LABEL,
    attribute_value,
    check_attributes,
    check_text,
    checked_captions,
    encode_attribute,
    encode_labels,
    find_columns,
    label_value,
)
from clipft.data.compact import Each, RowNames, Texts, row_name
from clipft.data.reading import NO_FILE, BadRowError, Reading
from clipft.data.rows import Picture
from clipft.data.slices import shard_of
from clipft.errors import short

__all__ = ["Pictures", "add_row", "dataset_of_paths", "dataset_of_pictures", "from_table_rows", "safe_path"]


class Pictures:
    """Pictures alone as they are found, each with an id, whatever others have the same."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._images, self._ids = Texts(), Texts()

    def add(self, image: str, name: Any, where: str) -> None:
        """Add a row that is a picture."""
        own = attribute_value(name)
        if own is None:
            raise BadRowError(where, f"expected an id, got {short(name)}", NO_ID)
        check_text(own, where, NO_ID)
        self._images.append(image)
        self._ids.append(own)
        self._reading.so_far += 1

    def dataset(self, places: Sequence[str], where: str) -> datasets.Dataset:
        """The data set of those that were added, and where they come from."""
        if not self._images:
            raise ValueError(f"{where}: expected at least one row that can be used, found none")
        self._reading.places = Each(places)
        return dataset_of_paths(self._images, self._ids)


def dataset_of_paths(images: Texts, ids: Texts) -> datasets.Dataset:
    """Pictures alone, by the paths of their files, without a copy of these."""
    stored = [
        pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
        for paths in images.arrow().chunks
    ]
    features = datasets.Features({"image": Picture(), "id": datasets.Value("string")})
    table = pa.table([pa.chunked_array(stored), ids.arrow()], schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    # a fingerprint of its own, for which datasets would copy all of it
    return datasets.Dataset(datasets.table.InMemoryTable(table), info, fingerprint=uuid4().hex[:16])


def from_table_rows(rows: Iterable[tuple[Path, int, dict[str, Any]]], where: str, reading: Reading) -> datasets.Dataset:
    """Rows of tables whose image column holds paths, each with its file and number."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{where}: expected at least one row, found none")
    keys = first[2].keys()
    names = find_columns(list(keys), where, reading.named, reading.pictures_only)
    check_attributes(list(keys), names, where, reading)
    alone, places = Pictures(reading), RowNames()
    pictures: dict[str, dict[str, Any]] = {}
    for path, number, row in chain([first], rows):
        place = row_name(str(path), number)
        with reading.row():
            if row.keys() != keys:
                raise ValueError(
                    f"{place}: expected the keys of row {first[1]}, {short(sorted(keys))}, got {short(sorted(row))}"
                )
            image = safe_path(row[cast(str, names[0])], path.parent, place, reading)
            if reading.pictures_only:
                alone.add(image, row.get(reading.id_column or str(names[0])), place)
                places.append(str(path), number)
            else:
                add_row(pictures, image, row, names[1:], place, reading.attributes)
    if reading.pictures_only:
        return alone.dataset(places, where)
    return dataset_of_pictures(pictures, names[1:], where, reading)


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
    own = label_value(row[label], where) if label else None
    known = pictures.get(image, {})
    if known.get("label", own) != own:
        raise ValueError(
            f"{where}: expected the label of an earlier row with this image, {short(known['label'])}, got {short(own)}"
        )
    values = {name: attribute_value(row[name]) for name in attributes}
    for name, value in values.items():
        check_text(value or "", where, NO_LABEL)
        earlier = known.get("attributes", values)[name]
        if None not in (earlier, value) and earlier != value:
            raise ValueError(
                f"{where}: expected {name} of an earlier row with this image, {short(earlier)}, got {short(value)}"
            )
        values[name] = earlier if value is None else value
    picture = pictures.setdefault(image, {"image": image, "captions": [], "places": [], "label": own})
    picture["captions"] += captions
    picture["places"].append(where)
    picture["attributes"] = values


def dataset_of_pictures(
    pictures: dict[str, dict[str, Any]], names: Sequence[str | None], where: str, reading: Reading
) -> datasets.Dataset:
    """The data set of pictures that were added."""
    if not pictures:
        raise ValueError(f"{where}: expected at least one row that can be used, found none")
    caption, label = names
    columns: dict[str, list[Any]] = {"image": [picture["image"] for picture in pictures.values()]}
    features: dict[str, Any] = {"image": Picture()}
    if caption:
        columns["caption"] = [picture["captions"] for picture in pictures.values()]
        features["caption"] = datasets.List(datasets.Value("string"))
        if all(len(captions) == 1 for captions in columns["caption"]):
            columns["caption"] = [captions[0] for captions in columns["caption"]]
            features["caption"] = datasets.Value("string")
    if label:
        columns["label"], features["label"] = encode_labels([picture["label"] for picture in pictures.values()], where)
    for name in reading.attributes:
        values = [picture["attributes"][name] for picture in pictures.values()]
        columns[name], features[name] = encode_attribute(values, name, where)
    reading.places = [picture["places"] for picture in pictures.values()]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def safe_path(value: Any, folder: Path, where: str, reading: Reading) -> str:
    """The absolute path of an image named in a table, or its address in a shard; it must exist and lie in the table's
    folder. Back-slashes are read as Windows means them, where no file has such a name.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRowError(where, f"expected the path of an image, got {short(value)}", NO_FILE)
    shard = shard_of(value)
    name = str(shard or value)
    if "\\" in name and not _is_file(folder / name):
        name = name.replace("\\", "/")
    try:
        path = os.path.realpath(folder / name)
    except UnicodeEncodeError as error:
        raise BadRowError(where, f"expected the path of an image, got {short(value)}", NO_FILE) from error
    if not reading.allow_outside and not f"{path}/".startswith(reading.real_folder(folder)):
        raise ValueError(
            f"{where}: expected an image inside {folder}, the file's folder, got {short(value)}, which leaves it; if "
            "that is meant, allow_outside=True (--allow-outside-paths)"
        )
    if not _is_file(path):
        raise FileNotFoundError(f"{where}: there is no image {short(value)} in {folder}")
    if reading.listed is not None:
        reading.listed.append(hash(path))
    return value if shard else path


def _is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  (Path's own raises where a name is too long)
