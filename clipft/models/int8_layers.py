"""The modules of an int8 model, which take over those of Hugging Face's by class, whatever the family.

A form here goes before the class that it stands in for (``quantized_class``), so that instances keep their place, and
whoever asks for their kind still finds it. Attention has queries, keys and values in one product (``qkv_proj``), the
MLP's first layer its activation, and the patch convolution is a linear layer over patches.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from clipft.families.forward import class_before, is_watched
from clipft.families.projected import FirstTokenLayer
from clipft.models.fused import ignores_causal, is_causal, replaces_sdpa
from clipft.ops.attention import attention
from clipft.ops.nn import QuantizedLinear

__all__ = [
    "BLOCKS",
    "Block",
    "QuantizedAttention",
    "QuantizedBertLayer",
    "QuantizedEncoderLayer",
    "QuantizedIntermediate",
    "QuantizedLastLayer",
    "QuantizedMLP",
    "QuantizedPatchEmbedding",
    "QuantizedSelfAttention",
    "QuantizedVisionEmbeddings",
    "quantized_class",
]


@functools.cache
def quantized_class(form: Any, plain: Any) -> Any:
    """``plain`` as ``form``, one of the classes below or of ``clipft.models.int8``."""
    name = form.__name__.replace("Model", plain.__name__)  # QuantizedCLIPModel
    return class_before(form, plain, quantized_class, name, __module__=form.__module__)


class QuantizedAttention(nn.Module):
    """Queries, keys and values as one product of one quantised input."""

    qkv_proj: QuantizedLinear
    out_proj: QuantizedLinear
    config: Any
    num_heads: int
    head_dim: int
    scale: float

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
        first_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain class's: [B, L, D] -> [B, L, D] and the attention weights, if its function gives any. ``norm``
        and ``residual``: as those of ``QuantizedLinear.forward``. ``first_only``: for the first token alone,
        [B, 1, D]."""
        length = hidden_states.shape[1]
        states, queries = self.qkv_proj(hidden_states, norm), 1 if first_only else length
        output, weights = self._attend(states, queries, attention_mask, **kwargs)
        return (self.out_proj(output) if residual is None else self.out_proj(output, None, residual)), weights

    def k_proj(self, hidden_states: Tensor) -> Tensor:
        """The keys alone, as the plain class's layer of that name: [B, L, D] -> [B, L, D]."""
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)[1]

    def v_proj(self, hidden_states: Tensor) -> Tensor:
        """The values alone, likewise."""
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)[2]

    def _attend(
        self, states: Tensor, queries: int, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, 3 * D] queries, keys and values -> [B, queries, D], and the weights if the model's function gives any.

        ``clipft.attention`` where it takes over from torch's (the "sdpa" that transformers chooses): not with a mask,
        which a batch of texts of several lengths has.
        """
        if ignores_causal(self):
            kwargs = {"is_causal": False}
        if replaces_sdpa(self, states, [attention_mask], kwargs):
            causal = is_causal(self, kwargs)
            return attention(states, self.num_heads, scale=self.scale, causal=causal, queries=queries), None
        batch, length = states.shape[:2]
        heads = states.view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mask = attention_mask
        output, weights = attend(
            self, query[:, :, :queries], key, value, mask, scaling=self.scale, dropout=0.0, **kwargs
        )
        return output.reshape(batch, queries, -1), weights


class QuantizedMLP(nn.Module):
    """The activation belongs to ``fc1``."""

    fc1: QuantizedLinear
    fc2: QuantizedLinear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the plain class's."""
        states: Tensor = self.fc2(self.fc1(hidden_states))
        return states


