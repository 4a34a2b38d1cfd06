"""The float weights of frozen layers in int8, read again from where the model came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipft.families.registry import base_model
from clipft.models.frozen import frozen_linears, to_float, tower_linears
from clipft.models.loading import load

__all__ = ["check_place", "restore_float"]

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
        OSError, ValueError: the weights are not where they were, or are others.
    """
    place = _place(model)
    weights = tower_linears(load(place)[0])
    try:
        to_float(model, {name: weights[name].weight for name in frozen_linears(model)})
    except (ValueError, KeyError) as error:
        raise ValueError(f"{place}: expected the weights that the adapter was trained on; {error}") from error


def _same(own: Tensor, other: Tensor) -> bool:
    """Also where the model was loaded in another dtype than it is stored in, or moved."""
    return own.shape == other.shape and torch.equal(own, other.to(own))


def _place(model: Any) -> str:
    return str(base_model(model).name_or_path or "")
