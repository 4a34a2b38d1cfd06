"""The command that scores: ``clipft evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import Data, Model, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options import EvaluateOptions


@app.command(
    epilog=examples(
        "clipft evaluate --model run --data test.csv --output score.json",
        "clipft evaluate --model run --data test/ --probe-data pictures/",
        "clipft evaluate --anomaly --model run --data bottle/ --output score.json",
    )
)
@user_errors
@takes_options(EvaluateOptions)
def evaluate(
    *,
    model: Model,
    data: Data,
    output: Annotated[
        Path | None, typer.Option(help="File for the numbers, as JSON; a page of the same name, .html, goes beside it.")
    ] = None,
    **options: Any,
) -> None:
    """Zero-shot classification where the data has classes, retrieval where it has captions; the model's heads;
    with --anomaly how well defects are found."""
    console = prepare()
    from clipft.recipes.evaluate import evaluate as evaluate_model

    evaluate_model(model, data, output, console=console, **options)
