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

from clipft.families.registry import base_model, family_of
from clipft.models.formats import HEADS_KEY

__all__ = ["LABEL", "ClassificationHead", "attach_head", "head_logits", "heads_of", "restore_heads", "with_heads"]

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


# ---- saved models ----


def attach_head(model: Any, head: ClassificationHead) -> None:
    """One more."""
    if not hasattr(model, "heads"):
        model.heads = nn.ModuleList()
    model.heads.append(head)


def _stored(config: Any) -> list[dict[str, Any]]:
    """The heads that a configuration names."""
    heads = getattr(config, HEADS_KEY, None) or []
    if not isinstance(heads, list) or not all(_is_head(head) for head in heads):
        raise ValueError(f"expected {HEADS_KEY} to be a list of heads, each with its name and classes")
    return heads


def _is_head(stored: Any) -> bool:
    if not isinstance(stored, dict) or not isinstance(stored.get("name"), str):
        return False
    classes = stored.get("classes")
    return isinstance(classes, list) and bool(classes) and all(isinstance(name, str) for name in classes)


def restore_heads(model: Any) -> None:
    """Give a model the heads that its configuration names, without their weights, which are loaded next."""
    for stored in _stored(model.config):
        weight = torch.empty(len(stored["classes"]), family_of(model).dim(model.config))
        attach_head(model, ClassificationHead(stored["name"], stored["classes"], weight))


def with_heads(kind: Any) -> Any:
    """A model class whose instances are made with the heads that their configuration names, for ``from_pretrained``."""

    class WithHeads(kind):  # type: ignore[valid-type,misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            restore_heads(self)

    WithHeads.__name__ = kind.__name__
    return WithHeads
