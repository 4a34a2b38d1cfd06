"""Classification heads in use: started from text, and probabilities of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipft.data.rows import DEFAULT_TEMPLATES, check_class_names, class_text
from clipft.families.registry import check_model
from clipft.inference.encode import class_embeddings, embed
from clipft.models.formats import HEADS_KEY
from clipft.models.heads import LABEL, ClassificationHead, attach_head, heads_of

__all__ = ["add_head", "classify"]


def default_templates(name: str) -> tuple[str, ...]:
    """Texts of a head's classes, where nobody gives any: of the attribute "color", "a photo, color: red."."""
    return DEFAULT_TEMPLATES if name == LABEL else (f"a photo, {class_text(name)}: {{}}.",)


def add_head(
    model: Any,
    processor: Any,
    class_names: Sequence[str],
    *,
    name: str = LABEL,
    templates: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Any:
    """Give a model a classification head that starts as its zero-shot classifier.

    Args:
        model: a ``CLIPModel`` or one of another family, fused or not; changed in place.
        processor: its processor.
        class_names: two or more; underscores read as spaces.
        name: the data column that holds the classes; ``"label"`` or an attribute's.
        templates: texts with one ``{}`` for the class; their embeddings are averaged. Default: "a photo of a {}.", of
            an attribute "a photo, NAME: {}.".
        batch_size: texts a forward pass.

    Returns:
        The same model, with ``model.heads``. ``clipft.CLIPTrainer`` trains the heads that its arguments name.

    Raises:
        TypeError: not such a model, or one inside a peft model, which would not save it.
        ValueError: fewer than two classes, one twice, or a head of this name.
    """
    check_model(model)
    check_class_names(class_names)
    names = [str(class_name) for class_name in class_names]
    if len(set(names)) < len(names):
        raise ValueError(f"class_names: expected each once, got {sorted({n for n in names if names.count(n) > 1})}")
    if name in heads_of(model):
        raise ValueError(f"name: the model has a head {name!r} already, of {heads_of(model)[name].class_names}")
    templates = default_templates(name) if templates is None else templates
    scale = model.logit_scale.detach().float().exp().reshape(())
    weight = scale * class_embeddings(model, processor, names, templates, batch_size).to(scale.device)
    attach_head(model, ClassificationHead(name, names, weight.to(model.dtype)))
    stored = {"name": name, "classes": names}
    setattr(model.config, HEADS_KEY, [*(getattr(model.config, HEADS_KEY, None) or []), stored])
    return model


def classify(
    model: Any,
    processor: Any,
    images: Any,
    *,
    head: str = LABEL,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Tensor:
    """Probabilities of a head's classes.

    Args:
        model: with heads (:func:`add_head`, a run of ``CLIPTrainer``, or loaded from one).
        processor: its processor.
        images: PIL pictures, paths, or a data set with the column ``image``.
        head: the head's name.
        batch_size, num_workers: pictures at a time; processes that load them.

    Returns:
        [N, C] float32 on the CPU; the classes are ``clipft.models.heads.heads_of(model)[head].class_names``.

    Raises:
        ValueError: there is no such head.
    """
    found = heads_of(model)
    if head not in found:
        raise ValueError(
            f"head: expected one of the model's heads, {sorted(found) or 'of which it has none'}, got {head!r}"
        )
    embeds = embed(model, processor, images=images, batch_size=batch_size, num_workers=num_workers)
    with torch.no_grad():
        return found[head](embeds.to(found[head].weight.device)).softmax(1).cpu()
