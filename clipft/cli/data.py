"""Commands that look at data: ``clipft doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options import DoctorOptions

__all__: list[str] = []


@app.command(epilog=examples("clipft doctor pictures/ --eval-data test/ --model run"))
@user_errors
@takes_options(DoctorOptions)
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
    from clipft.recipes.doctor import doctor as look

    if look(data, eval_data=eval_data, model=model, json=json, console=console, **options).problems:
        raise typer.Exit(1)
