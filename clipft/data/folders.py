"""Folders: what one is is decided by all that it holds, never by a README or code in it, and every entry is read or
counted.

In this order: a folder that ``save_to_disk`` wrote; pictures that ``metadata.csv`` (``.jsonl``, ``.parquet``) lists;
pictures with a text each beside them (``1.jpg``, ``1.txt`` and / or ``1.json``), as img2dataset and kohya's scripts
write them; a sub-folder of pictures, with sub-folders of its own, for each class; shards; tables.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from clipft.data.columns import CAPTION_COLUMNS, LABEL_COLUMNS
from clipft.data.compact import Each, Paths, Texts
from clipft.data.pictures import UNOPENED_ENDINGS, has_picture_content, picture_endings
from clipft.data.reading import HIDDEN, NO_FILE, NO_REGULAR_FILE, UNREADABLE_KIND, BadRowError, Reading
from clipft.data.rows import Picture
from clipft.data.samples import TEXT_ENDINGS, Sample, check_text_size, from_samples
from clipft.data.shards import read_samples
from clipft.data.slices import Address
from clipft.data.splits import TABLE_ENDINGS, hidden
from clipft.data.stored import canonical, features_of_parquet, holds_paths, read_saved
from clipft.data.table_files import from_files, lists_pictures
from clipft.data.tables import dataset_of_paths

__all__ = ["Tree", "from_folder", "from_picture_files", "walk"]

_SHARD = ".tar"
_UNLISTED, _OTHER, _NO_CLASS, _EMPTY = "not in the table", "of another kind", "in no class folder", "without pictures"
_LOOKED_AT = 100  # .json files, until one has a caption


class TreeFault(NamedTuple):
    """What cannot be opened, why, and how many pictures of the tree come before it."""

    file: Path
    error: BadRowError
    before: int


@dataclass
class Tree:
    """What a folder and those in it hold, by kind, in the order of names, a folder's own files before those below it.

    Attributes:
        folder: the uppermost; ``folders``: the names of those in it.
        pictures: by their endings; without one, by what they hold.
        tables, shards, texts, others: the rest.
        faults: what has a picture's ending and cannot be opened, and folders that cannot.
    """

    folder: Path
    folders: list[str] = field(default_factory=list)
    pictures: Paths = field(default_factory=Paths)
    tables: Paths = field(default_factory=Paths)
    shards: Paths = field(default_factory=Paths)
    texts: Paths = field(default_factory=Paths)
    others: Paths = field(default_factory=Paths)
    faults: list[TreeFault] = field(default_factory=list)

    def part(self, path: Path) -> str | None:
        """The sub-folder that a file lies in, if it does in one."""
        first, *rest = path.relative_to(self.folder).parts
        return first if rest else None

    def add_fault(self, file: Path, place: str, why: str, kind: str) -> None:
        """Of what comes next in the order."""
        self.faults.append(TreeFault(file, BadRowError(place, why, kind), len(self.pictures)))


# ---- what a folder holds ----


def walk(folder: Path, reading: Reading) -> Tree:
    """All in a folder, links followed, no folder twice; hidden entries are counted."""
    tree, seen, waiting = Tree(folder), set[tuple[int, int]](), [folder]
    kinds = {
        **dict.fromkeys(picture_endings(), "pictures"),
        **{f".{name}": "texts" for name in TEXT_ENDINGS},
        **dict.fromkeys(TABLE_ENDINGS, "tables"),
        _SHARD: "shards",
    }
    while waiting:
        here = waiting.pop()
        try:
            info, entries = here.stat(), _entries(here)
        except OSError as error:
            tree.add_fault(here, str(here), f"cannot be opened ({error.strerror})", UNREADABLE_KIND)
            continue
        if (info.st_dev, info.st_ino) in seen:
            reading.leave_out("a link to a folder that was read", str(here))
            tree.folders = [name for name in tree.folders if here != folder / name]
            continue
        seen.add((info.st_dev, info.st_ino))
        folders: list[Path] = []
        for name in entries.names:
            if hidden(name):
                reading.leave_out(HIDDEN, str(here / name))
            elif name in entries.folders:
                folders.append(here / name)
            else:
                _sort_in(tree, here / name, kinds, name not in entries.irregular)
        waiting += reversed(folders)
        if here == folder:
            tree.folders = [found.name for found in folders]
    return tree


@dataclass
class _Entries:
    """The names in a folder, sorted; which of them are folders, and which are files that cannot be opened."""

    names: list[str]
    folders: set[str]
    irregular: set[str]


def _entries(folder: Path) -> _Entries:
    found = _Entries([], set(), set())
    with os.scandir(folder) as entries:
        for entry in entries:
            found.names.append(entry.name)
            if _is(entry.is_dir):
                found.folders.add(entry.name)
            elif not _is(entry.is_file):
                found.irregular.add(entry.name)
    found.names.sort()
    return found


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a loop of links
        return False


def _sort_in(tree: Tree, file: Path, kinds: Mapping[str, str], regular: bool) -> None:
    """A file to those of its kind; ``regular``: it is one that can be opened."""
    ending = file.suffix.lower()
    kind = kinds.get(ending, "others")
    shown = os.fsencode(file).decode(errors="backslashreplace")
    if regular and not ending and has_picture_content(file):
        kind = "pictures"
    if kind == "others" and (hint := UNOPENED_ENDINGS.get(ending)):
        tree.add_fault(file, shown, f"{ending} is not opened: {hint}", f"{ending} ({hint})")
    elif not regular and kind != "others":
        why = "expected a file, found a pipe, a device or a link to nothing"
        tree.add_fault(file, shown, why, NO_REGULAR_FILE)
    elif kind == "pictures" and shown != str(file):
        tree.add_fault(file, shown, "expected a name in UTF-8; rename it", NO_FILE)
    else:
        getattr(tree, kind).append(file)


# ---- what a folder is ----


def from_folder(folder: Path, reading: Reading) -> datasets.Dataset:
    """The data set that a folder without splits is.

    Raises:
        ValueError: it is none, or may be two.
    """
    if (folder / "state.json").is_file():
        return canonical(read_saved(folder), str(folder), folder, reading)
    tree = walk(folder, reading)
    if reading.pictures_only and tree.pictures and not (reading.named[0] or reading.id_column):
        return _from_pictures(tree, reading)
    if metadata := [table for table in tree.tables if table.stem == "metadata"]:
        return _from_tables(metadata, tree, reading)
    if samples := _samples(tree, reading):
        _pass_over(tree, "pictures", reading)
        _refuse(tree, reading, last=True)
        return from_samples(samples, str(folder), reading)
    has_classes = len({tree.part(picture) for picture in tree.pictures} - {None}) > 1
    if has_classes:
        _pass_over(tree, "classes", reading)
    elif tree.shards:
        _refuse(tree, reading, last=True)
        _count(_OTHER, chain(tree.pictures, tree.tables, tree.texts, tree.others), reading)
        return from_samples(read_samples(tree.shards, reading), str(folder), reading)
    is_table = tree.tables and not has_classes
    return _from_tables(tree.tables, tree, reading) if is_table else _from_class_folders(tree, reading)


def _count(kind: str, files: Iterable[Path], reading: Reading) -> None:
    for file in files:
        reading.leave_out(kind, str(file))


def _pass_over(tree: Tree, what: str, reading: Reading) -> None:
    """Tables and shards that stand beside the pictures; one that may be what is meant is refused."""
    for table in tree.tables:
        if lists_pictures(table, reading):
            has = "class folders" if what == "classes" else "texts beside its pictures"
            raise ValueError(
                f"{tree.folder}: has {has}, and {table.relative_to(tree.folder)}, which lists pictures too: give the "
                "file itself, or move it away"
            )
    _count(f"table beside the {what}", tree.tables, reading)
    _count(f"shard beside the {what}", tree.shards, reading)
    _count(_OTHER, tree.others, reading)


def _refuse(tree: Tree, reading: Reading, *, last: bool = False) -> None:
    """The faults of a folder, each a bad row; ``last``: behind the good ones, which are not the folder's pictures."""
    for fault in tree.faults:
        reading.so_far = sys.maxsize if last else fault.before
        with reading.row():
            raise fault.error
    reading.so_far = 0


