"""The frozen layers of a run, in int8 while the rest trains: which of them, and in float again for what comes after."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from clipft.data.collate import model_inputs
from clipft.data.rows import PairRows
from clipft.errors import line_of
from clipft.inference.encode import evaluating
from clipft.models.float_base import restore_float
from clipft.models.frozen import float_linears, rounding_errors, to_int8
from clipft.recipes.options import TrainOptions

__all__ = ["check_frozen", "frozen_in_int8"]

_PICTURES = 32  # that the errors of rounding are measured on
_MOST = 0.1  # of what a layer's outputs vary by


def check_frozen(options: TrainOptions, arguments: Any, *, adapted: bool) -> None:
    """That ``frozen`` fits the run.

    Raises:
        ValueError: it does not.
    """
    if options.frozen == "float":
        return
    if not adapted:
        raise ValueError(
            "frozen: int8 is for runs with an adapter, lora_r or peft_config, which leaves the linear layers frozen"
        )
    for name in ("fsdp", "deepspeed"):
        if getattr(arguments, name):
            raise ValueError(f"frozen: int8 is for models that are whole on each process, not with {name}")


@contextmanager
def frozen_in_int8(trainer: Any, console: Console) -> Iterator[dict[str, Any]]:
    """Within, the frozen layers of the trainer's model are int8, but for those that it would harm; afterwards they are
    float again, read from where the model came. Gives what the report says of it.
    """
    model = trainer.model
    names = list(float_linears(model))
    errors = _errors(trainer)
    harmed = {name: errors.get(name) for name in names if not errors.get(name, math.inf) <= _MOST}
    to_int8(model, [name for name in names if name not in harmed])
    about: dict[str, Any] = {
        "layers": len(names) - len(harmed),
        "of": len(names),
        "largest_error": max((error for error in errors.values() if error <= _MOST), default=0.0),
        "float_layers": harmed,
    }
    about["note"] = _told(about)
    console.print(f"frozen: {about['note']}", highlight=False)
    for name, error in harmed.items():
        why = "it was not called on these pictures" if error is None else f"int8 would move its outputs by {error:.0%}"
        console.print(f"frozen: {name} stays float: {why}", highlight=False)
    try:
        yield about
    finally:
        _restore(trainer)


def _restore(trainer: Any) -> None:
    try:
        restore_float(trainer.model)
    except (OSError, ValueError) as error:
        kept = f"the adapter as it was last saved is in the checkpoints in {trainer.args.output_dir}"
        raise ValueError(f"{line_of(error)}; {kept}") from error


def _told(about: dict[str, Any]) -> str:
    """In words."""
    return (
        f"{about['layers']} of {about['of']} frozen linear layers computed in int8 while the adapter trained (errors "
        f"of their outputs: {about['largest_error']:.1%} at most); it is scored, and merged, on the float base"
    )


def _errors(trainer: Any) -> dict[str, float]:
    """Of each layer, on rows of the training set."""
    model, rows = trainer.model, PairRows(trainer.train_dataset, trainer.args.caption_templates)
    count = min(len(rows), _PICTURES)
    batch = model_inputs(trainer.data_collator([rows[index * len(rows) // count] for index in range(count)]))
    inputs = {name: value.to(trainer.args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    with evaluating(model):
        return rounding_errors(model, lambda: model(**inputs, return_logits=False))
