"""Files of tables, one or several as one: text, or Parquet with paths or with the pictures themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets

from clipft.data.columns import find_columns
from clipft.data.reading import Reading
from clipft.data.splits import TABLE_ENDINGS
from clipft.data.stored import canonical, features_of_parquet, holds_paths, read_parquet
from clipft.data.tables import from_table_rows
from clipft.data.text_tables import read_csv, read_jsonl
from clipft.files import check_file

__all__ = ["from_files", "lists_pictures"]

_PARQUET = ".parquet"


def from_files(paths: Sequence[Path], reading: Reading) -> datasets.Dataset:
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
    check_file(path)
    if path.suffix.lower() != _PARQUET:
        return list(_text_rows(path, reading))
    dataset = read_parquet(path)
    return list(enumerate(dataset.to_list())) if holds_paths(dataset.features, str(path), reading) else dataset


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
