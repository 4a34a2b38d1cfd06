"""CLIP (arXiv:2103.00020): Hugging Face's ``CLIPModel``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer, CLIPOutput
from transformers.utils.generic import can_return_tuple

from clipft.families.family import Family, Tower
from clipft.families.forward import stand_in
from clipft.families.projected import ClassTokenLayer, ProjectedForward, fuse_last_layer
from clipft.families.value_path import class_token_patches

__all__ = ["CLIP", "CLIPForward", "FusedCLIPOutput", "FusedLastLayer", "check_end"]


# ---- the model ----


@dataclass
class FusedCLIPOutput(CLIPOutput):
    """``CLIPOutput`` and, last, the multiplier of the cosines (``logit_scale.exp()``) and the weights of the model's
    classification heads, so that a loss outside the model can use them.
    """

    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class CLIPForward(ProjectedForward):
    """``forward`` of a fused ``CLIPModel``."""

    output_class: type = FusedCLIPOutput

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_logits: bool | None = None,
        image_pooler_output: Tensor | None = None,
        text_pooler_output: Tensor | None = None,
        text_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``CLIPModel.forward``, but with ``return_loss=True`` logits come only with ``return_logits=True``. Without
        them the image tower's last layer computes the class token alone, unless a hook or a replaced forward is there
        for all tokens, and ``last_hidden_state`` is None there; and with neither loss nor logits pictures or texts may
        come alone.

        ``image_pooler_output`` and ``text_pooler_output`` [N, D]: what that tower gave before the projection, in place
        of pixels or tokens. ``text_index`` [N]: the text of each picture, where texts that are equal come once.
        """
        return self._contrast(
            {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding},
            {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids},
            return_loss=return_loss,
            return_logits=return_logits,
            image_pooler_output=image_pooler_output,
            text_pooler_output=text_pooler_output,
            text_index=text_index,
            **kwargs,
        )


FusedLastLayer = stand_in(ClassTokenLayer, CLIPEncoderLayer)  # what pickles name


# ---- the end of a text ----

_LEGACY_END = 2  # what configurations said before transformers 4.31, whatever the tokenizer had


def check_end(model: Any, tokenizer: Any) -> None:
    """That the token at which texts are pooled is the one that the tokenizer ends them with.

    Raises:
        ValueError: it is another one.
    """
    said, end = model.config.text_config.eos_token_id, tokenizer.eos_token_id
    if end is None or tokenizer("a")["input_ids"][-1] != end:
        raise ValueError("expected a tokenizer that ends texts with its end token, at which the model pools them")
    if said != end:
        raise ValueError(
            f"config.json says that texts end with token {said} (text_config.eos_token_id), the tokenizer ends them "
            f"with {end}: all texts would have one embedding"
        )


def _fit_end(model: Any, tokenizer: Any) -> str | None:
    """A text is pooled at its end token. Where an old configuration names none, transformers takes the largest number
    for it, which a token that was added later is.
    """
    config, end = model.config.text_config, tokenizer.eos_token_id
    if config.eos_token_id != _LEGACY_END or end in (None, _LEGACY_END):
        check_end(model, tokenizer)
    elif end != max(tokenizer.get_vocab().values()):
        config.eos_token_id = model.text_model.eos_token_id = end
        return f"texts are pooled at the tokenizer's end token, {end}; config.json has the old eos_token_id 2"
    return None


CLIP = Family(
    title="CLIP",
    model_type="clip",
    model=CLIPModel,
    processor=CLIPProcessor,
    forward=CLIPForward,
    loss="contrastive",
    max_log_scale=math.log(100.0),  # beyond it training is unstable (arXiv:2103.00020, 2.5)
    padding="longest",
    text_length=77,
    vision=Tower(
        module="vision_model",
        layers="vision_model.encoder.layers",
        projection="visual_projection",
        stem=("vision_model.embeddings", "vision_model.pre_layrnorm"),
        pools_first=True,
        mlp=CLIPMLP,
        positions="vision_model.embeddings",
        tokens_before=1,
        embed_patches=class_token_patches,
    ),
    text=Tower(
        module="text_model",
        layers="text_model.encoder.layers",
        projection="text_projection",
        stem=("text_model.embeddings",),
        mlp=CLIPMLP,
        positions="text_model.embeddings",
    ),
    dim=lambda config: int(config.projection_dim),
    fuse_layers=partial(fuse_last_layer, plain=CLIPEncoderLayer),
    fit_tokenizer=_fit_end,
    onnx=True,
    int8=True,
)
