"""open_clip's models as Hugging Face's, and back: the same numbers under other names.

A ``CLIPModel`` expresses open_clip's plain vision transformers, a ``MetaClip2Model`` those whose texts end with XLM-R's
token, a ``SiglipModel`` its SigLIPs, whose image towers are timm's; :func:`reasons` says of every other configuration
what none of them has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPConfig, MetaClip2Config, PreTrainedConfig, SiglipConfig

from clipft.errors import listed
from clipft.families.open_clip import OpenCLIPConfig, with_scalars_of, with_text_apart
from clipft.families.registry import check_model, family_of_type
from clipft.models.configurations import check_sizes
from clipft.models.fusing import check_float
from clipft.models.heads import heads_of
from clipft.models.open_clip_layout import TIMM_SIGLIP, Part, TimmTower, parts_of, to_hf_names, to_open_clip_names

__all__ = ["Converted", "reasons", "to_hf", "to_open_clip"]

_FREE = {  # settings that both libraries have, or that change no embedding
    *("embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "nonscalar_logit_scale"),
    *("width", "layers", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs"),
    *("vocab_size", "context_length", "pad_id", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),
    *("patch_dropout", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    "final_ln_after_pool",  # of one token it is the same before or after
}
_OFF: tuple[Any, ...] = (None, False, {}, "default")
_DEFAULTS: dict[str, Any] = {
    "vision_cfg.pool_type": "tok",
    "vision_cfg.timm_pool": "avg",
    "vision_cfg.timm_proj": "linear",
    "text_cfg.no_causal_mask": False,
    "text_cfg.pool_type": "argmax",
    "text_cfg.proj_type": "linear",
}
_CLIP: dict[str, tuple[Any, ...]] = {  # what must be so; () for what may be anything
    "vision_cfg.pool_type": ("tok",),
    "text_cfg.pool_type": ("argmax", "eos"),
    "text_cfg.proj_type": ("linear",),
}
_SIGLIP: dict[str, tuple[Any, ...]] = {
    "init_logit_bias": (),
    "vision_cfg.pool_type": (),
    "vision_cfg.timm_model_name": (),
    "vision_cfg.timm_pool": ("map",),
    "vision_cfg.timm_proj": ("none",),
    "text_cfg.no_causal_mask": (True,),
    "text_cfg.pool_type": ("last",),
    "text_cfg.proj_type": ("linear", "none"),
    "text_cfg.proj_bias": (),
}
_WORDS = {
    "attentional_pool": "attention pooling",
    "embed_cls": "a class token of texts",
    "hf_model_name": "a text tower of Hugging Face's",
    "init_logit_bias": "a logit bias",
    "layers": "a ResNet",
    "ls_init_value": "layer scale",
    "multimodal_cfg": "CoCa's decoder",
    "no_causal_mask": "texts read in both directions",
    "no_ln_pre": "no norm before the layers",
    "output_tokens": "tokens beside embeddings",
    "pool_type": "pooling",
    "timm_model_name": "a tower of timm's",
}
_CLASSES = "CLIPModel, MetaClip2Model or SiglipModel"
_PARTS = ("vision_cfg", "text_cfg")
_ACTS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
_END = 2  # XLM-R's token at a text's end; of a CLIPConfig it would mean the largest token of a text
_EPS = 1e-5


class Converted(NamedTuple):
    """Hugging Face's configuration, and the model's tensors under its names."""

    config: PreTrainedConfig
    state: dict[str, Tensor]


# ---- what can be expressed ----


def reasons(model_cfg: Mapping[str, Any]) -> list[str]:
    """Why no class of transformers' is what open_clip makes of this ``model_cfg``: a setting each; empty if one is."""
    if not all(isinstance(model_cfg.get(part), Mapping) for part in _PARTS):
        return ["vision_cfg and text_cfg are not both there"]
    required = _SIGLIP if _timm_tower(model_cfg) else _CLIP
    settings = _settings(model_cfg)
    odd = [_in_words(path, value) for path, value in settings.items() if not _fits(path, value, required)]
    return odd or _odd_sizes(model_cfg)


def _settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """By their paths; of a tower that is another library's no more than its name."""
    found = {key: value for key, value in model_cfg.items() if key not in _PARTS}
    for part, other in zip(_PARTS, ("timm_model_name", "hf_model_name"), strict=True):
        own = {path: value for path, value in _DEFAULTS.items() if path.startswith(part)}
        own |= {f"{part}.{key}": value for key, value in model_cfg[part].items()}
        name = model_cfg[part].get(other)
        found |= {f"{part}.{other}": name} if name and name not in TIMM_SIGLIP else own
    return found


