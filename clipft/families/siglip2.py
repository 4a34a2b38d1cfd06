"""SigLIP 2 NaFlex (arXiv:2502.14786), whose pictures come in their own aspect ratio, as patches (``naflex``): Hugging
Face's ``Siglip2Model``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Siglip2Model, Siglip2Processor
from transformers.utils.generic import can_return_tuple

from clipft.families.family import Family
from clipft.families.siglip import FusedSiglipOutput, SiglipTowersForward, embedding_dim, fit_captions, siglip_tower

__all__ = ["SIGLIP2"]


class Siglip2Forward(SiglipTowersForward):
    """``forward`` of a fused ``Siglip2Model``."""

    @can_return_tuple
    def forward(
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
        arguments: see :class:`clipft.families.clip.CLIPForward`.
        """
        pictures = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self._contrast(pictures, texts, return_loss=return_loss, **kwargs)


SIGLIP2 = Family(
    title="SigLIP 2 NaFlex",
    model_type="siglip2",
    model=Siglip2Model,
    processor=Siglip2Processor,
    forward=Siglip2Forward,
    loss="sigmoid",
    max_log_scale=None,
    padding="max_length",
    text_length=64,
    vision=replace(siglip_tower("vision"), positions=None),  # its grid is each picture's own
    text=siglip_tower("text"),
    dim=embedding_dim,
    scale_shape=(1,),
    fit_tokenizer=fit_captions,
)
