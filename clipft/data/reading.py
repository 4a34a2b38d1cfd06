"""How a data set is read, and the account of it: what was given, what was read, what was left out and why.

Whoever reads a source counts here, each row or file that is given once; what is not left out was read. ``kind`` reads
after a number (``"hidden"``, ``".heic (install pillow-heif)"``), ``name`` is a place in the source (``"cat/7.jpg"``,
``"row 3"``; with the source before it, it is shortened):

- ``reading.leave_out(kind, name)``: a file that is no row, whatever the user says;
- ``with reading.row():`` around the work on a row: a :class:`BadRowError`, or any other ValueError or OSError, is
  raised or, with ``skip``, left out and named;
- ``reading.places``: for each row of the result, the rows or files of the source that are in it;
- ``reading.so_far``, where rows are pictures alone: counts them as they are found, so that a bad one has its place.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clipft.data.compact import Each, Lazy, row_name
from clipft.errors import shown

__all__ = ["HIDDEN", "NO_FILE", "NO_REGULAR_FILE", "UNREADABLE_KIND", "BadRowError", "Fault", "Reading"]

UNREADABLE_KIND = "unreadable"
_UNUSABLE, NO_FILE = "unusable", "without its file"
HIDDEN, NO_REGULAR_FILE = "hidden", "no regular file"
_SHOWN = 5  # bad rows that a message names


class BadRowError(ValueError):
    """A row that cannot be used: ``place`` names source and row, ``kind`` says what it lacks after a number."""

    def __init__(self, place: str, why: str, kind: str = _UNUSABLE) -> None:
        super().__init__(shown(f"{place}: {why}"))
        self.place, self.kind = place, kind


class Fault(NamedTuple):
    """A row that could not be used: how many of the result stand before it, where it is, and the message."""

    row: int
    place: str
    message: str


@dataclass
class Reading:
    """How a data set is read, and what was left out.

    Attributes:
        named: the columns of image, caption and label, where given.
        skip: leave bad rows out.
        allow_outside: let paths leave the file's folder.
        attributes: columns kept beside these.
        pictures_only: rows are pictures with an ``id`` and nothing else, one for each row of the source.
        id_column: where ids are; default: the picture's path, else ``SOURCE:ROW``.
        source: what is read, as it was given.
        encoding: of text files, where it is not UTF-8.
        split: which split of it was read, if it has several.
        skipped: why each bad row was left out.
        left_out: by kind, the places of rows and files that are not in the result.
        faults: the rows that could not be used, in the order in which they were met.
        so_far: rows of the result that were found.
        listed: hashes of the paths of picture files that tables name, for who asks.
        places: for each row of the result, where its rows come from; empty where nobody says.
    """

    named: Sequence[str | None] = (None, None, None)
    skip: bool = False
    allow_outside: bool = False
    attributes: Sequence[str] = ()
    encoding: str | None = None
    pictures_only: bool = False
    id_column: str | None = None
    source: str = ""
    split: str | None = None
    skipped: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    places: Sequence[Sequence[str]] = ()
    faults: list[Fault] = field(default_factory=list)
    so_far: int = 0
    listed: array[int] | None = None
    _rows: int = 0  # of the result, where there are no places
    _folders: dict[Path, str] = field(default_factory=dict)
    _bad: set[str] = field(default_factory=set)  # kinds of bad rows, which are named

    def real_folder(self, folder: Path) -> str:
        """What the paths of files in a folder begin with, links followed; looked up once."""
        if folder not in self._folders:
            self._folders[folder] = f"{os.path.realpath(folder).rstrip('/')}/"
        return self._folders[folder]

    # ---- counting ----

    def leave_out(self, kind: str, name: str, why: str = "") -> None:
        """Count one file or row that is not in the result; ``why``, of a bad row, is a message of its own."""
        self.left_out.setdefault(kind, []).append(self.shortened(name))
        if why:
            self.skipped.append(why)
            self._bad.add(kind)

    @contextmanager
    def row(self, place: str = "") -> Iterator[None]:
        """Around the work on one row: what is wrong with it is raised or, with ``skip``, noted. ``place``: where that
        is not what the error says.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            if not self.skip:
                raise
            message = str(error)
            own = place or (error.place if isinstance(error, BadRowError) else message.partition(": ")[0])
            self.faults.append(Fault(self.so_far, own, message))
            if isinstance(error, BadRowError):
                self.leave_out(error.kind, error.place, message)
            else:
                kind = NO_FILE if isinstance(error, FileNotFoundError) else _UNUSABLE
                self.leave_out(kind, message.partition(": ")[0], message)

    def place(self, row: int) -> str:
        """Where a row of the result comes from, for messages: its first place."""
        return self.places[row][0] if self.places else row_name(self.source, row)

    def leave_out_row(self, row: int, kind: str, why: str) -> None:
        """Count a row of the result so far that is to go (:meth:`keep`): all rows of the source that are in it."""
        first, *others = self.places[row] if self.places else [self.place(row)]
        self.leave_out(kind, first, why)
        for place in others:
            self.leave_out(kind, place)

    def keep(self, rows: Sequence[int]) -> None:
        """Of the result so far, these rows alone."""
        if not self.places:
            self.places = Each(Lazy(partial(row_name, self.source), array("q", rows)))
        elif isinstance(self.places, Each):
            self.places = self.places.select(rows)
        else:
            self.places = [self.places[row] for row in rows]

    def finish(self, rows: int) -> None:
        """The result has so many rows."""
        self._rows = rows

    # ---- the account ----

    @property
    def read(self) -> int:
        """Rows and files of the source that are in the result."""
        one_each = not self.places or isinstance(self.places, Each)
        return len(self.places) or self._rows if one_each else sum(map(len, self.places))

    @property
    def given(self) -> int:
        """Rows and files that were there."""
        return self.read + sum(map(len, self.left_out.values()))

    def line(self) -> str:
        """The account, bad rows last and with the first of their names, in a line without a stranger's escapes:
        ``read 118 of 131: 9 .heic (install pillow-heif), 3 hidden, 1 unreadable: cat/7.jpg``.
        """
        parts = []
        for kind, names in sorted(self.left_out.items(), key=lambda entry: (entry[0] in self._bad, -len(entry[1]))):
            first = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            parts.append(f"{len(names)} {kind}" + (f": {first}" if kind in self._bad else ""))
        split = f"split {self.split}, " if self.split else ""
        return shown(f"{split}read {self.read} of {self.given}" + (": " if parts else "") + ", ".join(parts))

    def to_json(self) -> dict[str, Any]:
        """The same for report.json, with all names."""
        return {
            "source": self.source,
            "split": self.split,
            "given": self.given,
            "read": self.read,
            "line": self.line(),
            "left_out": {kind: {"count": len(names), "names": names} for kind, names in self.left_out.items()},
        }

    def summary(self) -> str:
        """One line for the user: which bad rows were left out, and why."""
        reasons = "; ".join(self.skipped[:_SHOWN]) + ("; ..." if len(self.skipped) > _SHOWN else "")
        return shown(f"{self.source}: left out {len(self.skipped)} of {self.given} rows: {reasons}")

    def shortened(self, name: str) -> str:
        """A place without the source before it."""
        return name.removeprefix(f"{self.source}, ").removeprefix(f"{self.source.rstrip('/')}/")
