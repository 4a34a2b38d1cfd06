"""The splits of a data set: which it has, and which is read.

A folder is splits if all its sub-folders are named among train, val, valid, validation and test, and train is there
(else sub-folders are classes); if ``DatasetDict.save_to_disk`` wrote it; or if its tables are named as splits are,
``test.csv`` or ``test-00000-of-00002.parquet``, in it or in ``data``. Nothing else of a name is guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from clipft.errors import short
from clipft.files import expanded, is_own_name, read_json

__all__ = [
    "TABLE_ENDINGS",
    "TEST",
    "TRAIN",
    "chosen_split",
    "existing",
    "hidden",
    "names_of_splits",
    "sources_of_splits",
    "split_of_name",
    "test_splits",
    "visible",
]

TRAIN, TEST = "train", "test"
_VALIDATION = ("val", "valid", "validation")
_SPLITS = (TRAIN, *_VALIDATION, TEST)
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
_OF_SYSTEMS = {"__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "lost+found"}
_OF_SYSTEMS |= {"$recycle.bin", "system volume information"}
_SHARD = re.compile(r"(?P<split>\w[\w.]*)-\d{5}-of-\d{5}")
_NAME_AND_SPLIT = re.compile(r"(?P<name>.+):(?P<split>\w[\w.+-]*(\[.*\])?)", re.DOTALL)
_OF_A_SPLIT = re.compile(rf"(?:^|[^a-z])(?:{'|'.join(_SPLITS)}|dev|eval)(?:$|[^a-z])")


# ---- names ----


def existing(source: str | Path) -> Path | None:
    """The file or folder that a source is, if there is one."""
    try:
        path = expanded(source)
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, a NUL byte
        return None


def split_of_name(source: str | Path) -> tuple[str | Path, str | None]:
    """The source and the split of ``NAME:split``; a path that exists has none in its name."""
    match = _NAME_AND_SPLIT.fullmatch(str(source))
    return (source, None) if match is None or existing(source) else (match["name"], match["split"])


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, but for hidden entries and those that systems leave."""
    return sorted(entry for entry in folder.iterdir() if not hidden(entry.name))


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that systems leave."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


# ---- which there are ----


def sources_of_splits(folder: Path) -> dict[str, list[Path]] | None:
    """By split, the folder or the tables that it is; None for a folder without splits.

    Raises:
        ValueError: names of splits that contradict each other.
    """
    if (folder / "dataset_dict.json").is_file():
        return {name: [folder / name] for name in _saved_splits(folder)}
    entries = visible(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    tables = [entry for entry in entries if entry.suffix.lower() in TABLE_ENDINGS]
    names = {entry.name for entry in folders}
    if TRAIN in names and names <= set(_SPLITS):
        if any(table.stem == "metadata" for table in tables):
            raise ValueError(
                f"{folder}: has {', '.join(sorted(names))} and a metadata file for all of them: give the file itself, "
                "or put one into each of these"
            )
        return {entry.name: [entry] for entry in folders}
    if not tables and names == {"data"}:
        tables = [entry for entry in visible(folder / "data") if entry.suffix.lower() in TABLE_ENDINGS]
    found: dict[str, list[Path]] = {}
    for table in tables:
        shard = _SHARD.fullmatch(table.stem)
        found.setdefault(shard["split"] if shard else table.stem, []).append(table)
    odd = [
        name for name, own in found.items() if name not in _SPLITS and not all(_SHARD.fullmatch(t.stem) for t in own)
    ]
    if found and not odd:
        return found
    if len(tables) > 1 and (seeming := [table.name for table in tables if _OF_A_SPLIT.search(table.stem.lower())]):
        raise ValueError(
            f"{folder}: {', '.join(seeming[:5])} may be a split each; give one of {len(tables)} files, or name them as "
            "splits are: train.csv, val.csv, test.csv"
        )
    return None


def _saved_splits(folder: Path) -> list[str]:
    try:
        names = [str(name) for name in read_json(folder / "dataset_dict.json")["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'dataset_dict.json'}: expected the names of splits ({error})") from error
    if not all(map(is_own_name, names)):
        raise ValueError(f"{folder / 'dataset_dict.json'}: names splits outside of its folder, {short(names)}")
    return names


def names_of_splits(source: str | Path) -> list[str]:
    """The splits of a source, a data set by name too; none where it has none, or nobody knows."""
    name, split = split_of_name(source)
    path = existing(name)
    if split is not None:
        return []
    if path is not None:
        return list(sources_of_splits(path) or ()) if path.is_dir() else []
    if re.search(r"[*?{]|\.\w+$", str(name)):  # shards, or a file that is not there
        return []
    try:
        return list(datasets.get_dataset_split_names(str(name)))
    except Exception:  # loading it says what is wrong with it
        return []


# ---- which is read ----


def chosen_split(names: Iterable[str], asked: str | None, purpose: str, where: str) -> str:
    """The split to read, of those that there are.

    Args:
        names: of the splits.
        asked: by the user.
        purpose: ``"train"`` reads train; ``"test"`` the test set, else the validation set, and train only where it is
            all there is; ``"all"`` any single one.

    Raises:
        ValueError: there is no such split, or several that may be meant.
    """
    names = list(names)
    if asked is not None:
        if asked not in names:
            raise ValueError(f"split: expected one of {', '.join(names)} of {where}, got {asked!r}")
        return asked
    if len(names) == 1:
        return names[0]
    wanted = {"train": [TRAIN], "test": test_splits(names)[:1], "all": []}[purpose]
    if wanted and wanted[0] in names:
        return wanted[0]
    raise ValueError(f"split: expected one of {', '.join(names)} of {where}: name it, as {where}:{names[0]}")


def test_splits(names: Sequence[str]) -> list[str]:
    """The test set and the validation set among these splits: of one alone, it is the test set.

    Raises:
        ValueError: several names of a validation set.
    """
    found = [name for name in names if name in _VALIDATION]
    if len(found) > 1:
        raise ValueError(f"split: {' and '.join(found)} are both names of a validation set; expected one of them")
    return [name for name in (TEST, *found) if name in names]
