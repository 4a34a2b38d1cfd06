"""What commands show on the terminal: tables of metrics by stage, bars."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["bar", "console_of_run", "show"]

_TITLES = {"zero_shot": "zero-shot"}
_CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "top5")


def console_of_run() -> Console:
    """Standard output; under torchrun of one process only."""
    return Console(quiet=os.environ.get("RANK", "0") != "0", soft_wrap=True)


# ---- tables ----


def show(results: dict[str, dict[str, Any]], title: str, console: Console, *, classes: bool = True) -> None:
    """Print the metrics, one column a stage (such as ``before`` and ``after``), and the classes of the last stage."""
    console.print(f"\n{title}", highlight=False)
    room = console.width >= 44 + 24 * len(results)  # a line for a metric, with intervals
    console.print(_metrics_table(results, room or len(results) == 1))
    stage, last = list(results.items())[-1]
    if classes and (kind := by_class(last)):
        console.print(f"\nby class, {stage}" if len(results) > 1 else "\nby class", highlight=False)
        console.print(_per_class_table(last[kind]["per_class"]))


def by_class(result: dict[str, Any]) -> str | None:
    """Of a stage's parts that whose classes are shown: what was trained, if a head was."""
    return next((kind for kind in ("head", "zero_shot") if kind in result), None)


def title_of(kind: str) -> str:
    """Of a part of a report: ``attribute_sleeve_length`` is "sleeve length"."""
    return _TITLES.get(kind, kind.removeprefix("attribute_").replace("_", " "))


def _metrics_table(results: dict[str, dict[str, Any]], with_intervals: bool) -> Table:
    stages = list(results)
    table = Table("metric")
    for heading in [*stages, *(["gain"] if len(stages) > 1 else [])]:
        table.add_column(heading.replace("_", "-"), justify="right")
    intervals = {stage: _intervals(results[stage]) if with_intervals else {} for stage in stages}
    for name in _flat(results[stages[0]]):
        values = [_flat(results[stage])[name] for stage in stages]
        shown = [number(name, value, intervals[stage].get(name)) for stage, value in zip(stages, values, strict=True)]
        gain = [_gain(name, values[-1] - values[0])] if len(values) > 1 else []
        table.add_row(name, *shown, *gain)
    table.caption = "in brackets: 95 % bootstrap interval over the pictures" if with_intervals else None
    table.caption_justify = "left"
    return table


def _flat(result: dict[str, Any]) -> dict[str, float]:
    rows: dict[str, float] = {}
    for kind, part in result.items():
        names = [name for name in part if name != "intervals"]
        if "per_class" in part:
            # of five classes all are in the top 5
            shown = _CLASSIFICATION if len(part["per_class"]) > 5 else _CLASSIFICATION[:-1]
            names = [name for name in (*shown, "auc") if name in part]
        rows |= {f"{title_of(kind)} {name.replace('_', ' ')}": part[name] for name in names}
    return rows


def _intervals(result: dict[str, Any]) -> dict[str, list[float]]:
    """By the names of :func:`_flat`."""
    return {
        f"{title_of(kind)} {name.replace('_', ' ')}": edges
        for kind, part in result.items()
        for name, edges in part.get("intervals", {}).items()
    }


def number(name: str, value: float, edges: list[float] | None = None) -> str:
    """A metric as people read it, with its interval."""
    digits = 1 if name.endswith("rank") else 3
    between = f" [{edges[0]:.{digits}f} - {edges[1]:.{digits}f}]" if edges else ""
    return f"{value:.{digits}f}{between}"


def _gain(name: str, value: float) -> str:
    better = value < 0 if name.endswith("rank") else value > 0
    colour = "green" if better else "red" if value else "default"
    return f"[{colour}]{value:+.{1 if name.endswith('rank') else 3}f}[/]"


def _per_class_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("class")
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["class"], *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")), str(row["support"])
        )
    return table


def bar(console: Console) -> Progress:
    """A progress bar with counts and times."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
