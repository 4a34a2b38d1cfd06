"""``fuse`` and ``unfuse``: a model's instances taken over by the classes of ``clipft.models.fused``, and given back.

Parameters, names and hooks stay, only ``forward`` changes.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

from torch import nn

from clipft.families.registry import FAMILIES, base_model, find_family, model_names
from clipft.models.fused import fuse_activations, fuse_attention, fused_class

__all__ = ["check_float", "fuse", "unfuse"]


def fuse(model: Any) -> Any:
    """Let an existing ``CLIPModel``, a model of another family or a peft model compute with clipft's ops.

    - A ``CLIPModel``, also the one inside a peft model, gets its loss from ``clipft.contrastive_loss``: with
      ``return_loss=True`` the output holds ``loss``, ``image_embeds`` and ``text_embeds``, and logits and the image
      tower's ``last_hidden_state`` only with ``return_logits=True``. Its ``quick_gelu`` activations become one op each,
      and so does attention, in float32 on a CPU and without a mask, where transformers would choose torch's "sdpa".
    - A ``MetaClip2Model`` or ``ChineseCLIPModel`` likewise, and a ``SiglipModel`` or ``Siglip2Model`` from
      ``clipft.sigmoid_loss``.
    - The ``lora.Linear`` layers of a peft model, of a ``CLIPModel`` or any other, run ``clipft.lora_linear``. All that
      peft does still works: several adapters, switching, disabling, merging, saving. What the op does not cover (DoRA
      and other variants, mixed batches, several active adapters, quantised layers, GPUs) runs peft's own forward; one
      warning in the log per reason names the layers for which that is so now. Layers that a later ``add_adapter``
      makes are peft's until ``fuse`` is called again.

    Instances keep their parameters, the names of these, hooks and places; ``copy.deepcopy``, ``save_pretrained`` and
    pickling work, and what is saved loads without clipft. Fusing twice is harmless.

    Returns:
        The same object.

    Raises:
        TypeError: none of these, nor a peft model with LoRA; or a subclass of one, whose own ``forward`` would be
            lost.
    """
    clip, with_lora = base_model(model), _has_lora(model)
    check_float(clip)
    family = find_family(type(clip))
    if family is not None and type(clip) is family.model:
        clip.__class__ = fused_class(family)
    elif (family is not None and type(clip) is not fused_class(family)) or (family is None and not with_lora):
        raise TypeError(f"model: expected {model_names()} or a peft model of one, got {type(clip).__qualname__}")
    fuse_activations(model)
    if family is not None:
        family.fuse_layers(clip)
        fuse_attention(clip)
    if with_lora:
        from clipft.models.lora_layers import fuse_lora

        fuse_lora(model)
    return model


def unfuse(model: Any) -> Any:
    """Undo :func:`fuse`: the same object, its modules of their own classes again. What is not fused stays as it is."""
    for module in model.modules():
        fused = type(module)
        plain = getattr(fused, "_clipft_stands_in_for", None)
        if plain is not None:
            module.__class__ = plain
            _drop_wrapped_forward(module)
            if (
                getattr(vars(module).get("_old_forward"), "__func__", None) is fused.forward
            ):  # accelerate's hooks call it
                module._old_forward = MethodType(plain.forward, module)
    return model


def check_float(model: Any) -> None:
    """That this is not a model of :func:`clipft.quantize`, which is for inference."""
    if hasattr(model, "quantization_report"):
        raise ValueError("model: expected a float model, got one with int8 layers, which do not train")


def _has_lora(model: Any) -> bool:
    if sys.modules.get("peft") is None or not isinstance(model, nn.Module):
        return False  # without peft nothing can have put LoRA in
    from clipft.models.lora_layers import has_lora

    return has_lora(model)


def _drop_wrapped_forward(module: nn.Module) -> None:
    """Mixed precision in accelerate leaves a wrapper of the class's forward, here the fused one, on the instance."""
    original = vars(module).get("_original_forward")
    if getattr(original, "__func__", None) in {family.forward.forward for family in FAMILIES}:  # type: ignore[attr-defined]
        del module._original_forward
        module.__dict__.pop("forward", None)
