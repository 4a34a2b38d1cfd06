"""What ``clipft.doctor`` found, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipft.errors import shown

__all__ = ["Finding", "Findings", "finding_of", "share", "show_findings"]

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}
_EXAMPLES = 10  # of them that are kept
_SHOWN = 3  # examples of a finding on the screen


@dataclass
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name, the same in every run.
        status: ``"ok"``, ``"note"`` (worth knowing) or ``"problem"`` (mend it first).
        summary: one line: what was found, and what to do.
        count: rows, pairs or captions concerned.
        examples: some of them.
        data: the data set concerned, where it is one.
    """

    check: str
    status: str
    summary: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    data: str = ""


def finding_of(
    check: str, bad: str, found: Sequence[str], problem: str, good: str, count: int | None = None
) -> Finding:
    """``good`` where nothing was found."""
    number = len(found) if count is None else count
    if not number:
        return Finding(check, "ok", good)
    return Finding(check, bad, f"{number} {problem}", number, list(found[:_EXAMPLES]))


def share(some: Sized, of: Sized) -> str:
    """ "30 % of 40"."""
    return f"{len(some) / max(len(of), 1):.0%} of {len(of)}".replace("%", " %")


class Findings(dict[str, Any]):
    """``findings``, a list of :class:`Finding` as dictionaries, and ``statistics`` by data set: rows, captions, sizes,
    kinds of pictures, rows by class; ``model``, where one was looked at: its family and source. For JSON.
    """

    @property
    def problems(self) -> list[dict[str, Any]]:
        """The findings to mend before a run."""
        return [finding for finding in self["findings"] if finding["status"] == "problem"]

    def __repr__(self) -> str:
        number = len(self.problems)
        return f"{number or 'no'} problem{'' if number == 1 else 's'}"


def show_findings(result: Findings, console: Console) -> None:
    """A line or two a data set, and a table of the checks."""
    for statistics in result["statistics"].values():
        console.print(Text(f"{statistics['source']}: {statistics['reading']['line']}"))
        sides = [statistics[side] for side in ("width", "height")]
        sizes = " x ".join("-".join(map(str, sorted({side["min"], side["max"]}))) for side in sides)
        parts = [f"{statistics['usable']} of {statistics['rows']} rows usable", f"{sizes} pixels"]
        if statistics["captions"]:
            parts.append(f"{statistics['captions']} captions, {statistics['distinct_captions']} distinct")
        if statistics["classes"]:
            parts.append(f"{len(statistics['classes'])} classes")
        console.print(f"{statistics['source']}: {', '.join(parts)}", highlight=False)
    if model := result.get("model"):
        console.print(Text(f"{model['source']}: a model of the family {model['family']}"))
    several = len(result["statistics"]) > 1
    table = Table("check", "", "finding")
    for finding in result["findings"]:
        lines = Text(shown(finding["summary"]))
        if finding["status"] != "ok":
            lines.append("".join(f"\n  {_short(example)}" for example in finding["examples"][:_SHOWN]), style="dim")
            if finding["count"] > _SHOWN and len(finding["examples"]) > _SHOWN:
                lines.append("\n  ...", style="dim")
        of = f"\n{shown(Path(finding['data']).name)}" if several and finding["data"] else ""
        status = Text(finding["status"], style=_COLOURS[finding["status"]])
        table.add_row(Text(finding["check"]).append(of, style="dim"), status, lines)
    console.print(table)
    console.print(repr(result), highlight=False)


def _short(text: str) -> str:
    text = shown(text)
    return text if len(text) <= 160 else f"{text[:157]}..."
