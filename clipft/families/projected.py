"""What families have in common whose towers pool one token, which a projection outside the tower makes the embedding.

Such an image tower needs its class token alone of its last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from clipft.families.family import TowerName
from clipft.families.forward import PairForward, is_watched, records, stand_in

__all__ = ["ClassTokenLayer", "FirstTokenLayer", "ProjectedForward", "fuse_last_layer", "needs_all_tokens"]


class ProjectedForward(PairForward):
    """The towers and their projections, of a fused model."""

    if TYPE_CHECKING:
        config: Any
        text_model: Any
        vision_model: Any
        visual_projection: nn.Linear
        text_projection: nn.Linear

    def _of_pooled(self, tower: TowerName, pooled: Tensor) -> tuple[Tensor, Any]:
        projection = self.visual_projection if tower == "vision" else self.text_projection
        output: Any = BaseModelOutputWithPooling(pooler_output=projection(pooled))
        return output.pooler_output, output

    def _of_pictures(self, pictures: dict[str, Any], all_tokens: bool, kwargs: dict[str, Any]) -> Any:
        everything = all_tokens or needs_all_tokens(self, kwargs)
        only = {} if everything else {"class_token_only": True}
        vision = self.get_image_features(**pictures, **only, **kwargs)
        vision.last_hidden_state = vision.last_hidden_state if everything else None
        return vision

    def get_input_embeddings(self) -> nn.Module:
        """Of the text tower, as a SigLIP says: accelerate's FSDP asks for them."""
        return cast(nn.Module, self.text_model.get_input_embeddings())


# ---- the image tower's last layer ----


class FirstTokenLayer(nn.Module):
    """A last layer that computes the first token alone, where no more is wanted (``class_token_only``)."""

    if TYPE_CHECKING:
        _first: Callable[..., Tensor]  # [B, L, D] -> [B, 1, D]

    def forward(self, hidden_states: Tensor, *mask: Any, class_token_only: bool = False, **kwargs: Any) -> Tensor:
        """As the plain class's: [B, L, D] -> [B, L, D], or [B, 1, D]. Chinese-CLIP's of transformers 5.4 takes no
        mask."""
        if not class_token_only or any(one is not None for one in (*mask, kwargs.get("attention_mask"))):
            every: Tensor = super().forward(hidden_states, *mask, **kwargs)
            return every
        kwargs.pop("attention_mask", None)
        return self._first(hidden_states, **kwargs)


class ClassTokenLayer(FirstTokenLayer):
    """The image tower's last layer. With ``class_token_only`` it attends from the class token alone, and computes what
    comes after for that one: a twelfth of ViT-B's layers at a sixth of its cost.
    """

    if TYPE_CHECKING:
        self_attn: Any
        layer_norm1: nn.LayerNorm
        layer_norm2: nn.LayerNorm
        mlp: nn.Module

    def _first(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
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
        projected.view(len(states), -1, projected.shape[2] // attention.head_dim, attention.head_dim).transpose(1, 2)
        for projected in (queries, attention.k_proj(states), attention.v_proj(states))
    ]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    dropout = attention.dropout if attention.training else 0.0
    output, _ = attend(attention, *heads, None, scaling=attention.scale, dropout=dropout, **kwargs)
    return cast(Tensor, attention.out_proj(output.reshape(len(states), 1, -1).contiguous()))
