"""Chinese-CLIP (arXiv:2211.01335): CLIP's image tower beside a BERT; Hugging Face's ``ChineseCLIPModel``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import ChineseCLIPModel, ChineseCLIPProcessor
from transformers.models.chinese_clip.modeling_chinese_clip import (
    ChineseCLIPOutput,
    ChineseCLIPVisionLayer,
    ChineseCLIPVisionMLP,
)
from transformers.utils.generic import can_return_tuple

from clipft.families.clip import CLIP
from clipft.families.family import Tower
from clipft.families.projected import ProjectedForward, fuse_last_layer

__all__ = ["CHINESE_CLIP"]


@dataclass
class FusedChineseCLIPOutput(ChineseCLIPOutput):
    """``ChineseCLIPOutput`` and, last, what :class:`clipft.families.clip.FusedCLIPOutput` has."""

    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class ChineseCLIPForward(ProjectedForward):
    """``forward`` of a fused ``ChineseCLIPModel``."""

    output_class = FusedChineseCLIPOutput

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> FusedChineseCLIPOutput:
        """As ``ChineseCLIPModel.forward``; ``last_hidden_state``, logits and more arguments are as of
        :class:`clipft.families.clip.CLIPForward`.
        """
        pictures = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        output: FusedChineseCLIPOutput = self._contrast(pictures, texts, return_loss=return_loss, **kwargs)
        return output


def _first_token(output: Any) -> Tensor:
    pooled: Tensor = output.last_hidden_state[:, 0]
    return pooled


def _fit_start(model: Any, tokenizer: Any) -> str | None:
    """A text is pooled at its first token, which is BERT's [CLS] and no padding."""
    start = tokenizer.cls_token_id
    if start is None or tokenizer("a")["input_ids"][0] != start:
        raise ValueError("expected a tokenizer that begins texts with [CLS], at which the model pools them")
    if tokenizer.padding_side == "right":
        return None
    tokenizer.padding_side = "right"
    return "captions are padded on the right: the first token is pooled; the tokenizer says otherwise"


CHINESE_CLIP = replace(
    CLIP,
    title="Chinese-CLIP",
    model_type="chinese_clip",
    model=ChineseCLIPModel,
    processor=ChineseCLIPProcessor,
    forward=ChineseCLIPForward,
    text_length=512,  # of every BERT; captions in training had up to 52
    vision=replace(CLIP.vision, mlp=ChineseCLIPVisionMLP),
    text=Tower(
        module="text_model",
        layers="text_model.encoder.layer",
        projection="text_projection",
        stem=("text_model.embeddings",),
        linears=("query", "key", "value", "dense"),
        block="bert",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        pooled=_first_token,
    ),
    fuse_layers=partial(fuse_last_layer, plain=ChineseCLIPVisionLayer),
    fit_tokenizer=_fit_start,
)
