"""Options of ``clipft train`` against forgetting, and where it reports to."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["L2SP", "ControlData", "Distillation", "ReportTo", "WiseFT"]

ControlData = Annotated[
    str,
    typer.Option(help="What must not be forgotten, scored before and after: drawings (in the package), none, or data."),
]
L2SP = Annotated[float, typer.Option("--l2-sp", min=0.0, help="Pull to the starting weights, for instance 0.01.")]
Distillation = Annotated[
    float, typer.Option(min=0.0, help="Pull to the starting model's embeddings of the batch, for instance 1.")
]
WiseFT = Annotated[
    bool,
    typer.Option("--wise-ft", help="Choose among weights between start and end by rows held out of training."),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, wandb or whatever else transformers reports to; repeat for several."),
]
