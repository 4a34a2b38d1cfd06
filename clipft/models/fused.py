"""What ``clipft.fuse`` makes of models: the classes that their instances are taken over by.

A model's fused class has its family's ``forward``: it computes the loss with clipft's op and leaves the matrix of
logits out unless it is asked for. quick_gelu is one op. Layers that a family takes over stand with the family.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from clipft.families.clip import CLIP
from clipft.families.family import Family
from clipft.families.registry import FAMILIES
from clipft.families.siglip import SIGLIP
from clipft.families.siglip2 import SIGLIP2
from clipft.ops import quick_gelu
from clipft.ops.kernels import FLOATS, MAX_DIM, problem

__all__ = ["FusedQuickGELU", "fuse_activations", "fused_class"]


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
