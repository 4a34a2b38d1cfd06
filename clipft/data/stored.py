"""Data sets that hold their pictures, or the paths of them, in a column: Parquet files, folders of ``save_to_disk``,
and what ``datasets`` loads by name.

Files are read where they are: nothing is copied to a cache, which could be stale or not be written to.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from clipft.data.columns import (
    NO_ID,
    attribute_value,
    check_attributes,
    checked_captions,
    class_of,
    encode_attribute,
    encode_labels,
    find_columns,
)
from clipft.data.compact import Each, Lazy, row_name
from clipft.data.parquet import batches
from clipft.data.reading import BadRowError, Reading
from clipft.data.rows import Picture
from clipft.data.tables import safe_path
from clipft.errors import line_of, short
from clipft.files import check_file, is_own_name, read_json

__all__ = [
    "canonical",
    "features_of_parquet",
    "holds_paths",
    "read_parquet",
    "read_saved",
    "rows_of_parquet",
    "select_rows",
]

_PATHS, _BYTES = ("string", "large_string"), ("binary", "large_binary")
_IN_MEMORY = 2 << 30  # bytes of a table; a larger one is unpacked to the disk


# ---- files ----


def read_parquet(path: Path) -> datasets.Dataset:
    """The rows of a file, in memory; of a large one in a file that goes with the process.

    Raises:
        ValueError: no Parquet, or a damaged file.
    """
    info = path.stat()
    fingerprint = hashlib.blake2b(f"{path.resolve()} {info.st_size} {info.st_mtime_ns}".encode(), digest_size=8)
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            if size <= _IN_MEMORY:
                rows = pyarrow.Table.from_batches(batches(file, info.st_size), file.schema_arrow)
                return datasets.Dataset(datasets.table.InMemoryTable(rows), fingerprint=fingerprint.hexdigest())
            unpacked = Path(_scratch().name, f"{fingerprint.hexdigest()}.arrow")
            with pyarrow.ipc.new_stream(unpacked, file.schema_arrow) as stream:
                for batch in batches(file, info.st_size):
                    stream.write_batch(batch)
        return datasets.Dataset.from_file(str(unpacked))
    except Exception as error:  # whatever a damaged file makes pyarrow and datasets raise
        raise ValueError(f"{path}: expected a Parquet file ({line_of(error)})") from error


def rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file as they are asked for, a few at a time in memory.

    Raises:
        ValueError: no Parquet, or a damaged file.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in batches(file, path.stat().st_size):
                yield from batch.to_pylist()
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise ValueError(f"{path}: expected a Parquet file ({line_of(error)})") from error


def features_of_parquet(path: Path) -> datasets.Features:
    """The columns of a file, whose rows are not read.

    Raises:
        ValueError: no Parquet, or a damaged file.
    """
    try:
        return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
    except Exception as error:
        raise ValueError(f"{path}: expected a Parquet file ({line_of(error)})") from error


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="clipft-parquet-")


def read_saved(folder: Path) -> datasets.Dataset:
    """A folder of ``Dataset.save_to_disk``, whose files are its own.

    Raises:
        ValueError: a file is damaged, or names others elsewhere.
    """
    where = str(folder / "state.json")
    state, _ = read_json(Path(where)), read_json(folder / "dataset_info.json")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        if not all(map(is_own_name, names)):
            raise ValueError(f"names files outside of its folder, {short(names)}")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise ValueError(f"names {missing[0]!r}, which is missing")
        for path in (folder / name for name in names):
            where = str(path)
            check_file(path)
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                stream.read_all().validate(full=True)  # offsets that lie would read beyond it
        where = f"{folder}: {', '.join([*names[:1], 'state.json', 'dataset_info.json'])}"
        dataset = datasets.Dataset.load_from_disk(str(folder)) if names else ()  # an empty set is saved as no files
        if not dataset:
            raise ValueError("expected at least one row, found none")
        return dataset.with_format(None)  # its state may hide columns
    except Exception as error:  # whatever a damaged file makes pyarrow and datasets raise
        raise ValueError(f"{where}: expected a data set that save_to_disk wrote ({line_of(error)})") from error


def holds_paths(features: Mapping[str, Any], where: str, reading: Reading) -> bool:
    """Whether the column of images, of these columns, has their paths as text."""
    image = cast(str, find_columns(list(features), where, reading.named, reading.pictures_only)[0])
    return getattr(features[image], "dtype", None) in _PATHS


# ---- columns and rows ----


def canonical(
    dataset: Any, where: str, folder: Path | None, reading: Reading, places: Sequence[str] = ()
) -> datasets.Dataset:
    """Rename the columns, drop the rest and the bad rows, and have images decoded.

    ``folder``: what paths are relative to, if the data may have any; ``places``: of the rows, default: their numbers.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"{where}: expected one split with a length, got {type(dataset).__name__}")
    if not len(dataset):
        raise ValueError(f"{where}: expected at least one row, found none")
    columns = find_columns(dataset.column_names, where, reading.named, reading.pictures_only)
    names = {column: name for column, name in zip(columns, ("image", "caption", "label"), strict=True) if column}
    check_attributes(dataset.column_names, columns, where, reading)
    named = list(dataset[reading.id_column]) if reading.id_column is not None else None
    dataset = dataset.select_columns([*names, *reading.attributes])
    dataset = dataset.rename_columns({column: name for column, name in names.items() if column != name})
    reading.places = Each(places or Lazy(partial(row_name, where), range(len(dataset))))
    if reading.pictures_only:
        dataset = dataset.add_column("id", _ids(dataset, named, reading))
    good, images, labels = _checked_rows(dataset, where, folder, reading)
    if len(good) < len(dataset):
        dataset = select_rows(dataset, good, reading)
    if labels is not None:
        values, feature = encode_labels(labels, where)
        dataset = dataset.remove_columns("label").add_column("label", values, feature=feature)
    for name in reading.attributes:
        if not isinstance(dataset.features[name], datasets.ClassLabel):
            attributes, feature = encode_attribute([attribute_value(value) for value in dataset[name]], name, where)
            dataset = dataset.remove_columns(name).add_column(name, attributes, feature=feature)
    if images is None:
        return dataset.cast_column("image", Picture())
    return dataset.remove_columns("image").add_column("image", images, feature=Picture())


