"""The command that shows where: ``clipft explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clipft.cli.common import Model, app, examples, prepare, user_errors
from clipft.cli.from_options import takes_options
from clipft.recipes.options_explain import ExplainOptions

__all__: list[str] = []


@app.command(
    epilog=examples(
        'clipft explain --model run --image tile.jpg --text "a crack" --output heat.png',
        'clipft explain --model demo --image a.png --image b.png --text "a cat" --text "a dog"',
    )
)
@user_errors
@takes_options(ExplainOptions)
def explain(
    *,
    model: Model,
    images: Annotated[list[str], typer.Option("--image", help="A picture; repeat for several.")],
    texts: Annotated[list[str], typer.Option("--text", help="What to find; several compete with each other.")],
    output: Annotated[
        Path | None, typer.Option(help="PNG for the maps; a .json of the same name with the boxes goes beside it.")
    ] = None,
    **options: Any,
) -> None:
    """Where in pictures a model finds what texts say: maps, and boxes around it."""
    console = prepare()
    from clipft.recipes.explain import explain as find

    find(model, images, texts, output, console=console, **options)
