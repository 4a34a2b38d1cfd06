"""A contact sheet: a row of hits for each query."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from clipft.errors import shown
from clipft.files import writing
from clipft.report.fonts import all_scripts

__all__ = ["Row", "draw_sheet"]

_WIDTH = 18  # characters of a name under a picture
_QUERY = 22  # characters of a line of a query


@dataclass(frozen=True)
class Row:
    """A query, as text (of a person, in quotes) or as a picture, and its hits: (name, score, picture or None)."""

    query: Any
    hits: Sequence[tuple[str, float, Any]]
    quoted: bool = True


def draw_sheet(path: Path, rows: Sequence[Row]) -> None:
    """A PNG, which appears whole; a warning says for which characters no font is there."""
    columns = 1 + max(len(row.hits) for row in rows)
    with all_scripts("the sheet"), writing(path) as staged:
        _sheet(rows, columns).savefig(staged, format="png", facecolor="white")


def _sheet(rows: Sequence[Row], columns: int) -> Figure:
    figure = Figure(figsize=(1.7 * columns, 2.0 * len(rows)), dpi=110)
    grid = figure.add_gridspec(
        len(rows), columns, left=0.01, right=0.99, top=0.99, bottom=0.2 / len(rows), wspace=0.08, hspace=0.3
    )
    for line, row in enumerate(rows):
        _draw_query(figure.add_subplot(grid[line, 0]), row.query, row.quoted)
        for place, (name, score, picture) in enumerate(row.hits):
            axes = figure.add_subplot(grid[line, 1 + place])
            _draw(axes, picture, "no picture")
            # names are no formulas, whatever dollars they hold
            axes.set_xlabel(f"{score:.3f}\n{_short(name)}", fontsize=8, labelpad=2, parse_math=False)
    return figure


def _draw_query(axes: Any, query: Any, quoted: bool) -> None:
    if isinstance(query, str):
        axes.set_axis_off()
        said = f"“{shown(query)}”" if quoted else shown(query)
        text = textwrap.fill(textwrap.shorten(said, 5 * _QUERY), _QUERY)
        axes.text(0.95, 0.5, text, ha="right", va="center", fontsize=10, transform=axes.transAxes, parse_math=False)
    else:
        _draw(axes, query, "")
        axes.set_xlabel("query", fontsize=8, labelpad=2)
        for spine in axes.spines.values():
            spine.set(linewidth=3)


def _draw(axes: Any, picture: Any, instead: str) -> None:
    axes.set(xticks=[], yticks=[])
    if picture is None:
        axes.text(0.5, 0.5, instead, ha="center", va="center", fontsize=8, transform=axes.transAxes)
    else:
        axes.imshow(picture.convert("RGB"), interpolation="bilinear")


def _short(name: str) -> str:
    """The end of a name tells more than its folders."""
    name = shown(name)
    return name if len(name) <= _WIDTH else "…" + name[-(_WIDTH - 1) :]
