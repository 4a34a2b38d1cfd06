"""Classification heads on the image embedding, started from text: before any training they are zero-shot
classification.

A head's weight [C, D] is each class's text embedding, the normalised mean over templates, times the logit scale, as in
WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903). Heads are a submodule of the model, ``model.heads``: optimiser,
averages, checkpoints and ``save_pretrained`` take their weights along as any others, and the configuration their names
and classes (``clipft_heads``). ``clipft.load`` brings them back; ``CLIPModel.from_pretrained`` loads the model and
reports their weights as unexpected. (``CLIPForImageClassification`` is another architecture: its classifier sees the
mean of the patch tokens, without the class token, norm and projection that tie CLIP's pictures to its texts.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipft.families.registry import base_model, check_model

__all__ = ["ClassificationHead", "add_head", "classify", "heads_of", "restore_heads", "with_heads"]

CONFIG = "clipft_heads"
LABEL = "label"  # the head of the classes; any other is an attribute


class ClassificationHead(nn.Module):
    """Logits of classes from image embeddings.

    Args:
        name: the data column with its classes.
        class_names: C of them, in the order of the logits.
        weight: [C, D].
    """

    def __init__(self, name: str, class_names: Sequence[str], weight: Tensor) -> None:
        super().__init__()
        self.name, self.class_names = name, list(class_names)
        self.weight = nn.Parameter(weight)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """[N, D], L2-normalised -> [N, C] float32."""
        return head_logits(image_embeds, self.weight)

    def extra_repr(self) -> str:
        """Name and shape."""
        return f"{self.name!r}, {self.weight.shape[1]} -> {len(self.class_names)} classes"


def head_logits(image_embeds: Tensor, weight: Tensor) -> Tensor:
    """[N, D], [C, D] -> [N, C]: in float32, under autocast too, since the weight holds the logit scale."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        return nn.functional.linear(image_embeds.float(), weight.float())


def heads_of(model: Any) -> dict[str, ClassificationHead]:
    """A model's heads by name, none if it has none; also inside a peft model."""
    return {head.name: head for head in getattr(base_model(model), "heads", ())}


def default_templates(name: str) -> tuple[str, ...]:
    """Texts of a head's classes, where nobody gives any: of the attribute "color", "a photo, color: red."."""
    from clipft.data.rows import DEFAULT_TEMPLATES, class_text

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
        model: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, fused or not; changed in place.
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
    from clipft.evaluation import check_class_names, class_embeddings

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
    _attach(model, ClassificationHead(name, names, weight.to(model.dtype)))
    stored = {"name": name, "classes": names}
    setattr(model.config, CONFIG, [*(getattr(model.config, CONFIG, None) or []), stored])
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
        [N, C] float32 on the CPU; the classes are ``clipft.heads.heads_of(model)[head].class_names``.

    Raises:
        ValueError: there is no such head.
    """
    from clipft.embedding import embed

    found = heads_of(model)
    if head not in found:
        raise ValueError(
            f"head: expected one of the model's heads, {sorted(found) or 'of which it has none'}, got {head!r}"
        )
    embeds = embed(model, processor, images=images, batch_size=batch_size, num_workers=num_workers)
    with torch.no_grad():
        return found[head](embeds.to(found[head].weight.device)).softmax(1).cpu()


# ---- saved models ----


def _attach(model: Any, head: ClassificationHead) -> None:
    if not hasattr(model, "heads"):
        model.heads = nn.ModuleList()
    model.heads.append(head)


def restore_heads(model: Any) -> None:
    """Give a model the heads that its configuration names, without their weights, which are loaded next."""
    from clipft.families.registry import family_of

    for stored in getattr(model.config, CONFIG, None) or []:
        weight = torch.empty(len(stored["classes"]), family_of(model).dim(model.config))
        _attach(model, ClassificationHead(stored["name"], stored["classes"], weight))


def with_heads(kind: Any) -> Any:
    """A model class whose instances are made with the heads that their configuration names, for ``from_pretrained``."""

    class WithHeads(kind):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            restore_heads(self)

    WithHeads.__name__ = kind.__name__
    return WithHeads
