"""Commands that make a model ready for use: ``clipft merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipft.cli.common import app, output_folder, prepare, user_errors


@app.command()
@user_errors
def merge(
    *,
    model: Annotated[Path, typer.Option(help="An adapter folder as peft or clipft train --lora-r writes it.")],
    output: Annotated[Path, typer.Option(help="Folder for the plain model.")],
) -> None:
    """Merge a LoRA adapter into its base model and save that as a plain CLIPModel."""
    from clipft.lora import is_adapter_folder

    if not is_adapter_folder(model):
        raise FileNotFoundError(f"--model: expected an adapter folder, with adapter_config.json, got {model}")
    if output_folder(output).resolve() == model.resolve():
        raise ValueError(f"--output: expected a folder other than the adapter's, got {output}")
    console = prepare()
    from clipft import report
    from clipft.models import load

    report.save_model(*load(model), output)
    console.print(f"model in {output}")
