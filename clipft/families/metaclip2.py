"""MetaCLIP 2 (arXiv:2507.22062), a CLIP with XLM-R's tokenizer: Hugging Face's ``MetaClip2Model``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import MetaClip2Model
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2EncoderLayer, MetaClip2MLP, MetaClip2Output

from clipft.families.clip import CLIP, CLIPForward, check_end
from clipft.families.projected import fuse_last_layer

__all__ = ["METACLIP2"]


@dataclass
class FusedMetaClip2Output(MetaClip2Output):
    """``MetaClip2Output`` and, last, what :class:`clipft.families.clip.FusedCLIPOutput` has."""

    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class MetaClip2Forward(CLIPForward):
    """``forward`` of a fused ``MetaClip2Model``: that of a CLIP."""

    output_class = FusedMetaClip2Output


def _fit_end(model: Any, tokenizer: Any) -> None:
    """A text is pooled at its end token, whose number is XLM-R's 2: no sign of an old file here."""
    check_end(model, tokenizer)


METACLIP2 = replace(
    CLIP,
    title="MetaCLIP 2",
    model_type="metaclip_2",
    model=MetaClip2Model,
    forward=MetaClip2Forward,
    vision=replace(CLIP.vision, mlp=MetaClip2MLP),
    text=replace(CLIP.text, mlp=MetaClip2MLP),
    fuse_layers=partial(fuse_last_layer, plain=MetaClip2EncoderLayer),
    fit_tokenizer=_fit_end,
)