def _fits(path: str, value: Any, required: Mapping[str, tuple[Any, ...]]) -> bool:
    key = path.rpartition(".")[2]
    if path in required:
        return not required[path] or value in required[path]
    if path == "vision_cfg.layers" or key in ("image_size", "patch_size"):
        return isinstance(value, int) or (value is None and key == "patch_size")  # a ResNet's
    return key in _FREE or value in _OFF


def _timm_tower(model_cfg: Mapping[str, Any]) -> TimmTower | None:
    return TIMM_SIGLIP.get(str(model_cfg["vision_cfg"].get("timm_model_name")))


def _in_words(path: str, value: Any) -> str:
    words = _WORDS.get(path.rpartition(".")[2])
    return f"{path}: {str(value)[:60]}{f' ({words})' if words else ''}"


def _odd_sizes(model_cfg: Mapping[str, Any]) -> list[str]:
    """Settings that are right one by one, and not together."""
    text, tower = model_cfg["text_cfg"], _timm_tower(model_cfg)
    odd = []
    if tower is not None:
        if model_cfg.get("embed_dim") != tower.width:
            odd.append(f"embed_dim: {model_cfg.get('embed_dim')} (the image tower has {tower.width})")
        if model_cfg["vision_cfg"].get("image_size", 224) != tower.size:
            odd.append(f"vision_cfg.image_size: {model_cfg['vision_cfg'].get('image_size')} (not the image tower's)")
        if text.get("proj_type", "linear") == "none" and text.get("width", 512) != tower.width:
            odd.append(f"text_cfg.width: {text.get('width')} (without a projection, the image tower has {tower.width})")
        if text.get("proj_type", "linear") != "none" and not text.get("proj_bias"):
            odd.append("text_cfg.proj_bias: False (a SiglipModel's projection has a bias)")
    for part in _PARTS:
        act, norm = (model_cfg[part].get(key) or {} for key in ("act_kwargs", "norm_kwargs"))
        if act and (model_cfg.get("quick_gelu") or act != {"approximate": "tanh"}):
            odd.append(f"{part}.act_kwargs: {act}")
        if norm and set(norm) != {"eps"}:
            odd.append(f"{part}.norm_kwargs: {norm}")
    return odd


# ---- open_clip's to Hugging Face's ----


def to_hf(model_cfg: Mapping[str, Any], state: Mapping[str, Tensor], where: Path | str) -> Converted:
    """What open_clip makes of a configuration and weights, as Hugging Face's model.

    Args:
        model_cfg: as in ``open_clip_config.json``.
        state: open_clip's tensors by name.
        where: their file, for messages.

    Raises:
        ValueError: :func:`reasons`, or the weights are not those that the configuration asks for.
    """
    if found := reasons(model_cfg):
        raise ValueError(f"{where}: no {_CLASSES} of transformers has this: {'; '.join(found)}")
    config = _hf_config(model_cfg)
    check_sizes(config, where, len(state))
    parts = _parts(config)
    expected = to_open_clip_names(parts, _on_meta(config))
    own = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if model_cfg["text_cfg"].get("proj_type") == "none":
        width = config.text_config.hidden_size
        own |= {"text_projection.weight": torch.eye(width), "text_projection.bias": torch.zeros(width)}
    own = with_scalars_of(expected, own)
    _check_state(where, expected, own)
    return Converted(config, to_hf_names(parts, own))


def _hf_config(model_cfg: Mapping[str, Any]) -> PreTrainedConfig:
    vision, text, tower = model_cfg["vision_cfg"], model_cfg["text_cfg"], _timm_tower(model_cfg)
    quick, dim = bool(model_cfg.get("quick_gelu")), model_cfg["embed_dim"]
    width, ends_at = text.get("width", 512), text.get("pool_type", "argmax")
    texts = _tower(text, quick, width, text.get("layers", 12), text.get("heads", 8)) | {
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": text.get("context_length", 77),
    }
    if tower is not None:
        pictures = {
            "hidden_size": tower.width,
            "intermediate_size": tower.intermediate,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "image_size": tower.size,
            "patch_size": tower.patch,
            "hidden_act": tower.act,
            "layer_norm_eps": 1e-6,
        }
        return SiglipConfig(text_config=texts | {"projection_size": dim}, vision_config=pictures)
    wide = vision.get("width", 768)
    pictures = _tower(vision, quick, wide, vision.get("layers", 12), wide // vision.get("head_width", 64)) | {
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
    }
    end = text.get("eos_id", _END) if ends_at == "eos" else texts["vocab_size"] - 1
    texts |= {"eos_token_id": end, "bos_token_id": None, "pad_token_id": None}
    kind = MetaClip2Config if (ends_at, end) == ("eos", _END) else CLIPConfig
    return kind(
        text_config=texts | {"projection_dim": dim},
        vision_config=pictures | {"projection_dim": dim},
        projection_dim=dim,
    )


