"""What commands show on the terminal: tables of metrics by stage, bars.

Names, ids and queries come from data, which may be a stranger's: :class:`PlainConsole` takes nothing in them for markup
or for a command to the terminal. All printing goes through it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from clipft.errors import shown

__all__ = [
    "PlainConsole",
    "bar",
    "console_of_run",
    "log_to_terminal",
    "show",
    "show_calibration",
    "without_bars",
    "worst_classes",
]

_TITLES = {"zero_shot": "zero-shot"}
_CLASSIFICATION = ("accuracy", "balanced_accuracy", "macro_f1", "top5")
_CLASSES = 50  # rows of the table of classes
_ECE = '"error" is that of probabilities against the share that is right (ECE)'
_ANSWERS = ("answers from", "right", "coverage")


class PlainConsole(Console):
    """Prints strings as they are: no markup, no names of emoji, control characters as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string, also in tables."""
        return super().render_str(shown(text, lines=True), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; texts that have been made already are shown alike."""
        plain = (isinstance(one, Text) and not one.spans for one in objects)
        alike = (Text(shown(one.plain, lines=True)) if own else one for one, own in zip(objects, plain, strict=True))
        super().print(*alike, **options)


def console_of_run() -> Console:
    """Standard output; under torchrun of one process only."""
    return PlainConsole(quiet=os.environ.get("RANK", "0") != "0")


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(shown(self.format(record), lines=True), file=sys.stderr)


def log_to_terminal() -> None:
    """Have what clipft logs printed like all else, and characters that the terminal does not have as escapes."""
    logger = logging.getLogger("clipft")
    if not logger.hasHandlers():
        logger.addHandler(_Warnings())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ---- tables ----


def show(
    results: dict[str, dict[str, Any]],
    title: str,
    console: Console,
    *,
    gains: dict[str, dict[str, Any]] | None = None,
    classes: bool = True,
) -> None:
    """Print the metrics, one column a stage (such as ``before`` and ``after``), and the classes of the last stage.

    ``gains``: of the last stage over the first, as :func:`clipft.evaluation.scoring.gains` has them.
    """
    console.print(f"\n{title}", highlight=False)
    room = console.width >= 44 + 24 * len(results) + 20 * bool(gains)  # a line for a metric, with intervals
    console.print(_metrics_table(results, gains or {}, room or len(results) == 1))
    stage, last = list(results.items())[-1]
    if classes and (kind := by_class(last)):
        console.print(f"\nby class, {stage}" if len(results) > 1 else "\nby class", highlight=False)
        console.print(_per_class_table(last[kind]["per_class"]))
    for part in last.values():
        if "per_kind" in part:
            console.print(_per_kind_table(part["per_kind"]))


def by_class(result: dict[str, Any]) -> str | None:
    """Of a stage's parts that whose classes are shown: what was trained, if a head was."""
    return next((kind for kind in ("head", "zero_shot") if kind in result), None)


def title_of(kind: str) -> str:
    """Of a part of a report: ``attribute_sleeve_length`` is "sleeve length"."""
    return _TITLES.get(kind, kind.removeprefix("attribute_").replace("_", " "))


def _per_kind_table(rows: list[dict[str, Any]]) -> Table:
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    table = Table("kind of defect")
    for name in (*names, "pictures"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(shown(row["kind"]), *(number(name, row[name]) for name in names), str(row["support"]))
    return table


def _metrics_table(results: dict[str, dict[str, Any]], gains: dict[str, dict[str, Any]], with_intervals: bool) -> Table:
    stages = list(results)
    sure = {_row(kind, name): one["interval"] for kind, part in gains.items() for name, one in part.items()}
    table = Table("metric")
    for heading in [*stages, *(["gain"] if len(stages) > 1 else [])]:
        table.add_column(heading.replace("_", "-"), justify="right")
    intervals = {stage: _intervals(results[stage]) if with_intervals else {} for stage in stages}
    for name in _flat(results[stages[0]]):
        values = [_flat(results[stage])[name] for stage in stages]
        cells = [number(name, value, intervals[stage].get(name)) for stage, value in zip(stages, values, strict=True)]
        gained = [gain(name, values[-1] - values[0], sure.get(name))] if len(values) > 1 else []
        table.add_row(name, *cells, *gained)
    parts = ["in brackets: 95 % bootstrap interval over the pictures"] * with_intervals
    if sure:
        parts.append("a gain whose interval holds zero may be chance, and has no colour")
    table.caption = "; ".join(parts) or None
    table.caption_justify = "left"
    return table


def _flat(result: dict[str, Any]) -> dict[str, float]:
    rows: dict[str, float] = {}
    for kind, part in result.items():
        names = [name for name, value in part.items() if isinstance(value, float)]
        if "per_class" in part:
            # of five classes all are in the top 5
            usual = _CLASSIFICATION if len(part["per_class"]) > 5 else _CLASSIFICATION[:-1]
            names = [name for name in (*usual, "auc") if name in part]
        rows |= {_row(kind, name): part[name] for name in names}
    return rows


def _row(kind: str, name: str) -> str:
    return f"{title_of(kind)} {name.replace('_', ' ')}"


def _intervals(result: dict[str, Any]) -> dict[str, list[float]]:
    """By the names of :func:`_flat`."""
    return {
        _row(kind, name): edges for kind, part in result.items() for name, edges in part.get("intervals", {}).items()
    }


def number(name: str, value: float, edges: list[float] | None = None) -> str:
    """A metric as people read it, with its interval."""
    digits = 1 if name.endswith("rank") else 3
    between = f" [{edges[0]:.{digits}f} - {edges[1]:.{digits}f}]" if edges else ""
    return f"{value:.{digits}f}{between}"


def gain(name: str, value: float, interval: list[float] | None = None) -> Text:
    """A difference of a metric with its interval, green where it is for the better, without a colour where it may be
    chance.
    """
    digits = 1 if name.endswith("rank") else 3
    better = value < 0 if name.endswith("rank") else value > 0
    chance = not value or (interval is not None and interval[0] <= 0 <= interval[1])
    between = f" ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})" if interval else ""
    return Text(f"{value:+.{digits}f}{between}", "default" if chance else "green" if better else "red")


def worst_classes(rows: list[dict[str, Any]], most: int) -> tuple[list[dict[str, Any]], str]:
    """The rows of ``per_class`` that are shown, and where these are not all, which they are."""
    if len(rows) <= most:
        return rows, ""
    tested = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])  # type: ignore[no-any-return]
    return tested[:most], f"{len(tested[:most])} of {len(rows)} classes, those with pictures and the lowest f1"


