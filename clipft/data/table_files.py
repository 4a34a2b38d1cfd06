"""Files of tables, one or several as one: text, or Parquet with paths or with the pictures themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from clipft.data.columns import find_columns
from clipft.data.compact import RowNames
from clipft.data.reading import Reading
from clipft.data.splits import TABLE_ENDINGS
from clipft.data.stored import canonical, features_of_parquet, holds_paths, read_parquet, rows_of_parquet
from clipft.data.tables import from_table_rows
from clipft.data.text_tables import read_csv, read_jsonl
from clipft.files import check_file

__all__ = ["from_files", "lists_pictures"]

_PARQUET = ".parquet"


def from_files(paths: Sequence[Path], reading: Reading) -> datasets.Dataset:
    """The rows of files of one kind, one after the other."""
    where = str(paths[0]) if len(paths) == 1 else str(reading.source)
    stored = []
    for path in paths:
        check_file(path)
        if path.suffix.lower() == _PARQUET and not holds_paths(features_of_parquet(path), str(path), reading):
            stored.append(path)
    if not stored:
        rows = ((path, *row) for path in paths for row in _rows_with_paths(path, reading))
        return from_table_rows(rows, where, reading)
    found = [read_parquet(path) for path in stored]
    columns = [sorted(rows.column_names) for rows in found]
    if len(stored) < len(paths) or any(own != columns[0] for own in columns):
        raise ValueError(f"{where}: expected files with the same columns, got {', '.join(path.name for path in paths)}")
    places = RowNames()
    for path, own in zip(paths, found, strict=True):
        for row in range(len(own)):
            places.append(str(path), row)
    rows = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
    return canonical(rows, where, paths[0].parent, reading, places)


def _rows_with_paths(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, as they are asked for."""
    return enumerate(rows_of_parquet(path)) if path.suffix.lower() == _PARQUET else _text_rows(path, reading)


def _text_rows(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return read_csv(path, "\t" if suffix == ".tsv" else ",", reading)
    if suffix == ".jsonl":
        return read_jsonl(path, reading)
    known = ", ".join((*TABLE_ENDINGS, ".tar"))
    raise ValueError(f"{path}: expected a file ending in {known}, got {suffix or 'no ending'!r}")


def lists_pictures(table: Path, reading: Reading) -> bool:
    """Whether a file has the columns that a data set needs, by its first row."""
    try:
        check_file(table)
        if table.suffix.lower() == _PARQUET:
            names = list(features_of_parquet(table))
        else:
            _, row = next(_text_rows(table, Reading(encoding=reading.encoding, skip=True)), (0, {}))
            names = list(row)
        find_columns(names, str(table), reading.named, reading.pictures_only)
    except (ValueError, OSError):
        return False
    return True
