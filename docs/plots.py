"""Plots of the site as inline SVG, each of the table beside it as benchmarks/tables.py draws it, or of its results.

Ratios are bars from 1 on a logarithmic axis: to the left of 1 clipft needs less. Colours are classes of
assets/site.css, so that they follow the page's scheme. Needs no package but markupsafe, which jinja2 brings.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from clipft.report.charts import line_chart

WIDTH, LEFT, RIGHT = 400, 40, 360  # of the picture and of the axis; a phone shows it at nine tenths
BAR, ROW, HEAD = 10, 14, 24  # pixels high: a bar, it with its gap, the line above a group
STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
USUAL = (0.2, 2.0)  # what an axis of ratios shows at least, so that pictures can be compared


def _tables() -> Any:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("tables")
    finally:
        sys.path.remove(folder)


TABLES = _tables()


# ---- tables ----


def table_of(name: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, as text."""
    lines = [line for line in TABLES.TABLES[name]().splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
    return cells[0], cells[2:]


def panels_of(head: list[str]) -> dict[str, dict[str, int]]:
    """Of a table's headings those of ratios, "what / peer": by what, a column for each peer."""
    panels: dict[str, dict[str, int]] = {}
    for column, (title, slash, peer) in ((column, one.partition("/ ")) for column, one in enumerate(head)):
        if slash:
            what = title.strip(" :") or next(reversed(panels), "")
            panels.setdefault(what, {})[peer] = column
    return panels


def label_of(head: list[str], row: list[str]) -> str:
    return f"{head[0]} = {row[0]}" if row[0].isdigit() else row[0]


# ---- drawing ----


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x: float, low: float, high: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def legend(names: Iterable[str]) -> str:
    keys = (f'<span><i class="s{number}"></i>{escape(name)}</span> ' for number, name in enumerate(names))
    return f'<p class="legend">{"".join(keys)}</p>'


def figure(parts: Iterable[str], height: float, about: str, names: Iterable[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img" aria-label="{escape(about)}">'
    return f'<div class="plot">{legend(names)}{head}{"".join(parts)}</svg></div>'


def ratios(name: str) -> str:
    """A group of bars for each row, a bar for each peer; under each other what a table has side by side."""
    head, rows = table_of(name)
    panels = panels_of(head)
    values = [float(row[column]) for row in rows for peers in panels.values() for column in peers.values()]
    low = max(step for step in STEPS if step <= min(USUAL[0], *values))
    high = min(step for step in STEPS if step >= max(USUAL[1], *values))
    names = list(dict.fromkeys(peer for peers in panels.values() for peer in peers))

    def at(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(value / low) / math.log(high / low)

    parts: list[str] = []
    y = 4.0
    for what, peers in panels.items():
        if what:
            parts.append(text(0, y + HEAD - 8, what, kind="panel"))
            y += HEAD
        top = y
        body: list[str] = []
        for row in rows:
            body.append(text(0, y + HEAD - 6, label_of(head, row)))
            y += HEAD
            for peer, column in peers.items():
                body += bar(at(1), at(float(row[column])), y, names.index(peer), row[column], peer)
                y += ROW
        parts += [line(at(step), top, y, "one" if step == 1 else "grid") for step in STEPS if low <= step <= high]
        parts += [*body, *(text(at(step), y + 14, f"{step:g}", "middle") for step in STEPS if low <= step <= high)]
        y += HEAD
    parts += [text(at(1) - 6, y + 10, "← clipft needs less", "end"), text(at(1) + 6, y + 10, "more →")]
    return figure(parts, y + 16, f"ratios to {', '.join(names)}; the table has the figures", names)


def bar(start: float, end: float, y: float, number: int, value: str, peer: str) -> list[str]:
    """From 1 to the ratio, which stands at its end."""
    left, width = min(start, end), max(abs(end - start), 1.0)
    shape = f'<rect class="s{number}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}">'
    tip = f"<title>{escape(peer)}: {value}</title></rect>"
    outward = ("end", end - 4) if end <= start else ("start", end + 4)
    return [shape + tip, text(outward[1], y + BAR, value, outward[0], "value")]


def intervals(name: str) -> str:
    """A dot with its interval, on an axis from 0 to 1, for each cell that is a share."""
    head, rows = table_of(name)
    shown = {title: column for column, title in enumerate(head) if column and "gain" not in title}

    def at(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value

    parts: list[str] = []
    y = 4.0
    for row in rows:
        parts.append(text(0, y + HEAD - 6, row[0]))
        y += HEAD
        for number, column in enumerate(shown.values()):
            value, *edges = (float(found) for found in re.findall(r"\.\d+", row[column]))
            middle = y + BAR / 2
            if edges:
                ends = f'x1="{at(edges[0]):.1f}" x2="{at(edges[1]):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"'
                parts.append(f'<line class="s{number} bar" {ends}/>')
            parts.append(f'<circle class="s{number}" r="4" cx="{at(value):.1f}" cy="{middle:.1f}"/>')
            y += ROW
    grid = [line(at(share / 5), 4, y, "grid") for share in range(6)]
    ticks = [text(at(share / 5), y + 14, f"{share / 5:g}", "middle") for share in range(6)]
    return figure([*grid, *parts, *ticks], y + HEAD, "shares with their 95 % intervals", shown)


def memory(name: str) -> str:
    """Of the contrastive loss, beyond inputs and gradients."""
    rows = [row for row in TABLES.results(name)["rows"] if row["kind"] == "contrastive"]
    names = {"eager": "eager (transformers)", "compiled": "torch.compile", "open_clip": "open_clip"}
    names |= {"memeff": "memeff (Triton)", "clipft": "clipft"}
    series = {
        label: [(row["n"], row["memory_mb"][who] / 1024) for row in rows]
        for who, label in names.items()
        if who in rows[0]["memory_mb"]
    }
    return f'<div class="plot">{legend(series)}{line_chart(series, "GiB over N")}</div>'


PLOTS: dict[str, Callable[[], str]] = {
    **{
        name: lambda name=name: ratios(name)  # type: ignore[misc]
        for name in ("contrastive", "lora", "training", "loader", "int8", "gpu_losses", "gpu_layers")
    },
    "learning": lambda: intervals("learning"),
    "memory": lambda: memory(f"contrastive-{TABLES.ZEN4}"),
    "gpu_memory": lambda: memory(TABLES.GPU),
}
