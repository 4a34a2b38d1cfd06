"""Image-caption pairs and labelled images from what people have: class folders, tables, tar shards, data sets by name.

Whatever the source, the result has the columns ``image`` and ``caption`` and / or ``label``. Rows of a table with the
same image path are one picture with several captions, as in Flickr30k and COCO: taken as separate pictures, they would
be each other's negatives.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets

from clipft.data.columns import checked_attributes
from clipft.data.folders import from_folder, from_picture_files, walk
from clipft.data.given import read_object
from clipft.data.pictures import (
    UNOPENED_ENDINGS,
    EncodedPicture,
    UnreadablePictureError,
    limit_pixels,
    naming,
    picture_endings,
    to_rgb,
)
from clipft.data.reading import HIDDEN, UNREADABLE_KIND, Reading
from clipft.data.rows import read_stored, stored_pictures
from clipft.data.samples import from_samples
from clipft.data.shards import read_samples, shard_paths
from clipft.data.splits import TABLE_ENDINGS, chosen_split, existing, hidden, sources_of_splits, split_of_name
from clipft.data.stored import canonical, select_rows
from clipft.data.table_files import from_files, lists_pictures
from clipft.data.text_tables import checked_encoding
from clipft.environment import usable_cores
from clipft.errors import line_of
from clipft.files import check_file, expanded

__all__ = ["load_pairs", "load_reading", "read_pairs"]

_logger = logging.getLogger(__name__)
_CHUNK = 256  # pictures in memory while they are looked at
_LISTED = 10_000  # names beside one that is not there, that are compared with it


def load_pairs(
    path_or_name: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    attribute_columns: Sequence[str] = (),
    on_bad_row: str = "error",
    allow_outside: bool = False,
    encoding: str | None = None,
    max_pixels: int | None = None,
) -> Any:
    """Load a data set for training or evaluation.

    Args:
        path_or_name: a folder with one sub-folder of pictures a class, or of pictures with texts beside them, as
            :mod:`clipft.data.folders` has them; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``
            file with image paths relative to the file (which may not leave its folder) or image bytes, and a caption or
            a list of captions a row, or a folder with such files or with ``metadata.csv`` (or ``.jsonl``, ``.parquet``)
            beside the pictures; WebDataset shards (a ``.tar`` file, a folder of them, ``shards/{000..127}.tar``,
            ``shards/*.tar``), which are read in place; a folder written by ``save_to_disk``; a folder of splits, as
            :mod:`clipft.data.splits` has them; or a name that ``datasets.load_dataset`` takes. ``SOURCE:SPLIT`` names a
            split too. Also a ``datasets.Dataset`` or ``DatasetDict``, a pandas frame, torchvision's data sets, lists of
            (picture, text) and whatever else has a length and rows by index, of which a row is a dictionary or a
            (picture, text or class) pair, and subsets of these.
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
        max_pixels: most of a picture, from now on in this process; one with more is a bad row. Default: as it is, 89
            million to begin with.

    Returns:
        A ``datasets.Dataset`` with ``image`` (decoded to PIL on access) and ``caption`` (a string or a list of strings)
        and / or ``label`` (a ``ClassLabel`` where the classes have names); the attributes as ``ClassLabel`` or None. Of
        objects that are read by rows :class:`clipft.data.objects.ObjectRows`, with the same columns.

    Raises:
        FileNotFoundError: the file or folder, or an image that a table names, does not exist.
        ValueError: a column, caption, label or path is not as expected; the message names file and row.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row: expected 'error' or 'skip', got {on_bad_row!r}")
    limit_pixels(max_pixels)
    named = (image_column, caption_column, label_column)
    reading = Reading(
        named, on_bad_row == "skip", allow_outside, checked_attributes(attribute_columns), checked_encoding(encoding)
    )
    return load_reading(path_or_name, reading, split)


def load_reading(path_or_name: Any, reading: Reading, split: str | None = None, purpose: str = "train") -> Any:
    """As :func:`load_pairs`; ``reading`` then says what was left out. ``purpose``: of
    :func:`clipft.data.splits.chosen_split`.
    """
    dataset = read_pairs(path_or_name, split, reading, purpose)
    if reading.skip:
        dataset = _drop_unreadable(dataset, reading)
    if reading.skipped:
        _logger.warning("%s", reading.summary())
    return dataset


def read_pairs(path_or_name: Any, split: str | None, reading: Reading, purpose: str = "train") -> Any:
    """As :func:`load_reading`, without a look at the pictures themselves."""
    if not isinstance(path_or_name, (str, Path)):
        dataset = read_object(path_or_name, split, reading, purpose)
        reading.finish(len(dataset))
        return dataset
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
        return from_samples(read_samples(shard_paths(str(source)), reading), str(source), reading)
    pattern = reading.pictures_only and any(sign in str(source) for sign in "*?[")
    if path is None and _is_path(source) and not pattern:
        raise FileNotFoundError(
            f"path_or_name: expected a file, a folder or a data set's name, there is no {str(source)!r}{_near(source)}"
        )
    if path is None and pattern:
        return _from_pattern(str(source), reading)
    if path is None:
        return _by_name(str(source), split, reading, purpose)
    if not path.is_dir():
        check_file(path)
        if reading.pictures_only and path.suffix.lower() in {*picture_endings(), *UNOPENED_ENDINGS}:
            return from_picture_files([path], str(source), reading)
    every = reading.pictures_only and split is None and not (reading.named[0] or reading.id_column)
    all_pictures = every and path.is_dir() and bool(walk(path, Reading()).pictures)  # not kept
    parts = sources_of_splits(path) if path.is_dir() and not all_pictures else None
    if parts is None:
        if split not in (None, "train"):
            raise ValueError(f"split: {source} has no splits, got {split!r}")
        return from_folder(path, reading) if path.is_dir() else from_files([path], reading)
    reading.split = chosen_split(parts, split, purpose, str(source))
    chosen = parts[reading.split]
    if chosen[0].is_dir() and not (path / "dataset_dict.json").is_file():
        _count_beside_splits(path, parts, split, reading)
    return from_folder(chosen[0], reading) if chosen[0].is_dir() else from_files(chosen, reading)


def _from_pattern(pattern: str, reading: Reading) -> datasets.Dataset:
    """Pictures, or tables, whose paths match; folders among them are counted."""
    found = [Path(name) for name in sorted(glob.glob(str(expanded(pattern)), recursive=True))]
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise FileNotFoundError(f"path_or_name: expected files, none match {pattern!r}")
    for path in found:
        if path.is_dir():
            reading.leave_out("a folder", str(path))
    tables = [path for path in files if path.suffix.lower() in TABLE_ENDINGS]
    if len(tables) == len(files):
        return from_files(tables, reading)
    if tables:
        raise ValueError(f"path_or_name: expected pictures or tables, {pattern!r} matches both, such as {tables[0]}")
    return from_picture_files(files, pattern, reading)


def _count_beside_splits(folder: Path, splits: Iterable[str], asked: str | None, reading: Reading) -> None:
    """What is no split of a folder of splits; a table that may be what is meant is refused."""
    for entry in sorted(folder.iterdir()):
        if hidden(entry.name):
            reading.leave_out(HIDDEN, str(entry))
        elif not entry.is_dir():
            if asked is None and entry.suffix.lower() in TABLE_ENDINGS and lists_pictures(entry, reading):
                raise ValueError(
                    f"{folder}: has {', '.join(splits)}, and {entry.name}, which lists pictures too: give the file "
                    f"itself, or name the split, as {folder}:{reading.split}"
                )
            reading.leave_out("beside the splits", str(entry))


def _drop_unreadable(dataset: datasets.Dataset, reading: Reading) -> datasets.Dataset:
    """Decode every picture, JPEGs at an eighth of their size, which reads the file to its end all the same."""
    stored = stored_pictures(dataset) or dataset

    def fault(number: int, image: dict[str, Any]) -> str | None:
        place = reading.place(number)
        try:
            with naming(place):
                to_rgb(EncodedPicture(read_stored(image), place).decode(8))
        except UnreadablePictureError as error:
            return str(error)
        return None

    faults: list[str | None] = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(stored), _CHUNK):
            images = stored[start : start + _CHUNK]["image"]
            faults += pool.map(fault, range(start, start + len(images)), images)
    for number, message in enumerate(faults):
        if message:
            reading.leave_out_row(number, UNREADABLE_KIND, message)
    good = [number for number, message in enumerate(faults) if not message]
    return dataset if len(good) == len(dataset) else select_rows(dataset, good, reading)


# ---- by name ----


def _is_path(source: str | Path) -> bool:
    """Whether it can be no data set's name on the hub, which is NAME or OWNER/NAME, or an address."""
    text = str(source)
    no_name = text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or " " in text
    return Path(text).suffix.lower() in TABLE_ENDINGS or (no_name and "://" not in text)


def _near(source: str | Path) -> str:
    """What lies there and is called nearly so, for a message."""
    path = expanded(source)
    try:
        beside = [own.name for own in itertools.islice(path.parent.iterdir(), _LISTED)]
    except OSError:
        return ""
    found = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {str(path.parent / found[0])!r}?" if found else ""


def _by_name(name: str, split: str | None, reading: Reading, purpose: str) -> datasets.Dataset:
    try:
        if split is None:
            names = datasets.get_dataset_split_names(name)
            split = chosen_split(names, None, purpose, name)
        reading.split = split
        dataset = datasets.load_dataset(name, split=split)
    except (ConnectionError, FileNotFoundError) as error:  # of the network, or of a name that is not there
        raise FileNotFoundError(
            f"path_or_name: there is no file or folder {name!r} here{_near(name)}, and as a data set it does not come "
            f"from the hub ({line_of(error)})"
        ) from error
    return canonical(dataset, name, None, reading)
