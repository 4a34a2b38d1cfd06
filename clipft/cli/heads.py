"""Options of ``clipft train`` for classification heads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import typer

__all__ = [
    "AttributeNames",
    "Attributes",
    "ClassWeights",
    "FocalGamma",
    "Head",
    "HeadLoss",
    "attribute_weights",
    "check_attributes",
    "chosen_metric",
    "class_weight_values",
]

RETRIEVAL = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
CLASSIFICATION = ("balanced_accuracy", "accuracy", "macro_f1")


class Head(StrEnum):
    """Whether a classifier is trained in place of pairs."""

    none = "none"
    text = "text"


class HeadLoss(StrEnum):
    """What heads are trained with."""

    cross_entropy = "cross_entropy"
    focal = "focal"
    dice = "dice"


Attributes = Annotated[
    list[str] | None,
    typer.Option(
        "--attribute",
        help="NAME or NAME=WEIGHT: a column of classes, whose own head's loss is added; repeat for several.",
    ),
]
AttributeNames = Annotated[
    list[str] | None, typer.Option("--attribute", help="A column that the model has a head for; repeat for several.")
]
ClassWeights = Annotated[
    str | None,
    typer.Option(help="In the heads' loss: balanced (rare classes weigh more), or numbers, as 1,2.5, by class name."),
]
FocalGamma = Annotated[float, typer.Option(min=0.0, help="Of the focal loss: 0 is cross-entropy.")]


def attribute_weights(given: Iterable[str]) -> dict[str, float]:
    """Columns and weights."""
    weights: dict[str, float] = {}
    for entry in given:
        name, equals, number = entry.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"--attribute: expected NAME or NAME=WEIGHT, got {entry!r}") from error
        if not 0.0 < weight < math.inf:
            raise ValueError(f"--attribute: expected a weight above 0, got {entry!r}")
        if not name or name in weights:
            raise ValueError(f"--attribute: expected each column once, as NAME or NAME=WEIGHT, got {entry!r}")
        weights[name] = weight
    return weights


def class_weight_values(given: str | None) -> str | list[float] | None:
    """``balanced``, or numbers."""
    if given is None or given == "balanced":
        return given
    try:
        return [float(number) for number in given.split(",")]
    except ValueError as error:
        raise ValueError(f"--class-weights: expected balanced, or numbers as 1,2.5, got {given!r}") from error


def chosen_metric(metric: str | None, head: Head, attributes: Iterable[str]) -> str:
    """What early stopping looks at: ``metric``, or by default R@1 or a head's balanced accuracy."""
    own = RETRIEVAL if head is Head.none else CLASSIFICATION
    others = [name for name in attributes if name != "label"]
    known = ("loss", *own, *(f"{name}_{kind}" for name in others for kind in CLASSIFICATION))
    if metric is not None and metric not in known:
        raise ValueError(f"--metric: expected one of {', '.join(known)}, got {metric!r}")
    return own[0] if metric is None else metric


def check_attributes(model: Any, given: Iterable[str], console: Any) -> None:
    """That a model that is scored has heads for these columns; says which others it has."""
    from clipft.models.heads import LABEL, heads_of

    heads, given = [name for name in heads_of(model) if name != LABEL], list(given)
    if wrong := [name for name in given if name not in heads]:
        raise ValueError(f"--attribute: expected heads of the model, of which it has {heads}, got {wrong}")
    if rest := [name for name in heads if name not in given]:
        options = " ".join(f"--attribute {name}" for name in rest)
        console.print(f"the model has more heads, for data with their columns: {options}")
