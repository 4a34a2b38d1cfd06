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
import pyarrow.compute

from clipft.data.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    NO_LABEL,
    attribute_value,
    check_attributes,
    checked_attributes,
    checked_captions,
    encode_attribute,
    encode_labels,
    find_columns,
)
from clipft.data.pictures import PICTURE_ENDINGS, UNREADABLE, EncodedPicture, to_rgb
from clipft.data.reading import UNREADABLE_KIND, BadRowError, Reading
from clipft.data.rows import read_stored, stored_pictures
from clipft.data.shards import Address, samples, shard_paths
from clipft.data.tables import add_row, dataset_of_pictures, from_table_rows, read_csv, read_jsonl, safe_path

__all__ = ["load_pairs", "load_reading", "read_pairs"]

_logger = logging.getLogger(__name__)
_CHUNK = 256  # pictures in memory while they are looked at
_IMAGE_EXTENSIONS = [suffix[1:] for suffix in sorted(PICTURE_ENDINGS)]
_PATHS, _BYTES = ("string", "large_string"), ("binary", "large_binary")
_TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def load_pairs(
    path_or_name: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    attribute_columns: Sequence[str] = (),
    on_bad_row: str = "error",
    allow_outside: bool = False,
) -> datasets.Dataset:
    """Load a data set for training or evaluation.

    Args:
        path_or_name: a folder with one sub-folder of pictures a class; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file with image paths relative to the file (which may not leave its folder) or image bytes, and a caption or
            a list of captions a row; WebDataset shards (a ``.tar`` file, a folder of them, ``shards/{000..127}.tar``,
            ``shards/*.tar``), which are read in place; a folder written by ``Dataset.save_to_disk``; any other folder
            or name that ``datasets.load_dataset`` takes.
        split: which split of a data set by name.
        image_column, caption_column, label_column: where they are not called by a usual name (``image``, ``file_name``,
            ``filepath``, ``path``; ``caption``, ``captions``, ``text``, ``title``; ``label``, ``class``); in shards, an
            extension or a member of the ``.json`` (usual: ``jpg`` and the like; ``txt``; ``cls``).
        attribute_columns: further columns of classes, for heads of their own; empty or null is a value not known.
        on_bad_row: ``"error"``: a row without caption or file is an error here, a picture that cannot be decoded when
            its turn comes. ``"skip"`` leaves such rows out and logs how many and which; it decodes every picture once.
        allow_outside: let the paths in a file leave its folder.

    Returns:
        A ``datasets.Dataset`` with ``image`` (decoded to PIL on access) and ``caption`` (a string or a list of strings)
        and / or ``label`` (a ``ClassLabel`` where the classes have names); the attributes as ``ClassLabel`` or None.

    Raises:
        FileNotFoundError: the file or folder, or an image that a table names, does not exist.
        ValueError: a column, caption or path is not as expected; the message names file and row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row: expected 'error' or 'skip', got {on_bad_row!r}")
    named = (image_column, caption_column, label_column)
    reading = Reading(named, on_bad_row == "skip", allow_outside, checked_attributes(attribute_columns))
    return load_reading(path_or_name, reading, split)


def load_reading(path_or_name: str | Path, reading: Reading, split: str = "train") -> datasets.Dataset:
    """As :func:`load_pairs`; ``reading`` then says what was left out."""
    dataset = read_pairs(path_or_name, split, reading)
    if reading.skip:
        dataset = _drop_unreadable(dataset, reading)
    if reading.skipped:
        _logger.warning("%s", reading.summary())
    return dataset


def read_pairs(path_or_name: str | Path, split: str, reading: Reading) -> datasets.Dataset:
    """As :func:`load_pairs`, without a look at the pictures themselves."""
    reading.source = str(path_or_name)
    dataset = _read(path_or_name, split, reading)
    reading.finish(len(dataset))
    return dataset


def _read(path_or_name: str | Path, split: str, reading: Reading) -> datasets.Dataset:
    path = Path(path_or_name).expanduser()
    if path.suffix.lower() == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        shards = sorted(path.glob("*.tar")) if path.is_dir() else shard_paths(str(path_or_name))
        return _from_shards(shards, str(path_or_name), reading)
    if path.is_file():
        return _from_file(path, reading)
    if path.is_dir():
        return _from_folder(path, split, reading)
    if path.suffix.lower() in _TABLE_SUFFIXES or str(path_or_name).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"path_or_name: expected a file, a folder or a data set's name, there is no {str(path)!r}"
        )
    return _canonical(_by_name(str(path_or_name), split), str(path_or_name), None, reading)


def _drop_unreadable(dataset: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """Decode every picture, JPEGs at an eighth of their size, which reads the file to its end all the same."""
    stored = stored_pictures(dataset)
    assert stored is not None  # _decode_images has made it so

    def fault(number: int, image: dict[str, Any]) -> str | None:
        place = reading.place(number)
        try:
            to_rgb(EncodedPicture(read_stored(image), place).decode(8))
        except UNREADABLE as error:
            message = str(error)
            return message if message.startswith(place) else f"{place}: the image cannot be read ({message})"
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
    return dataset if len(good) == len(dataset) else _select_rows(dataset, good, reading)


def _select_rows(dataset: datasets.Dataset, rows: list[int], reading: Reading) -> datasets.Dataset:
    if not rows:
        raise ValueError(f"{reading.source}: expected at least one row that can be used, found none")
    reading.keep(rows)
    return dataset.select(rows)


# ---- folders and names ----


def _from_folder(folder: Path, split: str, reading: Reading) -> datasets.Dataset:
    if (folder / "state.json").is_file():
        return _canonical(datasets.Dataset.load_from_disk(str(folder)), str(folder), folder, reading)
    if (
        any(entry.suffix.lower() in _TABLE_SUFFIXES for entry in folder.rglob("*"))
        or (folder / "dataset_dict.json").exists()
    ):
        return _canonical(_by_name(str(folder), split), str(folder), folder, reading)
    if reading.attributes:
        raise ValueError(f"attribute_columns: {folder} has class folders and no columns; give a table")
    return _from_class_folders(folder)


def _from_class_folders(folder: Path) -> datasets.Dataset:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    pictures = {
        entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in PICTURE_ENDINGS) for entry in classes
    }
    empty = [name for name, paths in pictures.items() if not paths]
    if empty or len(pictures) < 2:
        raise ValueError(
            f"{folder}: expected one sub-folder a class, two or more, with pictures in each; found "
            + (f"no pictures directly in {', '.join(empty[:5])}" if empty else f"{len(pictures)} sub-folders")
            + "; for captions give the .csv, .tsv, .jsonl or .parquet file itself"
        )
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(pictures))})
    columns = {
        "image": [str(path) for paths in pictures.values() for path in paths],
        "label": [number for number, paths in enumerate(pictures.values()) for _ in paths],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def _by_name(name: str, split: str) -> datasets.Dataset:
    loaded = datasets.load_dataset(name, split=split)
    return cast(datasets.Dataset, loaded)


# ---- tables ----


def _from_file(path: Path, reading: Reading) -> datasets.Dataset:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(path, reading)
    if suffix in (".csv", ".tsv"):
        return from_table_rows(read_csv(path, "\t" if suffix == ".tsv" else ",", reading), path, reading)
    if suffix == ".jsonl":
        return from_table_rows(read_jsonl(path, reading), path, reading)
    known = ", ".join((*_TABLE_SUFFIXES, ".tar"))
    raise ValueError(f"{path}: expected a file ending in {known}, got {suffix or 'no ending'!r}")


def _from_parquet(path: Path, reading: Reading) -> datasets.Dataset:
    dataset = cast(datasets.Dataset, datasets.Dataset.from_parquet(str(path)))
    image = find_columns(dataset.column_names, str(path), reading.named)[0]
    if getattr(dataset.features[cast(str, image)], "dtype", None) in _PATHS:
        return from_table_rows(list(enumerate(cast(list[dict[str, Any]], dataset.to_list()))), path, reading)
    return _canonical(dataset, str(path), path.parent, reading)


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
                raise ValueError(f"{place}: expected a picture ({', '.join(_IMAGE_EXTENSIONS)}), found none")
            if present[1] and row["label"] is None:
                raise BadRowError(place, "expected a label, found none", NO_LABEL)
            add_row(pictures, row["image"], row, present, place, reading.attributes)
    return dataset_of_pictures(pictures, present, where, reading)


def _first_value(fields: dict[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _canonical(dataset: Any, where: str, folder: Path | None, reading: Reading) -> datasets.Dataset:
    """Rename the columns, drop the rest, and have images decoded."""
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"{where}: expected one split with a length, got {type(dataset).__name__}")
    columns = find_columns(dataset.column_names, where, reading.named)
    names = {column: name for column, name in zip(columns, ("image", "caption", "label"), strict=True) if column}
    check_attributes(dataset.column_names, columns, where, reading)
    dataset = dataset.select_columns([*names, *reading.attributes])
    dataset = dataset.rename_columns({column: name for column, name in names.items() if column != name})
    dataset, images = _checked_rows(dataset, where, folder, reading)
    if "label" in dataset.column_names and isinstance(dataset.features["label"], datasets.Value):
        values, feature = encode_labels(list(dataset["label"]))
        dataset = dataset.remove_columns("label").add_column("label", values, feature=feature)
    for name in reading.attributes:
        if not isinstance(dataset.features[name], datasets.ClassLabel):
            attributes, feature = encode_attribute([attribute_value(value) for value in dataset[name]], name, where)
            dataset = dataset.remove_columns(name).add_column(name, attributes, feature=feature)
    if images is None:
        return dataset.cast_column("image", datasets.Image())
    return dataset.remove_columns("image").add_column("image", images, feature=datasets.Image())


def _checked_rows(
    dataset: datasets.Dataset, where: str, folder: Path | None, reading: Reading
) -> tuple[datasets.Dataset, list[Any] | None]:
    """The rows with captions and pictures, and the pictures where their paths had to be looked at."""
    feature = dataset.features["image"]
    kind = getattr(feature, "dtype", None)
    if not isinstance(feature, (datasets.Image, dict)) and kind not in _BYTES:
        raise ValueError(f"{where}: expected images or their bytes in the image column, found {feature}")
    stored = dataset.cast_column("image", datasets.Image(decode=False))
    in_files = bool(pyarrow.compute.struct_field(stored.data.column("image"), "bytes").null_count)
    images: list[Any] | None = [] if in_files and folder is not None else None
    captions = list(dataset["caption"]) if "caption" in dataset.column_names else None
    good = []
    for number in range(len(dataset)):
        with reading.row():
            place = f"{where}, row {number}"
            if captions is not None:
                checked_captions(captions[number], place)
            if images is not None and folder is not None:
                image = stored[number]["image"] or {"bytes": None, "path": None}
                if not image["bytes"]:
                    image = {"bytes": None, "path": safe_path(image["path"], folder, place, reading)}
                images.append(image)
            good.append(number)
    if len(good) < len(dataset):
        dataset = _select_rows(dataset, good, reading)
    return dataset, images
