"""What ``clipft.fuse`` makes of models: the classes that their instances are taken over by.

A model's fused class has its family's ``forward``: it computes the loss with clipft's op and leaves the matrix of
logits out unless it is asked for. quick_gelu and attention are an op each. Layers that a family takes over stand with
the family.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clipft.families.clip import CLIP
from clipft.families.family import Family
from clipft.families.forward import stand_in
from clipft.families.registry import FAMILIES
from clipft.families.siglip import SIGLIP
from clipft.families.siglip2 import SIGLIP2
from clipft.ops import attend, quick_gelu
from clipft.ops.kernels import FLOATS, MAX_DIM, autocasts, problem, wants_plain

__all__ = [
    "FusedAttention",
    "FusedQuickGELU",
    "fuse_activations",
    "fuse_attention",
    "fused_class",
    "ignores_causal",
    "is_causal",
    "replaces_sdpa",
]


# ---- models ----


@functools.cache
def fused_class(family: Family) -> Any:
    """The class of a family's fused models: its mixin before Hugging Face's class, whose name and module it has.

    save_pretrained writes the name into config.json, and peft name and module into adapter_config.json. Pickle and
    deepcopy, which would look for the class there, go by ``__reduce__``.
    """
    plain: Any = family.model
    own = {
        "__doc__": f"A ``{plain.__name__}`` on clipft's ops. Made by :func:`clipft.fuse` only.",
        "__module__": plain.__module__,
        "__reduce__": lambda self: (_new_fused, (family.model_type,), self.__getstate__()),
        "_clipft_family": family,
        "_clipft_stands_in_for": plain,
    }
    return type(plain.__name__, (family.forward, plain), own)


def _new_fused(model_type: str) -> Any:
    family = next(family for family in FAMILIES if family.model_type == model_type)
    return fused_class(family).__new__(fused_class(family))


def __getattr__(name: str) -> Any:
    """What pickles of 0.1 name."""
    of_family = {"FusedCLIPModel": CLIP, "FusedSiglipModel": SIGLIP, "FusedSiglip2Model": SIGLIP2}
    if name in of_family:
        return fused_class(of_family[name])
    makers = {"_new_fused_model": CLIP, "_new_siglip": SIGLIP, "_new_siglip2": SIGLIP2}
    if name in makers:
        return functools.partial(_new_fused, makers[name].model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- activations ----


class FusedQuickGELU(QuickGELUActivation):
    """A ``QuickGELUActivation`` on ``clipft.ops.quick_gelu``. Made by :func:`clipft.fuse` only."""

    _clipft_stands_in_for = QuickGELUActivation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the parameter's name in transformers)
        """Any shape, kept."""
        if problem(input.device, "lora") is not None or input.dtype not in FLOATS or not 1 <= input.dim() <= MAX_DIM:
            return super().forward(input)
        return quick_gelu(input)


FusedQuickGELU.__name__ = QuickGELUActivation.__name__  # what print(model) shows


def fuse_activations(model: nn.Module) -> None:
    """Take over every quick_gelu inside."""
    for module in model.modules():
        if type(module) is QuickGELUActivation:
            module.__class__ = FusedQuickGELU


# ---- attention ----


class FusedAttention(nn.Module):
    """The self-attention of Hugging Face's layers on ``clipft.ops.attend``, where that takes over from torch's (the
    "sdpa" that transformers chooses). Stands before the class of a layer's own. Made by :func:`clipft.fuse` only.
    """

    config: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    head_dim: int
    scale: float
    dropout: float

    def forward(self, hidden_states: Tensor, *mask: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the plain class's: [B, L, D] -> [B, L, D] and the attention weights, if its function gives any.
        Chinese-CLIP's of transformers 5.4 takes no mask."""
        asked = kwargs.get("output_attentions") or (kwargs.get("is_causal") and ignores_causal(self))
        if asked or not _fits(self, hidden_states, mask, kwargs):
            plain: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *mask, **kwargs)
            return plain
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        heads, causal = query.shape[2] // self.head_dim, is_causal(self, kwargs)
        output = attend(query, key, value, heads, scale=self.scale, causal=causal)
        return self.out_proj(output), None


def ignores_causal(attention: nn.Module) -> bool:
    """SigLIP's hands on nothing that it is given."""
    return any(".siglip" in kind.__module__ for kind in type(attention).__mro__)


def is_causal(attention: nn.Module, given: dict[str, Any]) -> bool:
    """As transformers' ``sdpa_attention_forward`` has it."""
    asked = given.get("is_causal")
    return bool(getattr(attention, "is_causal", True) if asked is None else asked)


def replaces_sdpa(attention: Any, states: Tensor, mask: Sequence[Any], given: dict[str, Any]) -> bool:
    """Whether an op attends in torch's place: on a CPU, for transformers' own "sdpa" and not for a user's, with no mask
    nor what else changes weights; an exporter could not translate it."""
    more = (*mask, *map(given.get, ("attention_mask", "position_bias", "softcap")))
    return (
        ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation) is sdpa_attention_forward
        and states.device.type == "cpu"
        and all(one is None for one in more)
        and not torch.compiler.is_exporting()
    )


def _fits(attention: FusedAttention, states: Tensor, mask: Sequence[Any], given: dict[str, Any]) -> bool:
    """In float32, which is what the op is faster at, and without dropout of weights."""
    return (
        replaces_sdpa(attention, states, mask, given)
        and states.dtype == torch.float32
        and not (attention.training and attention.dropout)
        and not autocasts(states.device)
        and not wants_plain(states)
    )


def fuse_attention(model: nn.Module) -> None:
    """Take over the self-attention of the layers of a family's model, where it is Hugging Face's own."""
    for name, module in model.named_modules():
        plain: Any = type(module)
        own = plain.__module__.startswith("transformers.models.") and not isinstance(module, FusedAttention)
        if own and name.endswith(".self_attn"):
            module.__class__ = stand_in(FusedAttention, plain)
