"""CLIP (arXiv:2103.00020): Hugging Face's ``CLIPModel``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPOutput, eager_attention_forward
from transformers.utils.generic import can_return_tuple

from clipft.families.family import Family, Tower
from clipft.families.forward import PairForward, given, is_watched, records

__all__ = ["CLIP", "FusedCLIPOutput", "FusedLastLayer", "fuse_last_layer", "needs_all_tokens"]


# ---- the model ----


@dataclass
class FusedCLIPOutput(CLIPOutput):
    """``CLIPOutput`` and, last, the multiplier of the cosines (``logit_scale.exp()``) and the weights of the model's
    classification heads, so that a loss outside the model can use them.
    """

    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class CLIPForward(PairForward):
    """``forward`` of a fused ``CLIPModel``."""

    output_class = FusedCLIPOutput

    if TYPE_CHECKING:
        config: Any
        text_model: Any
        vision_model: Any
        visual_projection: nn.Linear
        text_projection: nn.Linear

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
    ) -> FusedCLIPOutput:
        """As ``CLIPModel.forward``, but with ``return_loss=True`` logits come only with ``return_logits=True``. Without
        them the image tower's last layer computes the class token alone, unless a hook or a replaced forward is there
        for all tokens, and ``last_hidden_state`` is None there; and with neither loss nor logits pictures or texts may
        come alone.

        ``image_pooler_output`` and ``text_pooler_output`` [N, D]: what that tower gave before the projection, in place
        of pixels or tokens. ``text_index`` [N]: the text of each picture, where texts that are equal come once.
        """
        if return_logits is None:
            return_logits = not return_loss
        kwargs = given(kwargs)
        everything = return_logits or needs_all_tokens(self, kwargs)
        vision: Any = None
        text: Any = None
        if image_pooler_output is not None:
            vision = BaseModelOutputWithPooling(pooler_output=self.visual_projection(image_pooler_output))
        elif pixel_values is not None:
            only = {} if everything else {"class_token_only": True}
            vision = self.get_image_features(pixel_values, interpolate_pos_encoding, **only, **kwargs)
            vision.last_hidden_state = vision.last_hidden_state if everything else None
        if text_pooler_output is not None:
            text = BaseModelOutputWithPooling(pooler_output=self.text_projection(text_pooler_output))
        elif input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, position_ids, **kwargs)
        return self._pairs(
            None if vision is None else vision.pooler_output,
            None if text is None else text.pooler_output,
            return_loss=return_loss,
            return_logits=return_logits,
            text_index=text_index,
            vision_output=vision,
            text_output=text,
        )

    def get_input_embeddings(self) -> nn.Module:
        """Of the text tower, as a SigLIP says: accelerate's FSDP asks for them."""
        return self.text_model.get_input_embeddings()


# ---- the image tower's last layer ----


class FusedLastLayer(CLIPEncoderLayer):
    """The image tower's last layer. With ``class_token_only`` it attends from the class token alone, and computes what
    comes after for that one: a twelfth of ViT-B's layers at a sixth of its cost.
    """

    _clipft_stands_in_for = CLIPEncoderLayer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As ``CLIPEncoderLayer.forward``: [B, L, D] -> [B, L, D], or [B, 1, D]."""
        if not class_token_only or attention_mask is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[arg-type]
        token = hidden_states[:, :1]
        token = token + _attend_from_first(self.self_attn, self.layer_norm1(hidden_states), **kwargs)
        return token + self.mlp(self.layer_norm2(token))


FusedLastLayer.__name__ = CLIPEncoderLayer.__name__  # FSDP's wrapping policies go by it


def needs_all_tokens(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether more than the class token is asked for of the image tower, by a configuration, a call, or someone who
    waits for what its last layer, or what holds that, gives."""
    tower = model.vision_model
    if records(model.config.vision_config, kwargs):
        return True
    return is_watched(tower, tower.encoder, tower.encoder.layers, *tower.encoder.layers[-1].modules())


def fuse_last_layer(model: Any) -> None:
    """Take over a ``CLIPModel``'s last image layer, where it is Hugging Face's own."""
    last = model.vision_model.encoder.layers[-1]
    if type(last) is CLIPEncoderLayer:
        last.__class__ = FusedLastLayer


def _attend_from_first(attention: CLIPAttention, states: Tensor, **kwargs: Any) -> Tensor:
    """The first row of ``attention(states)``: [B, L, D] -> [B, 1, D]."""
    queries = attention.q_proj(states[:, :1])
    heads = [
        projected.view(len(states), -1, attention.num_heads, attention.head_dim).transpose(1, 2)
        for projected in (queries, attention.k_proj(states), attention.v_proj(states))
    ]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    output, _ = attend(attention, *heads, None, scaling=attention.scale, dropout=dropout, **kwargs)
    return attention.out_proj(output.reshape(len(states), 1, -1).contiguous())


def _class_token_encoder(model: Any) -> dict[str, Any]:
    fuse_last_layer(model)
    return {"class_token_only": True}


# ---- the end of a text ----

_LEGACY_END = 2  # what configurations said before transformers 4.31, whatever the tokenizer had


def _fit_end(model: Any, tokenizer: Any) -> str | None:
    """A text is pooled at its end token. Where an old configuration names none, transformers takes the largest number
    for it, which a token that was added later is.
    """
    config, end = model.config.text_config, tokenizer.eos_token_id
    said = config.eos_token_id
    if end is None:
        raise ValueError("expected a tokenizer with an end token, at which a CLIP's texts are pooled")
    if said == end or (said == _LEGACY_END and end == max(tokenizer.get_vocab().values())):
        return None
    if said != _LEGACY_END:
        raise ValueError(
            f"config.json says that texts end with token {said} (text_config.eos_token_id), the tokenizer ends them "
            f"with {end}: all texts would have one embedding"
        )
    config.eos_token_id = model.text_model.eos_token_id = end
    return f"texts are pooled at the tokenizer's end token, {end}; config.json has the old eos_token_id 2"


CLIP = Family(
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
    ),
    text=Tower(
        module="text_model",
        layers="text_model.encoder.layers",
        projection="text_projection",
        stem=("text_model.embeddings",),
    ),
    dim=lambda config: int(config.projection_dim),
    fuse_layers=fuse_last_layer,
    image_encoder=_class_token_encoder,
    fit_tokenizer=_fit_end,
    onnx=True,
    int8=True,
)
