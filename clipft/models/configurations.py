"""A model's ``config.json``: whether it would have code fetched or other files read, and whether its sizes are any.

transformers takes from it more than sizes: the names of an attention kernel on the hub, of other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_sizes", "check_trust"]

_KERNELS = ("attn_implementation", "experts_implementation")  # in any of transformers' spellings
_FILES = ("configuration_files", "transformers_weights")
_MOST, _FEW = 1 << 24, 256  # a size; layers that are made before the names of missing ones are told
_SIZES = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "num_patches",
    "patch_size",
    "projection_dim",
    "projection_size",
    "vocab_size",
)


def check_trust(config: Mapping[str, Any], path: Path | None = None) -> None:
    """That neither a configuration nor a caller (``path`` None) asks for code from a folder or the hub.

    Raises:
        ValueError: they do.
    """
    where = "" if path is None else f"{path}: "
    if path is None and config.get("trust_remote_code"):
        raise ValueError("trust_remote_code: expected False: clipft runs no code of a model's folder")
    for key, value in _entries(config):
        if any(key.strip("_").startswith(kernel) for kernel in _KERNELS):
            for name in value.values() if isinstance(value, dict) else [value]:
                if isinstance(name, str) and not name.replace("_", "").isalnum():
                    raise ValueError(
                        f"{where}{key}: expected eager, sdpa or another of transformers' own, found {name!r}: clipft "
                        "runs no kernel of the hub"
                    )
        if key in _FILES:
            raise ValueError(f"{where}expected no {key}: clipft reads config.json and model.safetensors")


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of an object and those in it."""
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from value.items()
        waiting += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def check_sizes(config: Any, path: Path | str, tensors: int | None) -> None:
    """Before a model is made of it: that sizes are positive, and there are not more layers than tensors.

    Args:
        config: transformers' object.
        path: the file it is from.
        tensors: how many the weights hold; None if that is not known.

    Raises:
        ValueError: it lies.
    """
    for part in ("model_cfg", "text_tower"):  # of open_clip's models
        for key, value in _entries(getattr(config, part, None) or {}):
            most = max(tensors or 0, _FEW) if "layers" in key else _MOST
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not -most <= number <= most:
                    raise ValueError(f"{path}: {part}: expected {key} to be at most {most}, found {number!r}")
    for part in ("", "text_config", "vision_config"):
        own = getattr(config, part) if part else config
        for name in _SIZES:
            value = getattr(own, name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _MOST:
                raise ValueError(
                    f"{path}: expected {part or 'the'} {name} to be a number from 1 to {_MOST}, found {value!r}"
                )
        layers = getattr(own, "num_hidden_layers", 1)
        if tensors is not None and layers > max(tensors, _FEW):
            raise ValueError(f"{path}: {part} asks for {layers} layers, the weights hold {tensors} tensors")
