"""Many texts in little more memory than their letters: sources of millions of rows are read into these."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import datasets
import pyarrow as pa

__all__ = ["Each", "Lazy", "Paths", "RowNames", "Texts", "row_name", "texts_of"]

T = TypeVar("T")
_CHUNK = 1024  # texts


class Texts(Sequence[str]):
    """Texts that grow at their end, kept as Arrow keeps them; names of files that are no UTF-8 among them."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._chunks: list[pa.Array] = []
        self._starts: list[int] = []  # of the chunks
        self._tail: list[bytes] = []
        self._whole = 0  # texts in chunks
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one."""
        self._tail.append(text.encode(errors="surrogateescape"))
        if len(self._tail) == _CHUNK:
            self._add(pa.array(self._tail, pa.binary()))
            self._tail = []

    def _add(self, chunk: pa.Array) -> None:
        self._chunks.append(chunk)
        self._starts.append(self._whole)
        self._whole += len(chunk)

    def __len__(self) -> int:
        return self._whole + len(self._tail)

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[own] for own in number]
        if number >= self._whole:
            return _text(self._tail[number - self._whole])
        chunk = bisect_right(self._starts, number) - 1
        return _text(self._chunks[chunk][number - self._starts[chunk]].as_py())

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            for start in range(0, len(chunk), _CHUNK):
                yield from map(_text, chunk[start : start + _CHUNK].to_pylist())
        yield from map(_text, self._tail)

    def arrow(self) -> pa.ChunkedArray:
        """As a column of ``string``, all but the last of the texts where they are."""
        tail = [pa.array(self._tail, pa.binary())] if self._tail else []
        return pa.chunked_array([*self._chunks, *tail], pa.binary()).cast(pa.string())


def _text(value: bytes) -> str:
    return value.decode(errors="surrogateescape")


def texts_of(dataset: datasets.Dataset, column: str) -> Texts:
    """A column of ``string``, where it is."""
    found = Texts()
    for chunk in dataset.select_columns(column).with_format("arrow")[:].column(column).cast(pa.binary()).chunks:
        found._add(chunk)
    return found


class Paths(Sequence[Path]):
    """Paths, of which ``texts`` are kept."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self.texts = Texts(map(str, paths))

    def append(self, path: Path) -> None:
        """Add one."""
        self.texts.append(str(path))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        found = self.texts[index]
        return Path(found) if isinstance(found, str) else [Path(own) for own in found]

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts)


class Lazy(Sequence[T], Generic[T]):
    """What a function makes of numbers, each when it is asked for."""

    def __init__(self, make: Callable[[int], T], numbers: Sequence[int]) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self._numbers[index]
        return self._make(found) if isinstance(found, int) else Lazy(self._make, found)


class Each(Sequence[Sequence[str]]):
    """Of each of these names a list that holds it alone."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        found = self.names[index]
        return [found] if isinstance(found, str) else Each(found)

    def select(self, rows: Sequence[int]) -> Each:
        """Those with these numbers."""
        return Each(Lazy(self.names.__getitem__, array("q", rows)))


class RowNames(Sequence[str]):
    """Names of rows of files, ``FILE, row 3``, that grow at their end."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._which, self._numbers = array("l"), array("q")

    def append(self, file: str, number: int) -> None:
        """Add a row; those of a file come one after the other."""
        if self._files[-1:] != [file]:
            self._files.append(file)
        self._which.append(len(self._files) - 1)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[index]
        if isinstance(number, range):
            return [self[own] for own in number]
        return row_name(self._files[self._which[number]], self._numbers[number])


def row_name(file: str, number: int) -> str:
    """What a row is called, wherever it is named."""
    return f"{file}, row {number}"
