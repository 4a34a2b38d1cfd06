"""What ``clipft.fuse`` makes of models: the classes that their instances are taken over by.

A model computes its loss with clipft's op and leaves the matrix of logits out unless it is asked for; a CLIP's
quick_gelu is one op; and its image tower's last layer, of which only the class token is used, computes only that. (A
SigLIP's heads pool all tokens of a picture, so no layer has anything to leave out.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPModel, Siglip2Model, SiglipModel
from transformers.activations import QuickGELUActivation
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPOutput, eager_attention_forward
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.utils.generic import can_return_tuple

from clipft.ops import quick_gelu
from clipft.ops.kernels import problem
from clipft.ops.losses import contrastive_loss, sigmoid_loss

__all__ = [
    "FusedCLIPModel",
    "FusedLastLayer",
    "FusedQuickGELU",
    "FusedSiglip2Model",
    "FusedSiglipModel",
    "fuse_last_layer",
    "loss_parameters",
    "normalised",
    "records",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 8  # of the ops' inputs


# ---- the model ----


@dataclass
class FusedCLIPOutput(CLIPOutput):
    """``CLIPOutput`` and, last, the multiplier of the cosines (``logit_scale.exp()``) and the weights of the model's
    classification heads, so that a loss outside the model can use them.
    """

    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class FusedCLIPModel(CLIPModel):
    """A ``CLIPModel`` whose ``forward`` uses ``clipft.contrastive_loss``. Made by :func:`fuse` only."""

    _clipft_stands_in_for = CLIPModel
    accepts_loss_kwargs = False  # HF's Trainer asks: the loss is a mean over the batch it sees

    @can_return_tuple
    def forward(  # type: ignore[override]
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
        them the image tower's last layer computes the class token alone, and ``last_hidden_state`` is None there; and
        with neither loss nor logits pictures or texts may come alone.

        ``image_pooler_output`` and ``text_pooler_output`` [N, D]: what that tower gave before the projection, in place
        of pixels or tokens. ``text_index`` [N]: the text of each picture, where texts that are equal come once.

        Embeddings are L2-normalised in float32, whatever the towers compute in: at a scale of 100, bfloat16 embeddings
        would move logits by tenths.
        """
        if return_logits is None:
            return_logits = not return_loss
        everything = return_logits or records(self.config.vision_config, kwargs)
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
        if (vision is None or text is None) and (return_loss or return_logits):
            raise ValueError(
                "forward: expected pixel_values and input_ids; one of them alone gives embeddings (return_logits=False)"
            )
        embeds: list[Any] = [None if side is None else normalised(side.pooler_output) for side in (vision, text)]
        image_embeds, text_embeds = embeds
        if text_index is not None and text_embeds is not None:
            text_embeds = text_embeds[text_index]
        scale = self.logit_scale.exp().reshape(())  # sharded, it is [1]
        loss = logits = None
        if return_loss:
            loss = contrastive_loss(image_embeds, text_embeds, scale)
        if return_logits:
            logits = scale * image_embeds @ text_embeds.t()
        return FusedCLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            logit_scale=scale,
            head_weights=head_weights(self),
        )

    def get_input_embeddings(self) -> nn.Module:
        """Of the text tower, as a SigLIP says: accelerate's FSDP asks for them."""
        return self.text_model.get_input_embeddings()

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_fused_model, (), self.__getstate__()


# save_pretrained writes the name into config.json, and peft name and module into adapter_config.json. Pickle and
# deepcopy, which would look for the class there, go by __reduce__.
FusedCLIPModel.__name__ = CLIPModel.__name__
FusedCLIPModel.__module__ = CLIPModel.__module__


def loss_parameters(output: Any) -> tuple[Tensor, ...]:
    """What losses take besides embeddings, of a fused model's output: the heads' weights, the scale, and the bias if
    there is one.
    """
    bias = getattr(output, "logit_bias", None)
    return (*(output.head_weights or ()), output.logit_scale, *(() if bias is None else (bias,)))


def head_weights(model: Any) -> tuple[Tensor, ...] | None:
    """[C, D] each, as an output of forward: several processes share the gradients of what they find in its graph."""
    weights = tuple(head.weight.view_as(head.weight) for head in getattr(model, "heads", ()))
    return weights or None


def _new_fused_model() -> FusedCLIPModel:
    return FusedCLIPModel.__new__(FusedCLIPModel)


