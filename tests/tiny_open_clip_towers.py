"""Small models of architectures that only open_clip has, with random weights: its own objects, and clipft's of them."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import LENGTH, SIZE, tiny_tokenizer
from transformers import AutoConfig, CLIPImageProcessor, CLIPProcessor

from clipft.families.open_clip import OpenCLIPConfig, OpenCLIPModel

_TEXT = {"context_length": LENGTH, "vocab_size": 514, "width": 32, "heads": 2, "layers": 2}
_VIT = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": SIZE}
_BERT = {
    "model_type": "bert",
    "vocab_size": 514,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 513,
}


def _timm(name: str, size: int = SIZE, **options: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "image_size": size, "timm_proj": "linear", "timm_pool": "avg"} | options


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "layer scale": {"vision_cfg": _VIT | {"ls_init_value": 0.1}, "text_cfg": _TEXT | {"ls_init_value": 0.1}},
    "pools the last": {
        "vision_cfg": _VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": _TEXT | {"pool_type": "last", "no_causal_mask": True},
        "init_logit_bias": -8.0,
    },
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": SIZE}, "text_cfg": _TEXT},
    "timm vit": {"vision_cfg": _timm("test_vit", 160, timm_pool="token", timm_proj=None), "text_cfg": _TEXT},
    "convnext": {
        "vision_cfg": _timm("test_convnext", timm_pool="", timm_proj="mlp"),
        "text_cfg": _TEXT | {"no_causal_mask": True},
    },
    "bert": {
        "vision_cfg": _timm("test_resnet"),
        "text_cfg": {"context_length": LENGTH, "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"},
    },
}


@cache
def _bert_folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="clipft-bert-")
    AutoConfig.for_model(**_BERT).save_pretrained(folder.name)
    return folder


def model_cfg(kind: str) -> dict[str, Any]:
    """As in ``open_clip_config.json``."""
    cfg = copy.deepcopy({"embed_dim": 16} | ARCHITECTURES[kind])
    if kind == "bert":
        cfg["text_cfg"]["hf_model_name"] = _bert_folder().name
    return cfg


def peer(kind: str, seed: int = 0) -> Any:
    """open_clip's."""
    open_clip = pytest.importorskip("open_clip")
    cfg = model_cfg(kind)
    cfg["text_cfg"]["hf_model_pretrained"] = False
    torch.manual_seed(seed)
    model = (open_clip.CustomTextCLIP if kind == "bert" else open_clip.CLIP)(**cfg)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim and "mask" not in name:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def tiny_towers(kind: str, seed: int = 0) -> tuple[Any, CLIPProcessor]:
    """clipft's, with the same weights, and a processor."""
    cfg, theirs = model_cfg(kind), peer(kind, seed)
    text_tower = _BERT if kind == "bert" else None
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    config = OpenCLIPConfig(model_cfg=cfg, preprocess_cfg=preprocess_cfg, text_tower=text_tower)
    side = cfg["vision_cfg"]["image_size"]
    images = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return OpenCLIPModel.from_state(config, theirs.state_dict()), CLIPProcessor(images, tiny_tokenizer())


def tokens(texts: list[str], kind: str) -> torch.Tensor:
    """As open_clip gives them to its towers: padded to the full length, CLIP's own with zeros."""
    found = tiny_tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt")
    return found["input_ids"] if kind == "bert" else found["input_ids"] * found["attention_mask"]


def saved(model: Any, processor: Any, folder: Path) -> Path:
    """As ``save_pretrained`` writes both."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
