"""What a model family is: all in which CLIP, SigLIP and SigLIP 2 differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import CLIPModel, PreTrainedModel, ProcessorMixin

__all__ = ["Family", "Tower"]

Tower = Literal["vision", "text"]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        model_type: as in ``config.json``.
        model, processor: Hugging Face's classes.
        loss: what it was pre-trained with, hence what it is fine-tuned with.
        max_log_scale: ceiling of ``logit_scale`` in training, if it has one.
        padding: of captions. SigLIP pools the last token, padding or not, and saw full lengths only.
        text_length: tokens of a caption, where the tokenizer does not say.
        projections: names of the last module of each tower, in the model; it stays trainable with ``"towers"``.
    """

    model_type: str
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    loss: Literal["contrastive", "sigmoid"]
    max_log_scale: float | None
    padding: Literal["longest", "max_length"]
    text_length: int
    projections: dict[Tower, str]

    def projection(self, model: nn.Module, tower: Tower) -> nn.Module:
        """What turns a tower's token or tokens to the embedding."""
        return model.get_submodule(self.projections[tower])

    def body(self, model: nn.Module, tower: Tower) -> list[nn.Module]:
        """A tower without its projection."""
        projection = self.projection(model, tower)
        return [part for part in model.get_submodule(f"{tower}_model").children() if part is not projection]

    def stem(self, model: nn.Module, tower: Tower) -> list[nn.Module]:
        """A tower before its first layer."""
        inside = dict(model.get_submodule(f"{tower}_model").named_children())
        return [inside[name] for name in ("embeddings", "pre_layrnorm") if name in inside]

    def dim(self, config: Any) -> int:
        """Of the embeddings."""
        return int(config.projection_dim if self.model is CLIPModel else config.text_config.projection_size)
