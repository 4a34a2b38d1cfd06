"""Commands that look at data: ``clipft doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipft.cli.common import app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.console import shown
from clipft.recipes.options import DataOptions

__all__: list[str] = []

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}
_SHOWN = 3  # examples of a finding; the JSON has more


@app.command(epilog=examples("clipft doctor pictures/ --eval-data test/ --model run"))
@user_errors
@takes_options(DataOptions)
def doctor(
    *,
    data: Annotated[str, typer.Argument(help="As --data of train.")],
    eval_data: Annotated[str | None, typer.Option(help="A test set, to look for leakage.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model: its tokenizer, preprocessing and logit scale are looked at too.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="File for the findings, as JSON.")] = None,
    **options: Any,
) -> None:
    """Look for what spoils a training run: bad rows, duplicates, leakage, cut captions, drift. Status 1 on problems."""
    console = prepare()
    from clipft.files import write_json
    from clipft.recipes.doctor import examine

    result = examine(data, eval_data=eval_data, model=model, **options)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, result)
    _show(result, console)
    problems = sum(finding["status"] == "problem" for finding in result["findings"])
    console.print(f"{problems or 'no'} problem{'' if problems == 1 else 's'}", highlight=False)
    if problems:
        raise typer.Exit(1)


def _show(result: dict[str, Any], console: Console) -> None:
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
    several = len(result["statistics"]) > 1
    table = Table("check", "", "finding")
    for finding in result["findings"]:
        lines = Text(shown(finding["summary"]))
        if finding["status"] != "ok":
            lines.append("".join(f"\n  {_short(example)}" for example in finding["examples"][:_SHOWN]), style="dim")
            if finding["count"] > _SHOWN and len(finding["examples"]) > _SHOWN:
                lines.append("\n  ...", style="dim")
        of = f"\n{shown(Path(finding['data']).name)}" if several and finding["data"] else ""
        table.add_row(
            Text(finding["check"]).append(of, style="dim"),
            Text(finding["status"], style=_COLOURS[finding["status"]]),
            lines,
        )
    console.print(table)


def _short(text: str) -> str:
    text = shown(text)
    return text if len(text) <= 160 else f"{text[:157]}..."
