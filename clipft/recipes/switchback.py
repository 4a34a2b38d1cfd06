"""The layers of a run that train, in int8 while they do: ``precision`` int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from clipft.models.switchback import to_float_linears, to_switchback, trained_linears
from clipft.recipes.frozen import check_whole, layers_in_int8, say_layers
from clipft.recipes.options import TrainOptions
from clipft.training.precision import warn_of_slow_int8

__all__ = ["check_precision", "check_trained_layers", "trained_in_int8"]

_FROZEN = "expected frozen='int8' (--frozen int8), which is for layers that do not train"


def check_precision(options: TrainOptions, arguments: Any, *, adapted: bool) -> None:
    """That ``precision`` int8 fits the run.

    Raises:
        ValueError: it does not.
    """
    if options.precision != "int8":
        return
    if adapted:
        raise ValueError(f"precision: int8 is for linear layers that train, and beneath an adapter none do: {_FROZEN}")
    check_whole("precision", arguments)
    for name in ("bf16", "fp16"):
        if getattr(arguments, name):
            raise ValueError(f"precision: int8 is float32 outside of int8 products, not with {name}")
    if arguments.device.type != "cpu":
        raise ValueError(f"precision: int8 is for a model on the CPU, got {arguments.device.type}")


def check_trained_layers(options: TrainOptions, model: Any) -> None:
    """That there are layers to be int8.

    Raises:
        ValueError: there are none.
    """
    if options.precision == "int8" and not trained_linears(model):
        raise ValueError(
            f"precision: int8 is for linear layers that train, and freeze {options.freeze!r} leaves none: {_FROZEN}"
        )


@contextmanager
def trained_in_int8(trainer: Any, console: Console) -> Iterator[dict[str, Any]]:
    """Within, the linear layers of the trainer's model that train are int8 in training mode, but for those that it
    would harm; afterwards the model is as it was. Gives what the report says of it.
    """
    model = trainer.model
    linears = trained_linears(model)
    about = layers_in_int8(trainer, linears)
    about["note"] = (
        f"{about['layers']} of {about['of']} linear layers that train computed forward and their input's gradient in "
        f"int8 (errors of their outputs: {about['largest_error']:.1%} at most); weights are float32, and scored so"
    )
    say_layers("precision", about, console)
    warn_of_slow_int8()
    to_switchback(model, [name for name in linears if name not in about["float_layers"]])
    try:
        yield about
    finally:
        to_float_linears(model)
