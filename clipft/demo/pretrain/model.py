"""The shape of the base model: a tokenizer of CLIP's kind and a small ``CLIPModel``."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from clipft.demo.pretrain.sources import SIZE

PATCH = 16
VOCABULARY = 3000


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's own kind: lower case, byte-level BPE, ``</w>`` at the end of a word."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    bpe.normalizer = normalizers.Sequence(steps)
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges, vocabulary = [tuple(merge) for merge in state["merges"]], state["vocab"]
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=77)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The tokenizer with CLIP's preprocessing at the model's size."""
    square = {"height": SIZE, "width": SIZE}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square), tokenizer)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """2.8 million parameters, 11 MB."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = CLIPConfig(
        text_config=text | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=vision | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=192,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 2:  # residual branches start small, as in GPT-2
            nn.init.normal_(parameter, std=0.007 if name.endswith(("out_proj.weight", "fc2.weight")) else 0.02)
    return model
