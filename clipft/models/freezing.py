"""``freeze``: which parameters of a model train; and in words which do."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from clipft.families.family import Family, Tower, TowerName
from clipft.families.registry import base_model, check_model, family_of
from clipft.models.fusing import check_float
from clipft.models.heads import heads_of

__all__ = ["freeze", "what_trains"]

Model = TypeVar("Model", bound=nn.Module)
_STRATEGIES = (
    '"none", "text", "vision", "towers", "vision:N", "text:N" (N: last layers that stay trainable), or one for each '
    'tower, as "text,vision:2"'
)


def freeze(model: Model, strategy: str) -> Model:
    """Choose which parameters train. A strategy is absolute: it does not add to an earlier one, and ``"none"`` undoes
    any. What it does not name trains: a tower that is not named trains whole, the logit scale (and bias) always.

    Args:
        model: a ``CLIPModel`` or one of another family, fused or not; changed in place.
        strategy: ``"none"`` trains everything. ``"text"`` and ``"vision"`` freeze that tower and its projection.
            ``"towers"`` freezes both towers and leaves both projections, the logit scale and bias trainable.
            ``"vision:N"`` and ``"text:N"`` freeze a tower's embeddings and all but its last N layers; its last norm and
            projection train. The projection of a SigLIP tower is its ``head``. A comma joins one for each tower:
            ``"text,vision:2"`` trains two layers and what comes after them.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown strategy, two for one tower, or N outside 1 ... the tower's number of layers.
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
    own = [part.strip() for part in str(strategy).split(",")]
    named = [part.partition(":")[0] for part in own]
    if not set(named) <= set(family.towers):
        raise ValueError(f"freeze: expected one of {_STRATEGIES}, got {strategy!r}")
    if len(set(named)) < len(named):
        raise ValueError(f"freeze: expected each tower once, got {strategy!r}")
    return [module for part in own for module in _frozen_of_tower(model, family, part, strategy)]


def _frozen_of_tower(model: nn.Module, family: Family, part: str, strategy: str) -> list[nn.Module | nn.Parameter]:
    name, colon, count = part.partition(":")
    tower = family.towers[cast(TowerName, name)]
    if not colon:
        return [*tower.body_of(model), tower.projection_of(model)]
    if not count.isdecimal():
        raise ValueError(f"freeze: expected one of {_STRATEGIES}, got {strategy!r}")
    layers = tower.layers_of(model)
    if not 1 <= int(count) <= len(layers):
        raise ValueError(f"freeze: expected N from 1 to {len(layers)}, the tower's layers, got {strategy!r}")
    return [*tower.stem_of(model), *layers[: len(layers) - int(count)]]


def what_trains(model: Any) -> str:
    """In words, of a model or a peft model of one: how much of each tower, whether the logit scale, and heads."""
    base = base_model(model)
    parts = [f"{_share_of(tower, base)} of the {name} tower" for name, tower in family_of(base).towers.items()]
    heads = [f"the head {name}" for name, head in heads_of(base).items() if head.weight.requires_grad]
    scale = "the logit scale" if base.logit_scale.requires_grad else "not the logit scale"
    return ", ".join([*parts, scale, *heads])


def _share_of(tower: Tower, model: nn.Module) -> str:
    own = tower.parameters_of(model)
    sizes = [p.numel() for p in own if p.requires_grad]
    if len(sizes) in (0, len(own)):
        return "all" if sizes else "nothing"
    return f"{sum(sizes):,} of {sum(p.numel() for p in own):,} parameters"
