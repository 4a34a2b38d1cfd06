"""What ``clipft.fuse`` makes of a ``SiglipModel`` and a ``Siglip2Model``: ``clipft.fused`` for the sigmoid loss.

Their heads pool all tokens of a picture, so no layer has anything to leave out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Siglip2Model, SiglipModel
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.utils.generic import can_return_tuple

from clipft.fused import head_weights, normalised

__all__ = ["FusedSiglip2Model", "FusedSiglipModel"]


@dataclass
class FusedSiglipOutput(SiglipOutput):
    """``SiglipOutput`` and, last, what the loss multiplies and adds to cosines, so that a loss outside the model can
    use it.
    """

    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class _Fused:
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
        """The rest of ``forward``: as :meth:`clipft.fused.FusedCLIPModel.forward`. What a tower gave is its embedding
        already, but for the length.
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
                from clipft.ops.losses import sigmoid_loss

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


class FusedSiglipModel(_Fused, SiglipModel):
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
        arguments: see :class:`clipft.fused.FusedCLIPModel`.
        """
        pictures = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._contrast(pictures, texts, return_loss=return_loss, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_siglip, (), self.__getstate__()


class FusedSiglip2Model(_Fused, Siglip2Model):
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
        arguments: see :class:`clipft.fused.FusedCLIPModel`.
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
