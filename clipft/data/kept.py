"""Pictures in the order of their source, none of them left out: one that cannot be used keeps its place, and is an
error when its turn comes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from clipft.data.compact import Lazy, texts_of
from clipft.data.objects import as_row, as_rows, rows_of_pandas
from clipft.data.reading import BadRowError, Reading
from clipft.data.rows import stored_images, stored_pictures
from clipft.errors import shown

__all__ = ["KeptRows", "kept_rows", "rows_of_objects"]


class KeptRows:
    """Rows by index: a dictionary with ``image``, or a :class:`BadRowError`.

    Args:
        rows: those that can be used: a data set with ``image``, or pictures and paths.
        names: what each of them is called, by index.
        faults: by place among all rows, the name of one that cannot be used, and why.
    """

    def __init__(self, rows: Any, names: Any, faults: dict[int, tuple[str, str]]) -> None:
        self._rows, self._names, self._faults = rows, names, faults
        self._bad = sorted(faults)

    def __len__(self) -> int:
        return len(self._rows) + len(self._bad)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row in self._faults:
            name, why = self._faults[row]
            raise BadRowError(name, why)
        found = self._rows[self._place(row)]
        return {"image": found["image"]} if isinstance(found, dict) else as_row({"image": found}, f"row {row}")

    def name(self, row: int) -> str:
        """What a row is called."""
        return self._faults[row][0] if row in self._faults else str(self._names[self._place(row)])

    def fault(self, row: int) -> str | None:
        """Why a row cannot be used, as far as that is known."""
        return self._faults[row][1] if row in self._faults else None

    def stored(self) -> Iterator[Any]:
        """Of each row the picture as it is stored, of a bad one nothing."""
        images = stored_images(self._rows)
        for row in range(len(self)):
            yield None if row in self._faults else next(images)

    def _place(self, row: int) -> int:
        return row - bisect_left(self._bad, row)


def kept_rows(rows: Any, reading: Reading) -> KeptRows:
    """The rows that :func:`clipft.data.sources.read_pairs` gave of pictures alone, and those that it left out."""
    faults: dict[int, tuple[str, str]] = {}
    for number, fault in enumerate(sorted(reading.faults, key=lambda fault: fault.row)):
        why = fault.message.removeprefix(f"{shown(fault.place)}: ")
        faults[min(fault.row, len(rows)) + number] = (reading.shortened(fault.place), why)
    return KeptRows(stored_pictures(rows), texts_of(rows, "id"), faults)


def rows_of_objects(data: Any) -> KeptRows:
    """What a program holds: a picture or several, paths, or a data set whose rows have ``image``."""
    if isinstance(data, Image.Image) or hasattr(data, "__array_interface__"):
        data = [data]
    data = rows_of_pandas(data)
    if isinstance(data, (list, tuple)) and not (data and isinstance(data[0], (dict, tuple, list))):
        pictures = [Path(one).absolute() if isinstance(one, (str, Path)) else one for one in data]
        names = [str(one) if isinstance(one, (str, Path)) else f"row {row}" for row, one in enumerate(data)]
        return KeptRows(pictures, names, {})
    rows = as_rows(data)
    return KeptRows(stored_pictures(rows) or rows, Lazy("row {}".format, range(len(rows))), {})