# ---- pictures alone ----


def _from_pictures(tree: Tree, reading: Reading) -> datasets.Dataset:
    """Each picture; its id is its path in the folder."""
    if holding := [*tree.shards, *(table for table in tree.tables if _holds_pictures(table, reading))]:
        raise ValueError(
            f"{tree.folder}: has pictures, and {holding[0].relative_to(tree.folder)}, which holds pictures too: give "
            "the one or the other, or move it away"
        )
    _refuse(tree, reading)
    _count("table beside the pictures", tree.tables, reading)
    _count(_OTHER, chain(tree.texts, tree.others), reading)
    paths, above = tree.pictures.texts, len(str(tree.folder / "x")) - 1
    reading.places = Each(paths)
    return dataset_of_paths(paths, Texts(path[above:] for path in paths))


def from_picture_files(files: Sequence[Path], where: str, reading: Reading) -> datasets.Dataset:
    """Pictures as they are given, each by its path."""
    tree, kinds = Tree(Path(where)), dict.fromkeys(picture_endings(), "pictures")
    for file in files:
        _sort_in(tree, file, kinds, file.is_file())
    _refuse(tree, reading)
    _count(_OTHER, tree.others, reading)
    if not tree.pictures:
        raise ValueError(f"{where}: expected at least one picture that can be used, found none")
    names = tree.pictures.texts
    reading.places = Each(names)
    return dataset_of_paths(Texts(map(os.path.realpath, names)), names)