def _tower(own: Mapping[str, Any], quick_gelu: bool, width: int, layers: int, heads: int) -> dict[str, Any]:
    """Of open_clip's own transformer."""
    return {
        "hidden_size": width,
        "intermediate_size": int(width * own.get("mlp_ratio", 4.0)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if own.get("act_kwargs") else "gelu",
        "layer_norm_eps": float((own.get("norm_kwargs") or {}).get("eps", _EPS)),
    }


def _parts(config: Any) -> list[Part]:
    return parts_of(config.model_type, config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)


def _on_meta(config: PreTrainedConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(family_of_type(config.model_type, "model_cfg").model(config).state_dict())


def _check_state(where: Path | str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Before a number is copied: that the tensors are those of the configuration."""
    if missing := expected.keys() - state.keys():
        raise ValueError(
            f"{where}: weights that the architecture asks for are missing: {listed(missing)}. They are of another "
            "architecture, or the file is not whole"
        )
    if over := state.keys() - expected.keys():
        raise ValueError(
            f"{where}: expected only the weights that the architecture asks for, found others too: {listed(over)}. "
            "They are of another architecture"
        )
    odd = [
        f"{name} {list(state[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if state[name].shape != tensor.shape or not state[name].is_floating_point()
    ]
    if odd:
        raise ValueError(f"{where}: expected weights of the shapes that the architecture asks for, found {listed(odd)}")


# ---- Hugging Face's to open_clip's ----


def to_open_clip(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A ``CLIPModel``, ``MetaClip2Model``, ``SiglipModel`` or ``OpenCLIPModel`` as open_clip has it: ``model_cfg`` and
    tensors.

    Raises:
        TypeError: another model. ValueError: no model of open_clip is the same.
    """
    family, config = check_model(model), model.config
    check_float(model)
    if heads := heads_of(model):
        raise ValueError(f"model: open_clip has no place for the classification heads {', '.join(heads)}: remove them")
    if family.model_type == OpenCLIPConfig.model_type:
        return copy.deepcopy(config.model_cfg) | {"custom_text": True}, dict(model.state_dict())
    if family.model_type not in ("clip", "metaclip_2", "siglip"):
        raise ValueError(f"model: open_clip has no {family.model.__name__}; it has what a {_CLASSES} is")
    texts = config.text_config
    text_cfg = _cfg_of(texts) | {
        "heads": texts.num_attention_heads,
        "vocab_size": texts.vocab_size,
        "context_length": texts.max_position_embeddings,
    }
    model_cfg = (_siglip_cfg if family.model_type == "siglip" else _clip_cfg)(config, text_cfg)
    state = to_open_clip_names(_parts(config), model.state_dict())
    return model_cfg, with_text_apart(state) if model_cfg.get("custom_text") else state


def _clip_cfg(config: Any, text_cfg: dict[str, Any]) -> dict[str, Any]:
    vision, texts = config.vision_config, config.text_config
    acts = {vision.hidden_act, texts.hidden_act}
    if not acts <= set(_ACTS) or ("quick_gelu" in acts and len(acts) > 1):
        raise ValueError(f"model: open_clip has no model with the activations {' and '.join(sorted(acts))}")
    if vision.num_channels != 3 or not isinstance(vision.image_size, int):
        raise ValueError("model: open_clip's models take square pictures of three channels")
    end = texts.eos_token_id
    if config.model_type == "metaclip_2" or end not in (_END, texts.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": end}
    vision_cfg = _cfg_of(vision) | {
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    quick = {"quick_gelu": True} if "quick_gelu" in acts else {}
    return {"embed_dim": config.projection_dim, **quick, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _siglip_cfg(config: Any, text_cfg: dict[str, Any]) -> dict[str, Any]:
    vision, texts = config.vision_config, config.text_config
    own = TimmTower(
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
        vision.patch_size,
        vision.image_size,
        vision.hidden_act,
    )
    name = next((name for name, tower in TIMM_SIGLIP.items() if tower == own), None)
    if name is None or vision.layer_norm_eps != 1e-6 or texts.hidden_act not in _ACTS[:2]:
        raise ValueError(f"model: none of the SigLIP image towers that open_clip has of timm is the same as {own}")
    vision_cfg = {
        "image_size": vision.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    text_cfg |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return {
        "embed_dim": texts.projection_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
    }


def _cfg_of(tower: Any) -> dict[str, Any]:
    """Of a tower as open_clip's own transformer is."""
    ratio = tower.intermediate_size / tower.hidden_size
    if int(tower.hidden_size * ratio) != tower.intermediate_size:  # rounded down
        ratio = (tower.intermediate_size + 0.5) / tower.hidden_size
    found = {"width": tower.hidden_size, "layers": tower.num_hidden_layers, "mlp_ratio": ratio}
    if tower.hidden_act == "gelu_pytorch_tanh":
        found["act_kwargs"] = {"approximate": "tanh"}
    if tower.layer_norm_eps != _EPS:
        found["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return found