def _ids(dataset: datasets.Dataset, named: list[Any] | None, reading: Reading) -> list[str]:
    """Of the rows: what their column says, "" if nothing; else their pictures' paths, else their places."""
    if named is not None:
        return [attribute_value(value) or "" for value in named]
    stored = dataset.cast_column("image", datasets.Image(decode=False)).data.column("image")
    paths = pyarrow.compute.struct_field(stored, "path").to_pylist()
    return [path or ":".join(reading.place(row).rsplit(", row ", 1)) for row, path in enumerate(paths)]


def select_rows(dataset: datasets.Dataset, rows: list[int], reading: Reading) -> datasets.Dataset:
    """These rows of it, also in the account; one at least."""
    if not rows:
        raise ValueError(f"{reading.source}: expected at least one row that can be used, found none")
    reading.keep(rows)
    return dataset.select(rows)


def _checked_rows(
    dataset: datasets.Dataset, where: str, folder: Path | None, reading: Reading
) -> tuple[list[int], list[Any] | None, list[str] | None]:
    """The rows that can be used, their pictures where their paths had to be looked at, and their labels where these
    have no classes yet.
    """
    feature = dataset.features["image"]
    if not isinstance(feature, (datasets.Image, dict)) and getattr(feature, "dtype", None) not in _BYTES:
        raise ValueError(f"{where}: expected images or their bytes in the image column, found {feature}")
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    in_files = bool(pyarrow.compute.struct_field(stored.data.column("image"), "bytes").null_count)
    images: list[Any] | None = [] if in_files and folder is not None else None
    captions, labels = (list(dataset[name]) if name in dataset.column_names else None for name in ("caption", "label"))
    own = dataset.features.get("label")
    classes = own.names if isinstance(own, datasets.ClassLabel) else None
    good, names = [], []
    ids = list(dataset["id"]) if reading.pictures_only else None
    for number in range(len(dataset)):
        with reading.row():
            place = reading.place(number)
            if ids is not None and not ids[number]:
                raise BadRowError(place, f"expected an id in column {reading.id_column!r}, found none", NO_ID)
            if captions is not None:
                checked_captions(captions[number], place)
            name = None if labels is None else class_of(labels[number], classes, place)
            if images is not None and folder is not None:
                image = stored[number]["image"] or {"bytes": None, "path": None}
                if not image["bytes"]:
                    image = {"bytes": None, "path": safe_path(image["path"], folder, place, reading)}
                images.append(image)
            names.append(name)
            good.append(number)
            reading.so_far += 1
    return good, images, cast(list[str], names) if labels is not None and classes is None else None
