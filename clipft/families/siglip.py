"""SigLIP (arXiv:2303.15343), and SigLIP 2 at a fixed resolution, which comes as one: Hugging Face's ``SiglipModel``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaTokenizer, PreTrainedTokenizerFast, Siglip2Tokenizer, SiglipModel, SiglipProcessor
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead, SiglipOutput
from transformers.utils.generic import can_return_tuple

from clipft.families.family import EmbeddingTower, Family, Tower
from clipft.families.forward import PairForward
from clipft.families.siglip_tokenizer import fast_tokenizer
from clipft.families.value_path import pooling_head_patches

__all__ = ["SIGLIP", "SiglipTowersForward", "embedding_dim", "fit_captions", "siglip_tower"]


@dataclass
class FusedSiglipOutput(SiglipOutput):
    """``SiglipOutput`` and, last, what the loss multiplies and adds to cosines, so that a loss outside the model can
    use it.
    """

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class SiglipTowersForward(PairForward):
    """What the fused SigLIP and SigLIP 2 have in common: a tower gives its embedding already, but for the length."""

    output_class = FusedSiglipOutput


class SiglipForward(SiglipTowersForward):
    """``forward`` of a fused ``SiglipModel``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> FusedSiglipOutput:
        """As ``SiglipModel.forward``, but with ``return_loss=True`` logits come only with ``return_logits=True``. More
        arguments: see :class:`clipft.families.clip.CLIPForward`.
        """
        pictures = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._contrast(pictures, texts, return_loss=return_loss, **kwargs)


# ---- the pooling head in linear layers ----


class ProbeAttention(nn.Module):
    """The pooling head's attention, from one query that is the same for every picture, so that it is no product."""

    def __init__(self, attention: nn.MultiheadAttention, probe: Tensor) -> None:
        super().__init__()
        self.heads, width = attention.num_heads, attention.embed_dim
        weight, bias = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
        query = F.linear(probe.detach().float(), weight[:width].float(), bias[:width].float())
        self.query = nn.Parameter(query.to(weight.dtype))  # [1, 1, D]
        self.kv_proj = nn.Linear(width, 2 * width, device="meta")
        self.kv_proj.weight = nn.Parameter(weight[width:].clone())
        self.kv_proj.bias = nn.Parameter(bias[width:].clone())
        self.out_proj = attention.out_proj

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, D] -> [B, 1, D]."""
        batch, length, width = states.shape
        keys, values = self.kv_proj(states).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        query = self.query.view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        pooled: Tensor = self.out_proj(F.scaled_dot_product_attention(query, keys, values).reshape(batch, 1, width))
        return pooled


class SplitPoolingHead(SiglipMultiheadAttentionPoolingHead):
    """``SiglipMultiheadAttentionPoolingHead`` around a :class:`ProbeAttention`."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]."""
        pooled = self.attention(hidden_state)
        embeds: Tensor = (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
        return embeds


def split_pooling_head(model: Any) -> None:
    """Keys and values become a linear layer, and the query what it is."""
    head = getattr(model.vision_model, "head", None)
    if head is None:
        raise ValueError("model: expected a vision tower with its pooling head (vision_use_head)")
    head.attention = ProbeAttention(head.attention, head.probe)
    del head.probe
    head.__class__ = SplitPoolingHead


# ---- the family ----


def siglip_tower(name: str) -> Tower:
    """Of either family: the head inside is the projection."""
    return EmbeddingTower(
        module=f"{name}_model",
        layers=f"{name}_model.encoder.layers",
        projection=f"{name}_model.head",
        stem=(f"{name}_model.embeddings",),
        positions=f"{name}_model.embeddings",
    )


def embedding_dim(config: Any) -> int:
    """Of either family."""
    return int(config.text_config.projection_size)


def _may_be_gemma(tokenizer: Any) -> bool:
    """transformers 5.4 loads it as a tokenizer of no class of its own: BPE that falls back on bytes, as no T5 has."""
    if type(tokenizer) is PreTrainedTokenizerFast:
        return bool(getattr(tokenizer.backend_tokenizer.model, "byte_fallback", False))
    return isinstance(tokenizer, Siglip2Tokenizer)


def fit_captions(model: Any, tokenizer: Any) -> str | None:
    """Of either family, as big_vision trained them: in small letters and padded on the right. SigLIP 2's checkpoints
    come with Gemma's tokenizer, which does neither by itself.
    """
    said = []
    if tokenizer.padding_side != "right":
        tokenizer.padding_side = "right"
        said.append("padded on the right")
    if isinstance(tokenizer, GemmaTokenizer) or (
        _may_be_gemma(tokenizer) and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]
    ):
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
        backend.normalizer = normalizers.Sequence(steps)
        tokenizer.__class__ = Siglip2Tokenizer  # which is saved, and lowers letters in transformers too
        said.append("in small letters")
    tokenizer.model_input_names = ["input_ids"]
    return f"captions are {' and '.join(said)}, as SigLIP was trained; its tokenizer says otherwise" if said else None


SIGLIP = Family(
    title="SigLIP, SigLIP 2 of a fixed size",
    model_type="siglip",
    model=SiglipModel,
    processor=SiglipProcessor,
    forward=SiglipForward,
    loss="sigmoid",
    max_log_scale=None,  # the checkpoints stand above 100
    padding="max_length",
    text_length=64,
    vision=replace(siglip_tower("vision"), tokens_before=0, embed_patches=pooling_head_patches),
    text=siglip_tower("text"),
    dim=embedding_dim,
    scale_shape=(1,),
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    split_layers=split_pooling_head,
    fit_tokenizer=fit_captions,
    fast_tokenizer=fast_tokenizer,
    onnx=True,
    int8=True,
)
