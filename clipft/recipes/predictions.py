"""What ``clipft.predict`` gives: rows in a file, read from there, and the formats of such files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from clipft.files import check_output, writing

__all__ = ["UNKNOWN", "Predictions", "check_table", "schema_of", "write_tables"]

UNKNOWN = "unknown"  # the class of a picture that no class is sure enough of
_GROUP = 1 << 14  # rows of a Parquet row group
_NAMED = 5  # pictures that cannot be read


@dataclass
class Predictions:
    """Rows of pictures with their classes, in the order in which the pictures came; iterating gives dictionaries.

    A row has ``image``, ``class`` and ``probability``; where several heads were asked, a picture has a row for each, of
    ``head``; with ``top`` also ``class_2``, ``probability_2``, ...; and ``error``, why a picture could not be read,
    else None. Rows are read from the file as they are asked for: any number of them takes no memory.

    Attributes:
        path: the file.
        classes: that were chosen from, by head; ``zero_shot`` where they were told by their names.
        thresholds: the least probabilities, by head.
        counts: pictures by (head, class); ``unknown`` is one.
        errors: how many pictures could not be read; ``first_errors``: the first of their names.
        rows: of the file.
    """

    path: Path
    classes: dict[str, tuple[str, ...]]
    thresholds: dict[str, float]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter, repr=False)
    errors: int = 0
    first_errors: list[str] = field(default_factory=list, repr=False)
    rows: int = 0
    _schema: pa.Schema = field(default=None, repr=False)
    _temporary: Any = field(default=None, repr=False)  # the folder, where nobody named a file

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in _READERS[self.path.suffix](self.path, self._schema):
            yield from batch.to_pylist()

    def count(self, table: pa.Table, written: int) -> None:
        """Take rows with ``row``, a picture's number, into account, of which so many are written."""
        only = [next(iter(self.classes))] * len(table)
        heads = table["head"].to_pylist() if "head" in table.column_names else only
        classes = table["class"].to_pylist()
        self.counts.update((head, own) for head, own in zip(heads, classes, strict=True) if own is not None)
        bad = table.filter(pc.is_valid(table["error"]))
        names = dict(zip(bad["row"].to_pylist(), bad["image"].to_pylist(), strict=True))
        self.errors += len(names)
        self.first_errors += list(names.values())[: _NAMED - len(self.first_errors)]
        self.rows += written

    def to_table(self) -> pa.Table:
        """All rows as a ``pyarrow.Table``: ``.to_pandas()`` makes a frame of it."""
        return pa.Table.from_batches(list(_READERS[self.path.suffix](self.path, self._schema)), self._schema)


def schema_of(top: int, several: bool) -> pa.Schema:
    """The columns, by how many classes a row has and whether there are several heads."""
    fields = [("image", pa.string()), *([("head", pa.string())] if several else [])]
    for place in range(1, top + 1):
        suffix = "" if place == 1 else f"_{place}"
        fields += [(f"class{suffix}", pa.string()), (f"probability{suffix}", pa.float32())]
    return pa.schema([*fields, ("error", pa.string())])


def check_table(output: str | Path | None) -> None:
    """That a table can be written there.

    Raises:
        ValueError: a file of another kind. OSError: it cannot be written.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix not in _WRITERS:
        raise ValueError(f"output: expected a name that ends in {', '.join(_WRITERS)}, got {path.name!r}")
    check_output(path)


# ---- files ----

Write = Callable[[pa.Table], None]


@contextmanager
def write_tables(path: Path, schema: pa.Schema) -> Iterator[Write]:
    """Yields a function that adds rows to a file, which is there when the block ends without an error."""
    with writing(path) as staged, _WRITERS[path.suffix](staged, schema) as write:
        yield write


@contextmanager
def _to_csv(path: Path, schema: pa.Schema) -> Iterator[Write]:
    with pyarrow.csv.CSVWriter(path, schema) as writer:
        yield writer.write_table


@contextmanager
def _to_jsonl(path: Path, schema: pa.Schema) -> Iterator[Write]:
    floats = [name for name in schema.names if schema.field(name).type == pa.float32()]
    with path.open("w", encoding="utf-8") as file:

        def write(table: pa.Table) -> None:
            for row in table.to_pylist():
                short = {name: row[name] and float(str(np.float32(row[name]))) for name in floats}
                file.write(json.dumps(row | short, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def _to_parquet(path: Path, schema: pa.Schema) -> Iterator[Write]:
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(path, schema) as writer:

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if sum(map(len, waiting)) >= _GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()

        yield write
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _from_csv(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    types = pyarrow.csv.ConvertOptions(
        column_types=schema, include_columns=schema.names, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse, convert_options=types) as reader:
        yield from reader


def _from_jsonl(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == 1024:
                yield pa.RecordBatch.from_pylist(rows, schema)
                rows = []
    yield pa.RecordBatch.from_pylist(rows, schema)


def _from_parquet(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(columns=schema.names)


_WRITERS: Mapping[str, Callable[[Path, pa.Schema], AbstractContextManager[Write]]] = {
    ".csv": _to_csv,
    ".jsonl": _to_jsonl,
    ".parquet": _to_parquet,
}
_READERS: Mapping[str, Callable[[Path, pa.Schema], Iterator[pa.RecordBatch]]] = {
    ".csv": _from_csv,
    ".jsonl": _from_jsonl,
    ".parquet": _from_parquet,
}