def _holds_pictures(table: Path, reading: Reading) -> bool:
    """Whether a table has pictures in it, not beside it."""
    try:
        return table.suffix.lower() == ".parquet" and not holds_paths(features_of_parquet(table), str(table), reading)
    except ValueError:  # damaged, or without pictures
        return False


# ---- tables ----


def _from_tables(tables: Sequence[Path], tree: Tree, reading: Reading) -> datasets.Dataset:
    """The rows of tables; pictures that none of them lists are counted."""
    reading.listed = array("q")
    dataset = from_files(tables, reading)
    files = sorted(chain(tree.pictures.texts, (str(fault.file) for fault in tree.faults)))
    hashes = np.fromiter((hash(os.path.realpath(file)) for file in files), np.int64, len(files))
    for place in np.flatnonzero(~np.isin(hashes, reading.listed)):
        reading.leave_out(_UNLISTED, files[place])
    _count(_OTHER, sorted({*tree.tables, *tree.shards} - {*tables}), reading)
    return dataset


# ---- pictures with texts beside them ----


def _samples(tree: Tree, reading: Reading) -> list[Sample]:
    """The pictures with what stands beside them, if texts stand beside most; else none."""
    if not tree.pictures:
        return []
    texts: dict[Path, list[Path]] = {}
    for text in tree.texts:
        texts.setdefault(text.with_suffix(""), []).append(text)
    beside = {picture: texts.get(picture.with_suffix(""), []) for picture in tree.pictures}
    written = sum(any(text.suffix.lower() != ".json" for text in own) for own in beside.values())
    objects = [text for own in beside.values() for text in own if text.suffix.lower() == ".json"]
    if 2 * sum(map(bool, beside.values())) < len(beside) or not (
        2 * written >= len(beside) or any(_says_something(text, reading) for text in objects[:_LOOKED_AT])
    ):
        return []
    stems = {file.with_suffix("") for file in (*tree.pictures, *(fault.file for fault in tree.faults))}
    _count("text without a picture", [text for text in tree.texts if text.with_suffix("") not in stems], reading)
    return [_sample(picture, own, reading) for picture, own in beside.items()]


def _says_something(text: Path, reading: Reading) -> bool:
    sample = _sample(Path(), [text], reading)
    named = reading.named[1:]
    return sample.fault is None and any(name in sample.said for name in (*named, *CAPTION_COLUMNS, *LABEL_COLUMNS))


def _sample(picture: Path, texts: Sequence[Path], reading: Reading) -> Sample:
    sample = Sample(str(picture), {picture.suffix.lower()[1:]: Address(picture)})
    for text in texts:
        try:
            check_text_size(text.stat().st_size, str(text))
            sample.add_text(text.suffix.lower()[1:], text.read_bytes(), str(text), reading.encoding)
        except BadRowError as error:
            sample.fault = sample.fault or error
    return sample


# ---- class folders ----


def _from_class_folders(tree: Tree, reading: Reading) -> datasets.Dataset:
    """A class for each sub-folder, by its name."""
    folder = tree.folder
    if reading.pictures_only:
        raise ValueError(f"{folder}: expected pictures in it or below, or tables or shards of them, found none")
    if reading.attributes:
        raise ValueError(f"attribute_columns: {folder} has class folders and no columns; give a table")
    pictures: dict[str, list[Path]] = {name: [] for name in tree.folders}
    for picture in tree.pictures:
        name = tree.part(picture)
        if name is None:
            reading.leave_out(_NO_CLASS, str(picture))
        else:
            pictures[name].append(picture)
    _refuse(tree, reading)
    _count(_OTHER, tree.texts, reading)
    classes = {name: own for name, own in pictures.items() if own}
    empty = [name for name in pictures if name not in classes]
    if len(classes) < 2 or (empty and not reading.skip):
        raise ValueError(
            f"{folder}: expected one sub-folder a class, two or more, with pictures in each; found "
            + (f"no pictures in {', '.join(empty[:5])}" if empty else f"{len(classes)} sub-folders")
            + (f"; give {folder / next(iter(classes))} itself?" if len(classes) == 1 else "")
            + "; for captions a text beside each picture (1.jpg, 1.txt), or the .csv, .tsv, .jsonl or .parquet file"
        )
    for name in empty:
        reading.leave_out(_EMPTY, str(folder / name), f"{folder / name}: no pictures in it")
    places = [str(path) for own in classes.values() for path in own]
    reading.places = Each(places)
    features = datasets.Features({"image": Picture(), "label": datasets.ClassLabel(names=list(classes))})
    labels = [number for number, own in enumerate(classes.values()) for _ in own]
    return datasets.Dataset.from_dict({"image": places, "label": labels}, features=features)
