"""FSDP by configuration (``CLIPTrainingArguments(fsdp=True)``): what it takes to shard these models.

``fully_shard`` cuts every parameter along its first dimension and refuses those that have none, which CLIP's
``logit_scale`` is. So it trains as [1], and is saved as it came. Methods that run a tower outside ``forward`` have to
gather the parameters first.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from clipft.families.registry import base_model, family_of
from clipft.models.frozen import frozen_linears

__all__ = ["as_saved", "check_enabled", "check_version", "gather_for_features", "make_shardable"]


def check_version(args: Any) -> None:
    """That this is not FSDP1.

    Raises:
        ValueError: it is.
    """
    if args.fsdp and int(args.fsdp_config.get("version", 2)) != 2:
        version = args.fsdp_config["version"]
        raise ValueError(f"fsdp_config: expected version 2, got {version}, which takes no scalar like logit_scale")


def check_enabled(args: Any, enabled: bool) -> None:
    """That FSDP is on where it was asked for.

    Raises:
        ValueError: it is not.
    """
    if args.fsdp and not enabled:
        raise ValueError(
            "fsdp: accelerate shards models on accelerators only, and this process runs on the CPU, where it would use "
            "DistributedDataParallel; leave fsdp out"
        )


def make_shardable(model: Any) -> None:
    """``logit_scale`` [] as [1], the same parameter.

    Raises:
        ValueError: layers in int8, whose codes no process would have whole.
    """
    if frozen_linears(model):
        raise ValueError('model: expected float layers with FSDP, got some in int8: add_lora(..., frozen="float")')
    scale = base_model(model).logit_scale
    scale.data = scale.data.reshape(1)


def as_saved(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A whole state dict with the shapes that ``from_pretrained`` expects."""
    shape = family_of(model).scale_shape
    return {name: value.reshape(shape) if name.endswith("logit_scale") else value for name, value in state.items()}


def gather_for_features(model: Any) -> None:
    """Let a sharded model's ``get_image_features`` and ``get_text_features`` gather parameters as ``forward`` does."""
    for method in ("get_image_features", "get_text_features"):
        register_fsdp_forward_method(base_model(model), method)