def records(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether hidden states or attentions of all tokens are asked for, by a tower's configuration or by a call."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name) or getattr(config, name, False) for name in names)


def normalised(embeds: Tensor) -> Tensor:
    """[N, D], each row at length 1; float32 or wider."""
    return embeds / torch.linalg.vector_norm(embeds, dim=-1, keepdim=True, dtype=torch.float32)


# ---- layers ----


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


def fuse_last_layer(model: CLIPModel) -> None:
    """Take over a model's last image layer, where it is Hugging Face's own."""
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


class FusedQuickGELU(QuickGELUActivation):
    """A ``QuickGELUActivation`` on ``clipft.ops.quick_gelu``. Made by :func:`fuse` only."""

    _clipft_stands_in_for = QuickGELUActivation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the parameter's name in transformers)
        """Any shape, kept."""
        if problem(input.device) is not None or input.dtype not in _FLOATS or not 1 <= input.dim() <= _MAX_DIM:
            return super().forward(input)
        return quick_gelu(input)


FusedQuickGELU.__name__ = QuickGELUActivation.__name__  # what print(model) shows


@dataclass
class FusedSiglipOutput(SiglipOutput):
    """``SiglipOutput`` and, last, what the loss multiplies and adds to cosines, so that a loss outside the model can
    use it.
    """

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class _FusedSiglip:
    """What both have in common."""

    accepts_loss_kwargs = False  # HF's Trainer asks: the loss is a mean over the batch it sees

    if TYPE_CHECKING:
        logit_scale: nn.Parameter
        logit_bias: nn.Parameter

        def get_image_features(self, **kwargs: Any) -> Any: ...
        def get_text_features(self, **kwargs: Any) -> Any: ...
        def __getstate__(self) -> Any: ...

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
    ) -> FusedSiglipOutput:
        """The rest of ``forward``: as :meth:`FusedCLIPModel.forward`. What a tower gave is its embedding already, but
        for the length.
        """
        if return_logits is None:
            return_logits = not return_loss
        vision = text = None
        if image_pooler_output is None and pictures["pixel_values"] is not None:
            vision = self.get_image_features(**pictures, **kwargs)
            image_pooler_output = vision.pooler_output
        if text_pooler_output is None and texts["input_ids"] is not None:
            text = self.get_text_features(**texts, **kwargs)
            text_pooler_output = text.pooler_output
        image_embeds = None if image_pooler_output is None else normalised(image_pooler_output)
        text_embeds = None if text_pooler_output is None else normalised(text_pooler_output)
        if text_embeds is not None and text_index is not None:
            text_embeds = text_embeds[text_index]
        scale, bias = self.logit_scale.exp().reshape(()), self.logit_bias.reshape(())
        loss = logits = None
        if return_loss or return_logits:
            if image_embeds is None or text_embeds is None:
                raise ValueError(
                    "forward: expected pixel_values and input_ids; one of them alone gives embeddings, with "
                    "return_logits=False"
                )
            if return_loss:
                loss = sigmoid_loss(image_embeds, text_embeds, scale, bias)
            if return_logits:
                logits = scale * image_embeds @ text_embeds.t() + bias
        return FusedSiglipOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=None if logits is None else logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=cast(Any, text),
            vision_model_output=cast(Any, vision),
            logit_scale=scale,
            logit_bias=bias,
            head_weights=head_weights(self),
        )


class FusedSiglipModel(_FusedSiglip, SiglipModel):
    """A ``SiglipModel`` whose ``forward`` uses ``clipft.sigmoid_loss``. Made by :func:`clipft.fuse` only."""

    _clipft_stands_in_for = SiglipModel

    @can_return_tuple
    def forward(  # type: ignore[override]
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
        arguments: see :class:`FusedCLIPModel`.
        """
        pictures = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._contrast(pictures, texts, return_loss=return_loss, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_siglip, (), self.__getstate__()


class FusedSiglip2Model(_FusedSiglip, Siglip2Model):
    """A ``Siglip2Model`` whose ``forward`` uses ``clipft.sigmoid_loss``. Made by :func:`clipft.fuse` only."""

    _clipft_stands_in_for = Siglip2Model

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> FusedSiglipOutput:
        """As ``Siglip2Model.forward``, but with ``return_loss=True`` logits come only with ``return_logits=True``. More
        arguments: see :class:`FusedCLIPModel`.
        """
        pictures = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._contrast(pictures, texts, return_loss=return_loss, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_siglip2, (), self.__getstate__()


for _fused in (FusedSiglipModel, FusedSiglip2Model):  # why: see clipft.fused
    _fused.__name__, _fused.__module__ = (
        _fused._clipft_stands_in_for.__name__,
        _fused._clipft_stands_in_for.__module__,
    )


def _new_siglip() -> FusedSiglipModel:
    return FusedSiglipModel.__new__(FusedSiglipModel)


def _new_siglip2() -> FusedSiglip2Model:
    return FusedSiglip2Model.__new__(FusedSiglip2Model)
