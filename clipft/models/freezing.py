"""``freeze``: which parameters of a model train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

from torch import nn

from clipft.families.family import Tower
from clipft.families.registry import check_model, family_of
from clipft.models.fusing import check_float

__all__ = ["freeze"]

Model = TypeVar("Model", bound=nn.Module)


# ---- freezing ----

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
    check_model(model)
    check_float(model)
    frozen = _frozen_by(model, strategy)
    model.requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    return model


def _frozen_by(model: nn.Module, strategy: str) -> list[nn.Module]:
    family, towers = family_of(model), cast(tuple[Tower, ...], ("vision", "text"))
    if strategy == "none":
        return []
    if strategy == "towers":
        return [part for tower in towers for part in family.body(model, tower)]
    for tower in towers:
        if strategy == tower:
            return [*family.body(model, tower), family.projection(model, tower)]
        count = str(strategy).removeprefix(f"{tower}:")
        if count != strategy and count.isdecimal():
            layers = cast(nn.ModuleList, model.get_submodule(f"{tower}_model.encoder.layers"))
            return [*family.stem(model, tower), *_all_but_last(layers, int(count), strategy)]
    raise ValueError(f"strategy: expected one of {_STRATEGIES}, got {strategy!r}")


def _all_but_last(layers: Iterable[nn.Module], count: int, strategy: str) -> list[nn.Module]:
    layers = list(layers)
    if not 1 <= count <= len(layers):
        raise ValueError(f"strategy: expected N from 1 to {len(layers)}, the tower's layers, got {strategy!r}")
    return layers[: len(layers) - count]
