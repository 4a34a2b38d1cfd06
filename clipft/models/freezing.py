"""``freeze``: which parameters of a model train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from clipft.families.family import Family
from clipft.families.registry import check_model
from clipft.models.fusing import check_float

__all__ = ["freeze"]

Model = TypeVar("Model", bound=nn.Module)
_STRATEGIES = '"none", "text", "vision", "towers", "vision:N", "text:N" (N: last layers that stay trainable)'


def freeze(model: Model, strategy: str) -> Model:
    """Choose which parameters train. A strategy is absolute: it does not add to an earlier one, and ``"none"`` undoes
    any.

    Args:
        model: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, fused or not; changed in place.
        strategy: ``"none"`` trains everything. ``"text"`` and ``"vision"`` freeze that tower and its projection.
            ``"towers"`` freezes both towers and leaves both projections, the logit scale and bias trainable.
            ``"vision:N"`` and ``"text:N"`` freeze a tower's embeddings and all but its last N layers; its last norm and
            projection train. The projection of a SigLIP tower is its ``head``.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown strategy, or N outside 1 ... the tower's number of layers.
    """
    family = check_model(model)
    check_float(model)
    frozen = _frozen_by(model, family, strategy)
    model.requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    return model


def _frozen_by(model: nn.Module, family: Family, strategy: str) -> list[nn.Module | nn.Parameter]:
    if strategy == "none":
        return []
    if strategy == "towers":
        return [part for tower in family.towers.values() for part in tower.body_of(model)]
    for name, tower in family.towers.items():
        if strategy == name:
            return [*tower.body_of(model), tower.projection_of(model)]
        count = str(strategy).removeprefix(f"{name}:")
        if count != strategy and count.isdecimal():
            return [*tower.stem_of(model), *_all_but_last(tower.layers_of(model), int(count), strategy)]
    raise ValueError(f"strategy: expected one of {_STRATEGIES}, got {strategy!r}")


def _all_but_last(layers: Sequence[nn.Module], count: int, strategy: str) -> Sequence[nn.Module]:
    if not 1 <= count <= len(layers):
        raise ValueError(f"strategy: expected N from 1 to {len(layers)}, the tower's layers, got {strategy!r}")
    return layers[: len(layers) - count]
