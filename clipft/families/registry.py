"""The model families that clipft works with, and all in which they differ.

A CLIP has a projection after each tower and a softmax over the batch; a SigLIP has a head inside each tower, a sigmoid
over pairs with a bias of its own, and reads captions padded to their full length. What the rest of the package needs to
know of that stands here, found by a model's class, a configuration's ``model_type`` or a processor's class.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import CLIPModel, CLIPProcessor, Siglip2Model, Siglip2Processor, SiglipModel, SiglipProcessor

from clipft.families.family import Family, Tower

__all__ = ["FAMILIES", "MODEL_NAMES", "MOST_TOKENS", "base_model", "check_model", "family_of", "family_of_processor"]

MOST_TOKENS = 1_000_000  # a tokenizer saved without a maximum reports 1e30
_HEADS: dict[Tower, str] = {"vision": "vision_model.head", "text": "text_model.head"}
FAMILIES = (
    Family(
        model_type="clip",
        model=CLIPModel,
        processor=CLIPProcessor,
        loss="contrastive",
        max_log_scale=math.log(100.0),  # beyond it training is unstable (arXiv:2103.00020, 2.5)
        padding="longest",
        text_length=77,
        projections={"vision": "visual_projection", "text": "text_projection"},
    ),
    Family(  # also SigLIP 2 at a fixed resolution, which comes as a SiglipModel
        model_type="siglip",
        model=SiglipModel,
        processor=SiglipProcessor,
        loss="sigmoid",
        max_log_scale=None,  # the checkpoints stand above 100
        padding="max_length",
        text_length=64,
        projections=_HEADS,
    ),
    Family(  # SigLIP 2 NaFlex: pictures in their own aspect ratio, as patches
        model_type="siglip2",
        model=Siglip2Model,
        processor=Siglip2Processor,
        loss="sigmoid",
        max_log_scale=None,
        padding="max_length",
        text_length=64,
        projections=_HEADS,
    ),
)


def _one_of(types: list[type]) -> str:
    names = [kind.__name__ for kind in types]
    return f"a {', '.join(names[:-1])} or {names[-1]}"


MODEL_NAMES = _one_of([family.model for family in FAMILIES])
_PROCESSOR_NAMES = _one_of([family.processor for family in FAMILIES])


def base_model(model: Any) -> Any:
    """The model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: Any) -> Family:
    """By the class of the model, fused or not, also inside a peft model.

    Raises:
        TypeError: none of the families.
    """
    inner = base_model(model)
    check_model(inner)
    return next(family for family in FAMILIES if isinstance(inner, family.model))


def check_model(model: Any) -> None:
    """That this is a model of one of the families, and not one inside a peft model."""
    if not any(isinstance(model, family.model) for family in FAMILIES):
        raise TypeError(f"model: expected {MODEL_NAMES}, got {type(model).__qualname__}")


def family_of_processor(processor: Any) -> Family:
    """By the class of the processor.

    Raises:
        TypeError: none of the families'.
    """
    for family in FAMILIES:
        if isinstance(processor, family.processor):
            return family
    raise TypeError(
        f"processing_class: expected {_PROCESSOR_NAMES} (clipft.load gives one), got {type(processor).__name__}"
    )
