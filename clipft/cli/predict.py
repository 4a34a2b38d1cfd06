"""The command that answers: ``clipft predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import AnyModel, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options_predict import PredictOptions


@app.command(
    epilog=examples(
        "clipft predict --model run --data new/ --output answers.csv --sheet answers.png",
        "clipft predict --model run --data new/ --threshold 0.8 --output answers.csv",
        "clipft predict --model demo --data new/ --classes apple,banana --top 2 --output answers.jsonl",
    )
)
@user_errors
@takes_options(PredictOptions)
def predict(
    *,
    model: AnyModel,
    data: Annotated[
        str,
        typer.Option(help="Folder of pictures (its sub-folders too), a picture, 'new/*.jpg', table, shards, or name."),
    ],
    output: Annotated[Path, typer.Option(help="File to write: .csv, .jsonl or .parquet, a row for each picture.")],
    sheet: Annotated[
        Path | None, typer.Option(help="PNG with the pictures of each class that the model is least certain of.")
    ] = None,
    **options: Any,
) -> None:
    """Say which class each picture is of, and how sure that is; goes on where an interrupted run was."""
    console = prepare()
    from clipft.recipes.predict import predict as predict_classes

    predict_classes(model, data, output, sheet=sheet, console=console, **options)
