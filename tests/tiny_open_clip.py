"""Folders as open_clip writes them, of small models with random weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a photo of a cat", "Two  DOGS, on the sofa!", "it's 3 o'clock", "red " * 40]


def tiny_cfg(**changes: Any) -> dict[str, Any]:
    """``vision_cfg__width=32`` and the like."""
    model_cfg = copy.deepcopy(TINY)
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (model_cfg[part] if part else model_cfg)[key] = value
    return model_cfg


def open_clip_model(model_cfg: dict[str, Any], seed: int = 0) -> Any:
    """open_clip's, whose weights are all random: what starts as ones or zeros too."""
    open_clip = pytest.importorskip("open_clip")
    own = copy.deepcopy(model_cfg)
    torch.manual_seed(seed)
    model = (open_clip.CustomTextCLIP if own.pop("custom_text", False) else open_clip.CLIP)(**own)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def write_folder(folder: Path, model_cfg: dict[str, Any], state: Any, preprocess_cfg: Any = None) -> Path:
    """A folder for ``local-dir:``; weights as a pickle, or with ``state`` None none."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder
