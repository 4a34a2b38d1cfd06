"""MetaCLIP 2 and Chinese-CLIP of a hundred thousand parameters with random weights."""

from __future__ import annotations

import string
from typing import Any

import torch
from tiny_clip import LENGTH, SIZE
from transformers import (
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessor,
    CLIPProcessor,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedModel,
    ProcessorMixin,
    XLMRobertaTokenizer,
)

KINDS = ("metaclip_2", "chinese_clip")
HAN = "一张红色绿蓝黄的照片方块"
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_PICTURES: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}


def tiny_family(kind: str, seed: int = 0, **text: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model with 3 layers a tower, whose BERT has dropout, and its processor. ``text``: of the text tower."""
    tokenizer: Any = tiny_tokenizer(kind)
    vision = _TOWER | {"image_size": SIZE, "patch_size": 16}
    text = _TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH} | text
    torch.manual_seed(seed)
    if kind == "metaclip_2":
        text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} | text
        config = MetaClip2Config(text_config=text, vision_config=vision, projection_dim=16)
        return MetaClip2Model(config).eval(), CLIPProcessor(CLIPImageProcessor(**_PICTURES), tokenizer)
    config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = ChineseCLIPModel(config).eval()
    with torch.no_grad():  # which training leaves neither so small nor so equal
        model.text_model.embeddings.word_embeddings.weight[1:].normal_(std=0.5)  # but for the padding's
        model.text_projection.weight.normal_(std=0.2)
    return model, ChineseCLIPProcessor(ChineseCLIPImageProcessor(**_PICTURES), tokenizer)


def tiny_tokenizer(kind: str) -> XLMRobertaTokenizer | BertTokenizer:
    """Letters and a few words and signs: XLM-R's, which minds capitals, or BERT's, which does not."""
    letters = [*string.ascii_letters, *string.digits, *HAN]
    if kind == "metaclip_2":
        special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
        pieces = ["▁", "▁red", "▁square", *letters]
        vocabulary = [*special, *((piece, -float(place + 1)) for place, piece in enumerate(pieces)), ("<mask>", 0.0)]
        return XLMRobertaTokenizer(vocab=vocabulary, model_max_length=LENGTH)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, "red", "square", *letters, *("##" + letter for letter in letters)])
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=LENGTH)
