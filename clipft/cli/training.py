"""Commands that train: ``clipft demo``, ``clipft train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import Data, Model, app, examples, output_folder, prepare, user_errors
from clipft.cli.config import Config
from clipft.cli.from_options import Grouped, takes_options
from clipft.recipes.options import TrainOptions


@app.command(epilog=examples("clipft demo --output clipft-demo"))
@user_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, report.json and queries.png.")] = Path(
        "clipft-demo"
    ),
) -> None:
    """Fine-tune an embedded model on embedded pictures, offline, and show what it gained."""
    console = prepare()
    from clipft.demo import run

    run(output, console)


@app.command(
    cls=Grouped,
    epilog=examples(
        "clipft train --model demo --data pictures/ --output run --epochs 20",
        "clipft train --model run --data pairs.csv --output adapter --lora-r 16 --precision auto",
    ),
)
@user_errors
@takes_options(TrainOptions)
def train(
    *,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for the model, report.json and checkpoints.")],
    config: Config = None,
    **options: Any,
) -> None:
    """Fine-tune a model and report what it gained."""
    output_folder(output)
    console = prepare()
    from clipft.recipes.train import train as train_model

    train_model(model, data, output, console=console, **options)
