"""The float weights of frozen layers in int8, read again from where the model came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipft.errors import line_of
from clipft.families.registry import base_model
from clipft.models.frozen import float_state, frozen_linears, to_float, tower_linears
from clipft.models.loading import load

__all__ = ["check_place", "restore_float", "state_in_float"]

Result = TypeVar("Result")

_AGAIN = (
    "whose float weights are read again when it has trained: save it with model.save_pretrained(FOLDER) and "
    "processor.save_pretrained(FOLDER), and give FOLDER"
)


def check_place(model: Any, *, compare: bool) -> None:
    """That the model has a place to be read again from.

    Args:
        model: in float, with or without adapters.
        compare: look whether the same weights lie there, of a model that may have changed since it was loaded.

    Raises:
        ValueError: it has none, or it has changed.
    """
    place = _place(model)
    if not place:
        raise ValueError(f"frozen: int8 expects a model that was loaded from a folder or by name, {_AGAIN}")
    if not compare:
        return
    plain, _ = load(place)
    own, other = tower_linears(model), tower_linears(plain)
    if own.keys() != other.keys() or any(not _same(own[name].weight, other[name].weight) for name in own):
        raise ValueError(f"frozen: int8 expects the model as it lies in {place}, this one has other weights, {_AGAIN}")


def restore_float(model: Any) -> None:
    """Let what :func:`clipft.models.frozen.to_int8` made int8 be float again, in place.

    Raises:
        ValueError: the weights are not where they were, or are others.
    """
    _with_weights(model, to_float)


def state_in_float(model: Any) -> dict[str, Tensor]:
    """What :func:`restore_float` would leave in a model without adapters, which stays as it is. It raises the same."""
    return _with_weights(model, float_state)


def _with_weights(model: Any, use: Callable[[Any, dict[str, Tensor]], Result]) -> Result:
    place = _place(model)
    try:
        linears = tower_linears(load(place)[0])
        return use(model, {name: linears[name].weight for name in frozen_linears(model)})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{place}: expected the weights that training began with; {line_of(error)}") from error


def _same(own: Tensor, other: Tensor) -> bool:
    """Also where the model was loaded in another dtype than it is stored in, or moved."""
    return own.shape == other.shape and torch.equal(own, other.to(own))


def _place(model: Any) -> str:
    return str(base_model(model).name_or_path or "")
