"""Embeddings of single patches of a picture, which no ViT was trained to give: the way from its last layers' values to
the embedding, past all that mixes patches that are unlike.

In each layer of the upper half patches attend to those whose keys are like theirs, and the values that they find go
straight to where the class token is read, without residuals and MLPs, whose large common parts would bury them. Layers
compute their states as ever beside it. After CLIP Surgery (arXiv:2304.05653), in which values attend to values, and
MaskCLIP (arXiv:2112.01071), which takes the last layer's values alone; on drawings keys found more.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["class_token_patches", "pooling_head_patches"]


def class_token_patches(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a tower that pools its class token, like CLIP's: see ``Tower.embed_patches``."""
    states, pooled = _of_values(model, pixel_values)
    return model.visual_projection(model.vision_model.post_layernorm(states[:, 1:])), pooled


def pooling_head_patches(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a tower whose head attends to the patches, as SigLIP's: see ``Tower.embed_patches``. All of the head's
    attention is on the one patch.
    """
    tower = model.vision_model
    states, pooled = _of_values(model, pixel_values)
    head = tower.head
    attended = head.attention.out_proj(_values_of_head(head.attention, tower.post_layernorm(states)))
    return attended + head.mlp(head.layernorm(attended)), pooled


def _of_values(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, L, D], the sum of what the upper half of the layers finds; and the pictures' embeddings."""
    layers = model.vision_model.encoder.layers
    found: list[Tensor] = []

    def look(layer: Any, states: tuple[Tensor, ...]) -> None:
        found.append(_attend(layer.self_attn, layer.layer_norm1(states[0])))

    with ExitStack() as stack:  # not output_hidden_states, which leaves transformers' own hooks behind
        for layer in layers[len(layers) // 2 :]:
            stack.callback(layer.register_forward_pre_hook(look).remove)
        output = model.get_image_features(pixel_values=pixel_values)
    return torch.stack(found).sum(0), output.pooler_output


def _attend(attention: Any, states: Tensor) -> Tensor:
    """Attention whose queries are the keys: [N, L, D] -> [N, L, D]."""
    keys, values = (
        product(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for product in (attention.k_proj, attention.v_proj)
    )
    mixed = F.scaled_dot_product_attention(keys, keys, values, scale=attention.scale)
    attended: Tensor = attention.out_proj(mixed.transpose(1, 2).reshape(states.shape))
    return attended


def _values_of_head(attention: Any, states: Tensor) -> Tensor:
    """Of torch's attention, or of one whose keys and values are a linear layer (``siglip.ProbeAttention``)."""
    if isinstance(attention, nn.MultiheadAttention):
        width = attention.embed_dim
        return F.linear(states, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    values: Tensor = attention.kv_proj(states).chunk(2, dim=-1)[1]
    return values
