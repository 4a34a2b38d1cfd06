"""The contact sheet of ``clipft predict``: of each class the pictures that the model is least certain of."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from clipft.data.kept import KeptRows
from clipft.data.pictures import UNREADABLE, EncodedPicture, open_picture
from clipft.data.rows import class_text, read_stored

__all__ = ["LeastCertain"]

_PICTURES, _CLASSES = 8, 40  # of a class, and classes of a sheet


class LeastCertain:
    """Goes through rows, and keeps few of each class.

    Args:
        classes: by head.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        self._heads = list(classes)
        self._kept: dict[tuple[str, str], list[tuple[float, int, str]]] = {}  # heaps, the most certain first

    def look(self, table: pa.Table) -> None:
        """At rows with ``row``, a picture's number."""
        names = ["row", "image", "class", "probability"]
        heads = table["head"].to_pylist() if "head" in table.column_names else self._heads[:1] * len(table)
        for head, *row in zip(heads, *(table[name].to_pylist() for name in names), strict=True):
            number, image, own, probability = row
            if own is None:
                continue
            heap = self._kept.setdefault((head, own), [])
            (heapq.heappush if len(heap) < _PICTURES else heapq.heappushpop)(heap, (-probability, -number, image))

    def draw(self, path: Path, rows: KeptRows, counts: Counter[tuple[str, str]], console: Console) -> None:
        """A row a class, the classes with most pictures first; ``counts``: of them, by (head, class)."""
        try:
            from clipft.report.sheet import Row, draw_sheet
        except ImportError as error:
            raise ImportError(f"the sheet needs {error.name}: pip install 'clipft[search]'") from error

        if not self._kept:
            console.print("no sheet: no picture could be read")
            return
        order = [key for key, _ in counts.most_common()]
        several = len(self._heads) > 1
        sheet = []
        for head, own in order[:_CLASSES]:
            title = f"{f'{class_text(head)}: ' if several else ''}{class_text(own)} ({counts[head, own]})"
            hits = [
                (name, -less, _picture(rows, -number)) for less, number, name in sorted(self._kept[head, own])[::-1]
            ]
            sheet.append(Row(title, hits, quoted=False))
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(path, sheet)
        left = f", of {_CLASSES} of {len(order)} classes" if len(order) > _CLASSES else ""
        console.print(f"the least certain pictures{left} in {path}", highlight=False)


def _picture(rows: KeptRows, row: int) -> Any:
    try:
        image = rows[row]["image"]
        return EncodedPicture(read_stored(image), "").decode() if isinstance(image, dict) else open_picture(image)
    except UNREADABLE:  # gone since
        return None
