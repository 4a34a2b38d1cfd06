"""The command that shows what is not normal: ``clipft anomaly``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import Model, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options_anomaly import AnomalyOptions

__all__: list[str] = []


@app.command(
    epilog=examples(
        "clipft anomaly --model run --normal good/ --data new/ --output scores.csv --maps maps/",
        "clipft anomaly --model run --normal good/ --memory good.safetensors --data new/",
        "clipft anomaly --model run --memory good.safetensors --data newer/",
        'clipft anomaly --model run --normal-text "a good tile" --anomaly-text "a cracked tile" --data new/',
    )
)
@user_errors
@takes_options(AnomalyOptions)
def anomaly(
    *,
    model: Model,
    data: Annotated[
        str, typer.Option(help="Pictures to look at: a folder (its sub-folders too), table, or data set's name.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Table of the scores, a row for each picture: .csv, .jsonl or .parquet.")
    ] = None,
    **options: Any,
) -> None:
    """How far from normal pictures are, and where: by normal pictures, by words, or both."""
    console = prepare()
    from clipft.recipes.anomaly import anomaly as find

    find(model, data, output, console=console, **options)
