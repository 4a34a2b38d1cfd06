"""Image-caption pairs and labelled images from what people have: class folders, tables, tar shards, data sets by name.

Whatever the source, the result has the columns ``image`` and ``caption`` and / or ``label``. Rows of a table with the
same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate pictures, they would
be each other's negatives.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import datasets

from clipft.data.columns import CAPTION_COLUMNS, LABEL_COLUMNS, NO_LABEL, checked_attributes, find_columns
from clipft.data.pictures import EncodedPicture, UnreadablePictureError, naming, picture_endings, to_rgb
from clipft.data.reading import UNREADABLE_KIND, BadRowError, Reading
from clipft.data.rows import Picture, read_stored, stored_pictures
from clipft.data.shards import Address, samples, shard_paths
from clipft.data.splits import TABLE_ENDINGS, chosen_split, existing, hidden, sources_of_splits, split_of_name, visible
from clipft.data.stored import canonical, holds_paths, read_parquet, read_saved, select_rows
from clipft.data.tables import add_row, dataset_of_pictures, from_table_rows
from clipft.data.text_tables import checked_encoding, read_csv, read_jsonl

__all__ = ["load_pairs", "load_reading", "read_pairs"]

_logger = logging.getLogger(__name__)
_CHUNK = 256  # pictures in memory while they are looked at
_IMAGE_EXTENSIONS = [suffix[1:] for suffix in sorted(picture_endings())]
_NO_TABLE, _NO_SHARD, _UNLISTED = "table beside the classes", "shard beside the classes", "not in the table"


def load_pairs(
    path_or_name: str | Path,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    attribute_columns: Sequence[str] = (),
    on_bad_row: str = "error",
    allow_outside: bool = False,
    encoding: str | None = None,
) -> datasets.Dataset:
    """Load a data set for training or evaluation.

    Args:
        path_or_name: a folder with one sub-folder of pictures a class; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file with image paths relative to the file (which may not leave its folder) or image bytes, and a caption or
            a list of captions a row, or a folder with such files or with ``metadata.csv`` (or ``.jsonl``, ``.parquet``)
            beside the pictures; WebDataset shards (a ``.tar`` file, a folder of them, ``shards/{000..127}.tar``,
            ``shards/*.tar``), which are read in place; a folder written by ``save_to_disk``; a folder of splits, as
            :mod:`clipft.data.splits` has them; or a name that ``datasets.load_dataset`` takes. ``SOURCE:SPLIT`` names a
            split too.
        split: which split, of a source that has several; default: train.
        image_column, caption_column, label_column: where they are not called by a usual name (``image``, ``file_name``,
            ``filepath``, ``path``; ``caption``, ``captions``, ``text``, ``title``; ``label``, ``class``); in shards, an
            extension or a member of the ``.json`` (usual: ``jpg`` and the like; ``txt``; ``cls``).
        attribute_columns: further columns of classes, for heads of their own; empty or null is a value not known.
        on_bad_row: ``"error"``: a row without caption, label or file is an error here, a picture that cannot be decoded
            when its turn comes. ``"skip"`` leaves such rows out and logs how many and which; it decodes every picture
            once.
        allow_outside: let the paths in a file leave its folder.
        encoding: of text files that are not UTF-8; a byte-order mark in a file goes before.

    Returns:
        A ``datasets.Dataset`` with ``image`` (decoded to PIL on access) and ``caption`` (a string or a list of strings)
        and / or ``label`` (a ``ClassLabel`` where the classes have names); the attributes as ``ClassLabel`` or None.

    Raises:
        FileNotFoundError: the file or folder, or an image that a table names, does not exist.
        ValueError: a column, caption, label or path is not as expected; the message names file and row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row: expected 'error' or 'skip', got {on_bad_row!r}")
    named = (image_column, caption_column, label_column)
    reading = Reading(
        named, on_bad_row == "skip", allow_outside, checked_attributes(attribute_columns), checked_encoding(encoding)
    )
    return load_reading(path_or_name, reading, split)


def load_reading(
    path_or_name: str | Path, reading: Reading, split: str | None = None, purpose: str = "train"
) -> datasets.Dataset:
    """As :func:`load_pairs`; ``reading`` then says what was left out. ``purpose``: of
    :func:`clipft.data.splits.chosen_split`.
    """
    dataset = read_pairs(path_or_name, split, reading, purpose)
    if reading.skip:
        dataset = _drop_unreadable(dataset, reading)
    if reading.skipped:
        _logger.warning("%s", reading.summary())
    return dataset


def read_pairs(
    path_or_name: str | Path, split: str | None, reading: Reading, purpose: str = "train"
) -> datasets.Dataset:
    """As :func:`load_reading`, without a look at the pictures themselves."""
    source, own = split_of_name(path_or_name)
    if own is not None and split not in (None, own):
        raise ValueError(f"split: expected the split of {str(path_or_name)!r}, got {split!r}")
    reading.source = str(source)
    dataset = _read(source, split or own, reading, purpose)
    reading.finish(len(dataset))
    return dataset


def _read(source: str | Path, split: str | None, reading: Reading, purpose: str) -> datasets.Dataset:
    path = existing(source)
    if Path(source).suffix.lower() == ".tar" and (path is None or path.is_file()):
        return _from_shards(shard_paths(str(source)), str(source), reading)
    if path is None and (Path(source).suffix.lower() in TABLE_ENDINGS or str(source).startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"path_or_name: expected a file, a folder or a data set's name, there is no {str(source)!r}"
        )
    if path is None:
        return _by_name(str(source), split, reading, purpose)
    parts = sources_of_splits(path) if path.is_dir() else None
    if parts is None:
        if split not in (None, "train"):
            raise ValueError(f"split: {source} has no splits, got {split!r}")
        return _from_folder(path, reading) if path.is_dir() else _from_files([path], reading)
    reading.split = chosen_split(parts, split, purpose, str(source))
    chosen = parts[reading.split]
    return _from_folder(chosen[0], reading) if chosen[0].is_dir() else _from_files(chosen, reading)


def _drop_unreadable(dataset: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """Decode every picture, JPEGs at an eighth of their size, which reads the file to its end all the same."""
    stored = stored_pictures(dataset)
    assert stored is not None  # read_pairs has made it so

    def fault(number: int, image: dict[str, Any]) -> str | None:
        place = reading.place(number)
        try:
            with naming(place):
                to_rgb(EncodedPicture(read_stored(image), place).decode(8))
        except UnreadablePictureError as error:
            return str(error)
        return None

    faults: list[str | None] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(stored), _CHUNK):
            images = stored[start : start + _CHUNK]["image"]
            faults += pool.map(fault, range(start, start + len(images)), images)
    for number, message in enumerate(faults):
        if message:
            reading.leave_out_row(number, UNREADABLE_KIND, message)
    good = [number for number, message in enumerate(faults) if not message]
    return dataset if len(good) == len(dataset) else select_rows(dataset, good, reading)


# ---- folders and names ----


def _from_folder(folder: Path, reading: Reading) -> datasets.Dataset:
    """One that has no splits, or is one. What is in it decides, never a README nor code beside the data."""
    if (folder / "state.json").is_file():
        return canonical(read_saved(folder), str(folder), folder, reading)
    entries = visible(folder)
    files = [entry for entry in folder.rglob("*") if not hidden(entry, folder)]
    tables = sorted(file for file in files if file.suffix.lower() in TABLE_ENDINGS)
    shards = [entry for entry in entries if entry.suffix.lower() == ".tar"]
    if metadata := [table for table in tables if table.stem == "metadata"]:
        return _from_folder_of_tables(metadata, files, reading)
    pictured = {file.relative_to(folder).parts[0] for file in files if file.suffix.lower() in picture_endings()}
    if len(pictured & {entry.name for entry in entries if entry.is_dir()}) > 1:
        return _from_classes_and_more(folder, tables, shards, reading)
    if shards:
        return _from_shards(shards, str(folder), reading)
    if tables:
        return _from_folder_of_tables(tables, files, reading)
    return _from_class_folders(folder, reading)


def _from_folder_of_tables(tables: Sequence[Path], files: Sequence[Path], reading: Reading) -> datasets.Dataset:
    dataset = _from_files(tables, reading)
    for file in sorted(files):
        if file.suffix.lower() in picture_endings() and os.path.realpath(file) not in reading.listed:
            reading.leave_out(_UNLISTED, str(file))
    return dataset


def _from_classes_and_more(
    folder: Path, tables: Sequence[Path], shards: Sequence[Path], reading: Reading
) -> datasets.Dataset:
    """Class folders; a table or shard beside them is counted, and refused if it may be what is meant."""
    for table in tables:
        if _lists_pictures(table, reading):
            raise ValueError(
                f"{folder}: has class folders, and {table.relative_to(folder)}, which lists pictures too: give "
                "the file itself, or move it away"
            )
        reading.leave_out(_NO_TABLE, str(table))
    for shard in shards:
        reading.leave_out(_NO_SHARD, str(shard))
    return _from_class_folders(folder, reading)


def _lists_pictures(table: Path, reading: Reading) -> bool:
    try:
        columns = _rows_of(table, Reading(encoding=reading.encoding, skip=True))
        names = (
            columns.column_names if isinstance(columns, datasets.Dataset) else list(columns[0][1]) if columns else []
        )
        find_columns(names, str(table), reading.named)
    except (ValueError, OSError):
        return False
    return True


def _from_class_folders(folder: Path, reading: Reading) -> datasets.Dataset:
    if reading.attributes:
        raise ValueError(f"attribute_columns: {folder} has class folders and no columns; give a table")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    pictures = {
        entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in picture_endings()) for entry in classes
    }
    empty = [name for name, paths in pictures.items() if not paths]
    if empty or len(pictures) < 2:
        raise ValueError(
            f"{folder}: expected one sub-folder a class, two or more, with pictures in each; found "
            + (f"no pictures directly in {', '.join(empty[:5])}" if empty else f"{len(pictures)} sub-folders")
            + "; for captions give the .csv, .tsv, .jsonl or .parquet file itself"
        )
    features = datasets.Features({"image": Picture(), "label": datasets.ClassLabel(names=list(pictures))})
    columns = {
        "image": [str(path) for paths in pictures.values() for path in paths],
        "label": [number for number, paths in enumerate(pictures.values()) for _ in paths],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _by_name(name: str, split: str | None, reading: Reading, purpose: str) -> datasets.Dataset:
    if split is None:
        names = datasets.get_dataset_split_names(name)
        split = chosen_split(names, None, purpose, name)
    reading.split = split
    return canonical(datasets.load_dataset(name, split=split), name, None, reading)


# ---- tables ----


def _from_files(paths: Sequence[Path], reading: Reading) -> datasets.Dataset:
    """The rows of files of one kind, one after the other."""
    where = str(paths[0]) if len(paths) == 1 else str(reading.source)
    found = [_rows_of(path, reading) for path in paths]
    stored = [rows for rows in found if isinstance(rows, datasets.Dataset)]
    if not stored:
        rows = [(path, *row) for path, own in zip(paths, found, strict=True) for row in cast(Any, own)]
        return from_table_rows(rows, where, reading)
    columns = [sorted(rows.column_names) for rows in stored]
    if len(stored) < len(found) or any(own != columns[0] for own in columns):
        raise ValueError(f"{where}: expected files with the same columns, got {', '.join(path.name for path in paths)}")
    places = [f"{path}, row {row}" for path, own in zip(paths, stored, strict=True) for row in range(len(own))]
    rows = stored[0] if len(stored) == 1 else datasets.concatenate_datasets(stored)
    return canonical(rows, where, paths[0].parent, reading, places)


def _rows_of(path: Path, reading: Reading) -> datasets.Dataset | list[tuple[int, dict[str, Any]]]:
    """Of a table with paths, the rows with their numbers; of one with pictures in it, a data set."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return read_csv(path, "\t" if suffix == ".tsv" else ",", reading)
    if suffix == ".jsonl":
        return read_jsonl(path, reading)
    if suffix == ".parquet":
        dataset = read_parquet(path)
        return list(enumerate(dataset.to_list())) if holds_paths(dataset, str(path), reading) else dataset
    known = ", ".join((*TABLE_ENDINGS, ".tar"))
    raise ValueError(f"{path}: expected a file ending in {known}, got {suffix or 'no ending'!r}")


# ---- shards ----


def _from_shards(shards: Sequence[Path], where: str, reading: Reading) -> datasets.Dataset:
    image, caption, label = reading.named
    rows: list[tuple[str, dict[str, Any]]] = []
    for shard in shards:
        for key, fields in samples(shard):
            files = {name: value for name, value in fields.items() if isinstance(value, Address)}
            row = {
                "image": _first_value(files, [image] if image else _IMAGE_EXTENSIONS),
                "caption": _first_value(fields, [caption] if caption else ("txt", *CAPTION_COLUMNS)),
                "label": _first_value(fields, [label] if label else ("cls", *LABEL_COLUMNS)),
                **{name: fields.get(name) for name in reading.attributes},
            }
            rows.append((f"{shard}, {key}", row))
    present = [name if any(row[name] is not None for _, row in rows) else None for name in ("caption", "label")]
    if present == [None, None]:
        raise ValueError(
            f"{where}: expected captions (.txt, .caption, or {', '.join(CAPTION_COLUMNS)} in .json) or labels (.cls), "
            f"found none in {len(rows)} samples; name them with caption_column or label_column"
        )
    pictures: dict[str, dict[str, Any]] = {}
    for place, row in rows:
        with reading.row():
            if row["image"] is None:
                raise ValueError(f"{place}: expected a picture (.jpg, .png, ...), found none")
            if present[1] and row["label"] is None:
                raise BadRowError(place, "expected a label, found none", NO_LABEL)
            add_row(pictures, row["image"], row, present, place, reading.attributes)
    return dataset_of_pictures(pictures, present, where, reading)


def _first_value(fields: dict[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)
