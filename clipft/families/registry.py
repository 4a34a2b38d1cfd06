"""The families that clipft works with, and how one is found.

By a model's class, a configuration's ``model_type`` or, by those who have no more, a processor's class.
"""

from __future__ import annotations

from typing import Any, Literal

from clipft.families.chinese_clip import CHINESE_CLIP
from clipft.families.clip import CLIP
from clipft.families.family import Family
from clipft.families.metaclip2 import METACLIP2
from clipft.families.open_clip import OPEN_CLIP
from clipft.families.siglip import SIGLIP
from clipft.families.siglip2 import SIGLIP2

__all__ = [
    "FAMILIES",
    "MOST_TOKENS",
    "base_model",
    "check_in_torch",
    "check_model",
    "family_of",
    "family_of_processor",
    "family_of_type",
    "find_family",
    "model_names",
]

FAMILIES: list[Family] = [CLIP, METACLIP2, CHINESE_CLIP, SIGLIP, SIGLIP2, OPEN_CLIP]
MOST_TOKENS = 1_000_000  # a tokenizer saved without a maximum reports 1e30


def base_model(model: Any) -> Any:
    """The model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_family(kind: type) -> Family | None:
    """Of a class, fused or not: that of its nearest ancestor."""
    families = {family.model: family for family in FAMILIES}
    return next((families[ancestor] for ancestor in kind.__mro__ if ancestor in families), None)


def family_of(model: Any) -> Family:
    """By the class of the model, fused or not, also inside a peft model.

    Raises:
        TypeError: none of the families.
    """
    return check_model(base_model(model))


def check_model(model: Any) -> Family:
    """The family of what must be a model of one, and not one inside a peft model.

    Raises:
        TypeError: it is not.
    """
    check_in_torch(model)
    family = find_family(type(model))
    if family is None:
        hint = f" {model!r}; clipft.load gives a model of a name" if isinstance(model, str) else ""
        raise TypeError(f"model: expected {model_names()}, got {type(model).__qualname__}{hint}")
    return family.of(model)


def check_in_torch(model: Any) -> None:
    """That a model is none of ONNX encoders, where these do not do.

    Raises:
        TypeError: it is.
    """
    if hasattr(model, "encode_images"):
        raise TypeError("model: expected one in torch, got ONNX encoders, which give vectors of whole pictures alone")


def family_of_type(model_type: Any, where: str) -> Family:
    """By a configuration's ``model_type``.

    Raises:
        ValueError: none of the families; ``where`` is what the message begins with.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = " or ".join(f"{family.model_type!r} (a {family.model.__name__})" for family in FAMILIES)
    raise ValueError(f"{where}: expected model_type {known}, found {model_type!r}")


def family_of_processor(processor: Any) -> Family:
    """By the class of the processor, for those who have no model; families may share one.

    Raises:
        TypeError: none of the families'.
    """
    for family in FAMILIES:
        if isinstance(processor, family.processor):
            return family
    names = _one_of([family.processor for family in FAMILIES])
    raise TypeError(f"processing_class: expected {names} (clipft.load gives one), got {type(processor).__name__}")


def model_names(use: Literal["int8", "onnx"] | None = None) -> str:
    """For messages: "a CLIPModel, SiglipModel or Siglip2Model"; with ``use`` those that have it."""
    return _one_of([family.model for family in FAMILIES if use is None or getattr(family, use)])


def _one_of(types: list[type]) -> str:
    *names, last = (kind.__name__ for kind in types)
    return f"a {', '.join(names)} or {last}" if names else f"a {last}"


MODEL_NAMES = model_names()  # as 0.1 had it: of the families that clipft brings