def _per_class_table(rows: list[dict[str, Any]]) -> Table:
    chosen, which = worst_classes(rows, _CLASSES)
    table = Table("class", caption=which or None, caption_justify="left")
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right")
    for row in chosen:
        numbers = (f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(shown(row["class"]), *numbers, str(row["support"]))
    return table


def show_calibration(parts: dict[str, dict[str, Any]], console: Console) -> None:
    """Print what probabilities are worth, a line a classifier; ``parts``: as in report.json."""
    if not parts:
        return
    fitted = not all(part["saved"] for part in parts.values())
    thresholds = any("threshold" in part for part in parts.values())
    with_intervals = console.width >= (125 if thresholds else 80)
    console.print("\nprobabilities", highlight=False)
    table = Table("", caption=_ECE + ", each half under the other's temperature" * fitted, caption_justify="left")
    for heading in ("temperature", "error before", "with it", *(_ANSWERS if thresholds else ())):
        table.add_column(heading, justify="right", no_wrap=heading == "temperature")
    for name, part in parts.items():
        errors = (
            number("ece", part[stage]["ece"], part[stage]["interval"] if with_intervals else None)
            for stage in ("before", "after")
        )
        answers = _answers(part.get("threshold"), with_intervals)
        table.add_row(title_of(name), f"{part['temperature']:.3g}", *errors, *answers)
    console.print(table)
    for name, part in parts.items():
        for note in part["notes"]:
            console.print(f"{title_of(name)}: {note}", highlight=False)


def _answers(found: dict[str, Any] | None, with_intervals: bool) -> list[str]:
    if found is None or found["threshold"] is None:
        return []
    edges = found["interval"] if with_intervals else None
    right = "" if found["precision"] is None else number("precision", found["precision"], edges)
    return [f"{found['threshold']:.3f}", right, f"{found['coverage']:.1%}"]


def bar(console: Console, rate: str = "") -> Progress:
    """A progress bar with counts and times; in a notebook one line that is drawn anew. ``rate``: what a second's count
    is called, if that is shown.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *([_Rate(rate)] if rate else []),
    )
    if console.is_jupyter:
        return _NotebookProgress(*columns, console=console, auto_refresh=False)
    return Progress(*columns, console=console)


class _Rate(ProgressColumn):
    """So many a second; at the end over all of the time."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def render(self, task: Task) -> Text:
        """Empty until it is known."""
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text(f"{speed:.0f} {self._name}" if speed else "")


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the bars of transformers and datasets (weights loaded and written, rows read), of which a verb says what
    matters itself; those that were on are on again after it.
    """
    import datasets
    from transformers.utils import logging

    switches = (
        (not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
    )
    try:
        for _, off, _ in switches:
            off()
        yield
    finally:
        for was_on, _, on in switches:
            if was_on:
                on()


class _NotebookProgress(Progress):
    """Rich's own needs ipywidgets, whose bars a saved notebook does not show."""

    _cell: Any = None
    _drawn = 0.0

    def start(self) -> None:
        """Make the line."""
        from IPython.display import HTML, display

        if self._cell is None:
            self._cell = display(HTML(""), display_id=True)

    def refresh(self) -> None:
        """Draw it, twice a second at most."""
        if self._cell is not None and self.get_time() - self._drawn > 0.5:
            self._draw()

    def update(self, task_id: Any, **changes: Any) -> None:
        """As in rich; its thread that draws is not there."""
        super().update(task_id, **changes)
        self.refresh()

    def stop(self) -> None:
        """Leave the line as it is at the end."""
        if self._cell is not None:
            self._draw()
            self._cell = None

    def _draw(self) -> None:
        from IPython.display import HTML

        page = Console(record=True, file=io.StringIO(), width=self.console.width, force_jupyter=False)
        page.print(self.get_renderable())
        self._cell.update(HTML(page.export_html(inline_styles=True, code_format="<pre>{code}</pre>")))
        self._drawn = self.get_time()
