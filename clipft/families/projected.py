"""What families have in common whose towers pool one token, which a projection outside the tower makes the embedding.

Such an image tower needs its class token alone of its last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from clipft.families.forward import PairForward, given, is_watched, records, stand_in

__all__ = ["ClassTokenLayer", "ProjectedForward", "fuse_last_layer", "needs_all_tokens"]


class ProjectedForward(PairForward):
    """The towers and their projections, of a fused model."""

    if TYPE_CHECKING:
        config: Any
        text_model: Any
        vision_model: Any
        visual_projection: nn.Linear
        text_projection: nn.Linear

    def _contrast(
        self,
        pictures: dict[str, Any],
        texts: dict[str, Any],
        *,
        return_loss: bool | None,
        return_logits: bool | None = None,
        image_pooler_output: Tensor | None = None,
        text_pooler_output: Tensor | None = None,
        text_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward``, from what ``get_image_features`` and ``get_text_features`` take: see
        :class:`clipft.families.clip.CLIPForward`."""
        if return_logits is None:
            return_logits = not return_loss
        kwargs = given(kwargs)
        everything = return_logits or needs_all_tokens(self, kwargs)
        vision: Any = None
        text: Any = None
        if image_pooler_output is not None:
            vision = BaseModelOutputWithPooling(pooler_output=self.visual_projection(image_pooler_output))
        elif pictures["pixel_values"] is not None:
            only = {} if everything else {"class_token_only": True}
            vision = self.get_image_features(**pictures, **only, **kwargs)
            vision.last_hidden_state = vision.last_hidden_state if everything else None
        if text_pooler_output is not None:
            text = BaseModelOutputWithPooling(pooler_output=self.text_projection(text_pooler_output))
        elif texts["input_ids"] is not None:
            text = self.get_text_features(**texts, **kwargs)
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
        return cast(nn.Module, self.text_model.get_input_embeddings())


# ---- the image tower's last layer ----


class ClassTokenLayer(nn.Module):
    """The image tower's last layer. With ``class_token_only`` it attends from the class token alone, and computes what
    comes after for that one: a twelfth of ViT-B's layers at a sixth of its cost.
    """

    if TYPE_CHECKING:
        self_attn: Any
        layer_norm1: nn.LayerNorm
        layer_norm2: nn.LayerNorm
        mlp: nn.Module

    def forward(self, hidden_states: Tensor, *mask: Any, class_token_only: bool = False, **kwargs: Any) -> Tensor:
        """As ``CLIPEncoderLayer.forward``: [B, L, D] -> [B, L, D], or [B, 1, D]. Chinese-CLIP's of transformers 5.4
        takes no mask."""
        if not class_token_only or any(one is not None for one in (*mask, kwargs.get("attention_mask"))):
            every: Tensor = super().forward(hidden_states, *mask, **kwargs)
            return every
        kwargs.pop("attention_mask", None)
        token = hidden_states[:, :1]
        token = token + _attend_from_first(self.self_attn, self.layer_norm1(hidden_states), **kwargs)
        return token + cast(Tensor, self.mlp(self.layer_norm2(token)))


def needs_all_tokens(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether more than the class token is asked for of the image tower, by a configuration, a call, or someone who
    waits for what its last layer, or what holds that, gives."""
    tower = model.vision_model
    if records(model.config.vision_config, kwargs):
        return True
    return is_watched(tower, tower.encoder, tower.encoder.layers, *tower.encoder.layers[-1].modules())


def fuse_last_layer(model: Any, plain: Any) -> None:
    """Take over a model's last image layer, where it is Hugging Face's own, of the class ``plain``."""
    last, fused = model.vision_model.encoder.layers[-1], stand_in(ClassTokenLayer, plain)
    if type(last) is plain:
        last.__class__ = fused


def _attend_from_first(attention: Any, states: Tensor, **kwargs: Any) -> Tensor:
    """The first row of ``attention(states)``: [B, L, D] -> [B, 1, D]."""
    queries = attention.q_proj(states[:, :1])
    heads = [
        projected.view(len(states), -1, attention.num_heads, attention.head_dim).transpose(1, 2)
        for projected in (queries, attention.k_proj(states), attention.v_proj(states))
    ]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    output, _ = attend(attention, *heads, None, scaling=attention.scale, dropout=dropout, **kwargs)
    return cast(Tensor, attention.out_proj(output.reshape(len(states), 1, -1).contiguous()))
