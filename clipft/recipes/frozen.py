"""The frozen layers of a run, in int8 while the rest trains: which of them, and in float again for what comes after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import nn

from clipft.data.collate import model_inputs
from clipft.data.rows import PairRows
from clipft.errors import line_of, listed
from clipft.inference.encode import evaluating
from clipft.models.float_base import check_place, restore_float
from clipft.models.frozen import float_linears, rounding_errors, to_int8
from clipft.recipes.options import TrainOptions
from clipft.training.checkpoints import kept_checkpoints

__all__ = ["check_frozen", "check_layers", "check_whole", "frozen_in_int8", "layers_in_int8", "say_layers"]

_PICTURES = 32  # that the errors of rounding are measured on
_MOST = 0.1  # of what a layer's outputs vary by


def check_frozen(options: TrainOptions, arguments: Any, *, adapted: bool) -> None:
    """That ``frozen`` fits the run.

    Raises:
        ValueError: it does not.
    """
    if options.frozen == "float":
        return
    if not adapted and options.freeze == "none":
        raise ValueError(
            "frozen: int8 is for what does not train: expected freeze, or an adapter (lora_r or peft_config), which "
            "leaves the linear layers frozen, got neither"
        )
    check_whole("frozen", arguments)


def check_layers(options: TrainOptions, model: Any, peft_config: Any) -> None:
    """That there are layers to be int8, whose weights are still those of the model that was given.

    Raises:
        ValueError: there are none, or the adapter has changed them.
    """
    if options.frozen == "float":
        return
    if not float_linears(model):
        raise ValueError(
            f"frozen: expected linear layers that do not train, for int8; freeze {options.freeze!r} leaves none"
        )
    if peft_config is None:
        return
    try:
        check_place(model, compare=True)
    except ValueError as error:
        raise ValueError(
            "peft_config: expected, with frozen int8, an adapter that leaves its base as it is, whose float weights "
            "are read again when it has trained; this one writes to them as it begins (init_lora_weights)"
        ) from error


@contextmanager
def frozen_in_int8(trainer: Any, console: Console) -> Iterator[dict[str, Any]]:
    """Within, the frozen layers of the trainer's model are int8, but for those that it would harm; afterwards they are
    float again, read from where the model came. Gives what the report says of it.
    """
    linears = float_linears(trainer.model)
    about = layers_in_int8(trainer, linears)
    to_int8(trainer.model, [name for name in linears if name not in about["float_layers"]])
    about["note"] = _told(about, adapted=hasattr(trainer.model, "peft_config"))
    say_layers("frozen", about, console)
    try:
        yield about
    finally:
        _restore(trainer)


def _restore(trainer: Any) -> None:
    try:
        restore_float(trainer.model)
    except ValueError as error:
        raise ValueError(f"{line_of(error)}; {kept_checkpoints(trainer.args.output_dir)}") from error


def _told(about: dict[str, Any], *, adapted: bool) -> str:
    """In words."""
    what, after = ("the adapter", ", and merged, on the float base") if adapted else ("the rest", " and saved in float")
    return (
        f"{about['layers']} of {about['of']} frozen linear layers computed in int8 while {what} trained (errors of "
        f"their outputs: {about['largest_error']:.1%} at most); it is scored{after}"
    )


# ---- of frozen layers, and of those that train ----


def check_whole(option: str, arguments: Any) -> None:
    """That each process has the model whole, for this option's int8.

    Raises:
        ValueError: it is sharded.
    """
    for name in ("fsdp", "deepspeed"):
        if getattr(arguments, name):
            raise ValueError(f"{option}: int8 is for models that are whole on each process, not with {name}")


def layers_in_int8(trainer: Any, linears: Mapping[str, nn.Linear]) -> dict[str, Any]:
    """What the report says of layers that are to be int8: how many will be, and which int8 would harm, by its errors on
    rows of the training set."""
    errors = _errors(trainer, linears)
    harmed = {name: errors.get(name) for name in linears if not errors.get(name, math.inf) <= _MOST}
    return {
        "layers": len(linears) - len(harmed),
        "of": len(linears),
        "largest_error": max((error for error in errors.values() if error <= _MOST), default=0.0),
        "float_layers": harmed,
    }


def say_layers(option: str, about: dict[str, Any], console: Console) -> None:
    """The note, and which layers stay float, and why."""
    console.print(f"{option}: {about['note']}", highlight=False)
    harmed = about["float_layers"]
    for name, error in harmed.items():
        if error is not None:
            console.print(f"{option}: {name} stays float: int8 would move its outputs by {error:.0%}", highlight=False)
    if idle := [name for name, error in harmed.items() if error is None]:
        console.print(f"{option}: {listed(idle)} stay float: this run does not call them", highlight=False)


def _errors(trainer: Any, linears: Mapping[str, nn.Linear]) -> dict[str, float]:
    """Of each layer, on rows of the training set."""
    model, args = trainer.model, trainer.args
    rows = PairRows(trainer.train_dataset, args.caption_templates, captions=args.head == "none")
    count = min(len(rows), _PICTURES)
    batch = model_inputs(trainer.data_collator([rows[index * len(rows) // count] for index in range(count)]))
    inputs = {name: value.to(args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    with evaluating(model):
        return rounding_errors(model, lambda: model(**inputs, return_logits=False), linears)
