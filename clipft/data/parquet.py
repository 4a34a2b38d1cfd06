"""Parquet files of strangers, which may be small and hold gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

__all__ = ["batches", "read_table"]

_ROWS = 4096  # that are unpacked at a time
_SWELLS, _ALWAYS = 200, 100 << 20  # times that rows may be more than their file, and bytes that they may be in any case


def read_table(path: Path) -> pyarrow.Table:
    """All of a file, in memory.

    Raises:
        ValueError: its rows are far more than the file. pyarrow's own errors: it is damaged.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        return pyarrow.Table.from_batches(batches(file, path.stat().st_size), file.schema_arrow)


def batches(file: pyarrow.parquet.ParquetFile, packed: int) -> Iterator[pyarrow.RecordBatch]:
    """The rows, a few at a time, until they are far more than a file of ``packed`` bytes has of its own accord."""
    most, rows, size = max(_SWELLS * packed, _ALWAYS), 0, 0
    if file.metadata.num_rows > most:
        raise ValueError(f"{file.metadata.num_rows} rows in {packed} bytes")
    for batch in file.iter_batches(_ROWS):
        batch.validate(full=True)  # texts that are none, which whoever reads a row would find
        rows, size = rows + len(batch), size + batch.nbytes
        if size > most:
            raise ValueError(f"more than {most >> 20} MB in {rows} rows of a file of {packed} bytes")
        yield batch
