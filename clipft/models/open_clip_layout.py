"""open_clip's names of a model's tensors and Hugging Face's, side by side: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["TIMM_SIGLIP", "Part", "TimmTower", "parts_of", "to_hf_names", "to_open_clip_names"]


@dataclass(frozen=True)
class TimmTower:
    """A SigLIP's image tower among timm's architectures."""

    width: int
    layers: int
    heads: int
    intermediate: int
    patch: int
    size: int
    act: Literal["gelu", "gelu_pytorch_tanh"]


def _timm_siglip() -> dict[str, TimmTower]:
    shapes = {
        "base": (768, 12, 12, 3072),
        "large": (1024, 24, 16, 4096),
        "so400m": (1152, 27, 16, 4304),
        "giantopt": (1536, 40, 16, 6144),
    }
    exact = {("base", 16): (224, 256, 384, 512), ("large", 16): (256, 384), ("so400m", 14): (224, 378, 384)}
    tanh = {("base", 32): (256,), ("large", 16): (512,), ("so400m", 16): (256, 384, 512), ("giantopt", 16): (256, 384)}
    towers = {}
    for act, sizes in (("gelu", exact), ("gelu_pytorch_tanh", tanh)):
        for (name, patch), own in sizes.items():
            for size in own:
                tower = TimmTower(*shapes[name], patch, size, act)  # type: ignore[arg-type]
                towers[f"vit_{name}_patch{patch}_siglip_{size}"] = tower
    return towers


TIMM_SIGLIP = _timm_siglip()  # timm decides which of them have which GELU


@dataclass(frozen=True)
class Part:
    """Tensors that hold the same numbers: those of one side, joined along the first axis, are those of the other."""

    open_clip: tuple[str, ...]
    hf: tuple[str, ...]
    change: Literal["", "transposed", "with a batch axis"] = ""  # of open_clip's, where there is one on either side


def parts_of(family: str, vision_layers: int, text_layers: int) -> list[Part]:
    """All tensors of a model.

    Args:
        family: the ``model_type``; SigLIP's image tower is timm's, all else open_clip's own.
        vision_layers, text_layers: how many.
    """
    siglip = family == "siglip"
    vision = _timm_vision(vision_layers) if siglip else _vision(vision_layers)
    return [Part(("logit_scale",), ("logit_scale",)), *vision, *_text(text_layers, siglip)]


def _both(open_clip: str, hf: str, names: tuple[str, ...] = ("weight", "bias")) -> Iterator[Part]:
    for name in names:
        yield Part((f"{open_clip}.{name}",), (f"{hf}.{name}",))


def _blocks(open_clip: str, hf: str, layers: int, names: Mapping[str, str], joined: tuple[str, str]) -> Iterator[Part]:
    """Layers; ``joined``: names of the joined weight and bias of queries, keys and values."""
    for layer in range(layers):
        ours, theirs = f"{open_clip}.{layer}", f"{hf}.encoder.layers.{layer}"
        for own, kind in zip(joined, ("weight", "bias"), strict=True):
            yield Part((f"{ours}.{own}",), tuple(f"{theirs}.self_attn.{one}_proj.{kind}" for one in "qkv"))
        for name, other in names.items():
            yield from _both(f"{ours}.{name}", f"{theirs}.{other}")


def _resblocks(open_clip: str, hf: str, layers: int) -> Iterator[Part]:
    names = {
        "ln_1": "layer_norm1",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    return _blocks(f"{open_clip}.resblocks", hf, layers, names, ("attn.in_proj_weight", "attn.in_proj_bias"))


def _vision(layers: int) -> Iterator[Part]:
    hf = "vision_model"
    yield Part(("visual.class_embedding",), (f"{hf}.embeddings.class_embedding",))
    yield Part(("visual.positional_embedding",), (f"{hf}.embeddings.position_embedding.weight",))
    yield Part(("visual.conv1.weight",), (f"{hf}.embeddings.patch_embedding.weight",))
    yield from _both("visual.ln_pre", f"{hf}.pre_layrnorm")
    yield from _resblocks("visual.transformer", hf, layers)
    yield from _both("visual.ln_post", f"{hf}.post_layernorm")
    yield Part(("visual.proj",), ("visual_projection.weight",), "transposed")


def _timm_vision(layers: int) -> Iterator[Part]:
    trunk, hf = "visual.trunk", "vision_model"
    yield Part((f"{trunk}.pos_embed",), (f"{hf}.embeddings.position_embedding.weight",), "with a batch axis")
    yield from _both(f"{trunk}.patch_embed.proj", f"{hf}.embeddings.patch_embedding")
    names = {
        "norm1": "layer_norm1",
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    yield from _blocks(f"{trunk}.blocks", hf, layers, names, ("attn.qkv.weight", "attn.qkv.bias"))
    yield from _both(f"{trunk}.norm", f"{hf}.post_layernorm")
    pool, head = f"{trunk}.attn_pool", f"{hf}.head"
    yield Part((f"{pool}.latent",), (f"{head}.probe",))
    for kind in ("weight", "bias"):
        yield Part((f"{pool}.q.{kind}", f"{pool}.kv.{kind}"), (f"{head}.attention.in_proj_{kind}",))
    for name, other in {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1"}.items():
        yield from _both(f"{pool}.{name}", f"{head}.{other}")
    yield from _both(f"{pool}.mlp.fc2", f"{head}.mlp.fc2")


def _text(layers: int, siglip: bool) -> Iterator[Part]:
    hf = "text_model"
    yield from _both("token_embedding", f"{hf}.embeddings.token_embedding", ("weight",))
    yield Part(("positional_embedding",), (f"{hf}.embeddings.position_embedding.weight",))
    yield from _resblocks("transformer", hf, layers)
    yield from _both("ln_final", f"{hf}.final_layer_norm")
    if siglip:
        yield from _both("text_projection", f"{hf}.head")
        yield Part(("logit_bias",), ("logit_bias",))
    else:
        yield Part(("text_projection",), ("text_projection.weight",), "transposed")


# ---- read in either direction ----


def to_hf_names(parts: list[Part], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under Hugging Face's names, each with memory of its own."""
    found: dict[str, Tensor] = {}
    for part in parts:
        found |= _moved([_changed(part, state[name]) for name in part.open_clip], part.hf)
    return found


def to_open_clip_names(parts: list[Part], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Hugging Face's tensors under open_clip's names, each with memory of its own."""
    found: dict[str, Tensor] = {}
    for part in parts:
        moved = _moved([state[name].detach() for name in part.hf], part.open_clip)
        found |= {name: _changed_back(part, tensor) for name, tensor in moved.items()}
    return found


def _moved(tensors: list[Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    own = (whole,)
    if len(names) > 1:  # queries, keys and values; or queries, and keys with values
        third = len(whole) // 3
        own = whole.split(third if len(names) == 3 else [third, 2 * third])
    return {name: one.clone(memory_format=torch.contiguous_format) for name, one in zip(names, own, strict=True)}


def _changed(part: Part, tensor: Tensor) -> Tensor:
    return {"transposed": tensor.t, "with a batch axis": lambda: tensor[0], "": lambda: tensor}[part.change]()


def _changed_back(part: Part, tensor: Tensor) -> Tensor:
    if part.change == "transposed":
        return tensor.t().contiguous()
    return tensor[None] if part.change else tensor