class QuantizedEncoderLayer(nn.Module):
    """All in int8: norms and residuals are done with the products, and the MLP's two layers row block by row block."""

    layer_norm1: nn.LayerNorm
    layer_norm2: nn.LayerNorm
    self_attn: QuantizedAttention
    mlp: QuantizedMLP

    def forward(self, hidden_states: Tensor, *mask: Any, **kwargs: Any) -> Tensor:
        """As the plain class's: [B, L, D] -> [B, L, D]. Chinese-CLIP's of transformers 5.4 takes no mask."""
        if is_watched(self.layer_norm1, self.layer_norm2, self.mlp, self.mlp.fc1, self.mlp.fc2, self.self_attn):
            watched: Tensor = super().forward(hidden_states, *mask, **kwargs)
            return watched
        attention_mask = mask[0] if mask else kwargs.pop("attention_mask", None)
        return self._block(hidden_states, hidden_states, attention_mask, **kwargs)

    def _block(self, states: Tensor, residual: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        states, _ = self.self_attn(states, attention_mask, norm=self.layer_norm1, residual=residual, **kwargs)
        result: Tensor = self.mlp.fc1(states, self.layer_norm2, states, self.mlp.fc2)
        return result


class QuantizedLastLayer(FirstTokenLayer, QuantizedEncoderLayer):
    """The image tower's last layer, which computes the class token alone where no more is wanted."""

    def _first(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self._block(hidden_states, hidden_states[:, :1], None, first_only=True, **kwargs)


class QuantizedSelfAttention(QuantizedAttention):
    """BERT's, whose output projection is another module's."""

    num_heads = property(lambda self: self.num_attention_heads)  # type: ignore[assignment]
    head_dim = property(lambda self: self.attention_head_size)  # type: ignore[assignment]
    scale = property(lambda self: self.scaling)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain class's: [B, L, D] -> [B, L, D] and the attention weights, if its function gives any."""
        return self._attend(self.qkv_proj(hidden_states), hidden_states.shape[1], attention_mask, **kwargs)


class QuantizedIntermediate(nn.Module):
    """The first half of BERT's MLP. The activation belongs to ``dense``."""

    dense: QuantizedLinear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the plain class's."""
        states: Tensor = self.dense(hidden_states)
        return states


class QuantizedBertLayer(nn.Module):
    """All in int8: residuals are added with the products, and the MLP's two layers done row block by row block."""

    attention: Any
    intermediate: QuantizedIntermediate
    output: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As the plain class's: [B, L, D] -> [B, L, D]."""
        attention, up, down = self.attention, self.intermediate.dense, self.output.dense
        if is_watched(attention, attention.output, self.intermediate, up, self.output, down):
            watched: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return watched
        attended, _ = attention.self(hidden_states, attention_mask, **kwargs)
        states = attention.output.LayerNorm(attention.output.dense(attended, None, hidden_states))
        result: Tensor = self.output.LayerNorm(up(states, None, states, down))
        return result


class QuantizedPatchEmbedding(QuantizedLinear):
    """The patch convolution, whose patches do not overlap, as a linear layer over them."""

    def __init__(self, channels: int, patch: int, out_features: int, bias: bool, **kwargs: Any) -> None:
        super().__init__(channels * patch * patch, out_features, bias, **kwargs)
        self.channels, self.patch = channels, patch

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, H, W] -> [B, patches, out]."""
        return super().forward(self.patches(pixel_values))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, C * patch * patch], rows and columns of pixels beyond whole patches left out."""
        batch, side = pixel_values.shape[0], self.patch
        rows, cols = pixel_values.shape[2] // side, pixel_values.shape[3] // side
        whole = pixel_values[:, :, : rows * side, : cols * side].reshape(batch, self.channels, rows, side, cols, side)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, self.in_features)


class QuantizedVisionEmbeddings(nn.Module):
    """Patches by ``QuantizedPatchEmbedding``, after the class token where the tower has one."""

    class_embedding: Tensor
    patch_embedding: QuantizedPatchEmbedding
    position_embedding: nn.Embedding
    image_size: int
    interpolate_pos_encoding: Any

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """As the plain class's: [B, C, H, W] -> [B, tokens, D]."""
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values: expected pictures of the model's size, {self.image_size} x {self.image_size}, got "
                f"{height} x {width}; interpolate_pos_encoding=True takes others"
            )
        tokens = self.patch_embedding(pixel_values.to(self.position_embedding.weight.dtype))
        if hasattr(self, "class_embedding"):
            classes = self.class_embedding.expand(tokens.shape[0], 1, -1)  # not len(), which export would freeze
            tokens = torch.cat([classes, tokens], dim=1)
        if interpolate_pos_encoding:
            return tokens + self.interpolate_pos_encoding(tokens, height, width)
        return tokens + self.position_embedding.weight


# ---- blocks ----


@dataclass(frozen=True)
class Block:
    """How the layers of a tower become int8: the names of their parts, and the forms.

    Attributes:
        qkv: the linear layers of queries, keys and values, which become one, ``qkv_proj``, of a module that becomes an
            ``attention``.
        activated: the end of the name of the linear layer that an activation follows, which it takes along, in a module
            that becomes an ``mlp``.
        parts: the linear layers that must all be int8 for the layer to become a ``layer``.
        first_only: the form of a last layer of which the first token is enough.
        norms: from the end of a linear layer's name to the norm in the module around that, first found, whose output
            nothing else takes in.
    """

    qkv: tuple[str, str, str]
    attention: type
    activated: str
    mlp: type
    parts: tuple[str, ...]
    layer: type
    first_only: type | None
    norms: Mapping[str, tuple[str, ...]]


BLOCKS: dict[Literal["clip", "bert"], Block] = {
    "clip": Block(
        qkv=("q_proj", "k_proj", "v_proj"),
        attention=QuantizedAttention,
        activated="mlp.fc1",
        mlp=QuantizedMLP,
        parts=("self_attn.qkv_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
        layer=QuantizedEncoderLayer,
        first_only=QuantizedLastLayer,
        norms={"self_attn.qkv_proj": ("layer_norm1",), "mlp.fc1": ("layer_norm2", "layernorm")},  # of a layer, or head
    ),
    "bert": Block(
        qkv=("query", "key", "value"),
        attention=QuantizedSelfAttention,
        activated="intermediate.dense",
        mlp=QuantizedIntermediate,
        parts=("attention.self.qkv_proj", "attention.output.dense", "intermediate.dense", "output.dense"),
        layer=QuantizedBertLayer,
        first_only=None,
        norms={},  # the residual takes their outputs in too
    ),
}
