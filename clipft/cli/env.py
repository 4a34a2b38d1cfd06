"""``clipft env``: what to paste into a bug report."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from clipft.cli.common import app, examples, user_errors


@app.command(epilog=examples("clipft env --json"))
@user_errors
def env(*, as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of lines.")] = False) -> None:
    """Versions, processor, kernels and threads, for a bug report."""
    from clipft.environment import environment

    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        nested = value.items() if isinstance(value, dict) else ()
        typer.echo(f"{name}: {'' if nested else _words(value)}".rstrip())
        for inner, part in nested:
            typer.echo(f"  {inner}: {'not installed' if part is None and name == 'packages' else _words(part)}")


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
