"""peft's ``lora.Linear`` on ``clipft.lora_linear``, taken over instance by instance; on a base in int8
(``clipft.models.frozen``) on ``int8_lora_linear``.

An instance's class is swapped for :class:`FusedLoraLinear`, a subclass that adds no attribute: parameters, adapters,
hooks and every method of peft's stay, and giving the class back is all that it takes to undo it. Only ``forward``
differs, and it falls back to peft's own wherever :func:`why_not` has a reason. This module imports peft.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP

from clipft.families.forward import is_watched, stand_in
from clipft.families.registry import FAMILIES
from clipft.models.frozen import FrozenLinear
from clipft.models.fused import FusedQuickGELU
from clipft.ops import lora_linear, quick_gelu_lora_linear
from clipft.ops.int8_lora import int8_lora_linear, quick_gelu_int8_lora_linear
from clipft.ops.kernels import FLOATS, MAX_DIM, autocasts, problem

__all__ = ["FusedLoraLinear", "FusedMLP", "fuse_lora", "has_lora", "why_not"]

_logger = logging.getLogger(__name__)
_SHOWN = 3  # names in a line of the log


class FusedLoraLinear(lora.Linear):
    """A ``lora.Linear`` whose ``forward`` is ``clipft.lora_linear``. Made by :func:`clipft.fuse` only."""

    _clipft_stands_in_for = lora.Linear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``lora.Linear.forward``: [..., in] -> [..., out]. Arguments beyond ``x`` (``adapter_names`` of a mixed
        batch, say) are peft's.
        """
        if args or kwargs or why_not(self) or not _fits(x, self):
            return super().forward(x, *args, **kwargs)
        return _run(int8_lora_linear if isinstance(self.base_layer, FrozenLinear) else lora_linear, x, self)


FusedLoraLinear.__name__ = "Linear"  # what print(model) shows; pickle goes by the qualified name


class ActivationAfter(nn.Module):
    """An MLP that hands quick_gelu to the LoRA layer after it: no pass and no tensor of its own. Made by
    :func:`clipft.fuse` only.
    """

    if TYPE_CHECKING:
        fc1: nn.Module
        activation_fn: nn.Module
        fc2: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As ``CLIPMLP.forward``."""
        activation, fc2 = self.activation_fn, self.fc2
        hidden = self.fc1(hidden_states)
        if (
            type(activation) is not FusedQuickGELU
            or not isinstance(fc2, FusedLoraLinear)
            or why_not(fc2)
            or _why_not_called(activation)
            or _why_not_called(fc2)
            or not _fits(hidden, fc2)
        ):
            return cast(Tensor, fc2(activation(hidden)))
        in_int8 = isinstance(fc2.base_layer, FrozenLinear)
        return _run(quick_gelu_int8_lora_linear if in_int8 else quick_gelu_lora_linear, hidden, fc2)


FusedMLP = stand_in(ActivationAfter, CLIPMLP)  # what pickles name


def _run(op: Callable[..., Tensor], x: Tensor, layer: Any) -> Tensor:
    name = _adapters(layer)[0]
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    return op(
        x,
        base.codes if isinstance(base, FrozenLinear) else base.weight,
        base.bias,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
        dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        training=dropout.training,
    )


def has_lora(model: nn.Module) -> bool:
    """Whether peft has put LoRA layers, of any kind, into the model."""
    return any(isinstance(module, lora.LoraLayer) for module in model.modules())


def fuse_lora(model: nn.Module) -> None:
    """Take over every ``lora.Linear`` inside, and a family's MLP around it; log one warning per reason for the LoRA
    layers that run peft's forward as the model is now.
    """
    left: dict[str, list[str]] = {}
    mlps = {tower.mlp for family in FAMILIES for tower in family.towers.values()}
    for name, module in model.named_modules():
        plain: Any = type(module)
        if plain in mlps and "forward" not in vars(module):
            module.__class__ = stand_in(ActivationAfter, plain)
        if not isinstance(module, lora.LoraLayer):
            continue
        if type(module) is lora.Linear and "forward" not in vars(module):
            module.__class__ = FusedLoraLinear
        reason = why_not(module)
        if reason:
            left.setdefault(reason, []).append(name)
    for reason, names in left.items():
        more = ", ..." if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN]) + more
        _logger.warning("clipft.fuse: %d LoRA layer(s) run peft's own forward: %s (%s)", len(names), reason, shown)


# ---- what the fused forward covers ----


def why_not(layer: nn.Module) -> str | None:
    """Why a LoRA layer runs peft's own forward in the state it is in, or None where it runs the fused one."""
    if type(layer) is not FusedLoraLinear:
        return _why_not_taken_over(layer)
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "the adapter is merged into the weight"
    names = _adapters(layer)
    if len(names) != 1:
        return "several adapters are active" if names else "no adapter is active"
    name = names[0]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is not plain LoRA"
    base: Any = layer.base_layer
    lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
    in_int8 = isinstance(base, FrozenLinear)
    return (
        (_why_not_called(base) if in_int8 else _why_not_linear(base))
        or _why_not_linear(lora_a)
        or _why_not_linear(lora_b)
        or _why_not_dropout(layer.lora_dropout[name])
        or _why_not_adapter(lora_b, layer.scaling[name])
        or (_why_not_in_float32(lora_a, lora_b) if in_int8 else _why_not_dtype(layer, base.weight, lora_a, lora_b))
    )


def _adapters(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _why_not_taken_over(layer: nn.Module) -> str:
    if type(layer) is lora.Linear:
        return "something else replaced the layer's forward"
    return f"lora.{type(layer).__name__} is not lora.Linear"


def _why_not_linear(linear: nn.Module) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is not torch's Linear"
    if type(linear.weight) not in (nn.Parameter, Tensor):
        return f"a weight of type {type(linear.weight).__name__}"
    return _why_not_called(linear)


def _why_not_dropout(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Dropout:
        if dropout.inplace or not dropout.p < 1:
            return f"{dropout} is not a dropout that clipft.lora_linear knows"
    elif type(dropout) is not nn.Identity:
        return f"{type(dropout).__name__} is not torch's Dropout"
    return _why_not_called(dropout)


def _why_not_called(module: nn.Module) -> str | None:
    """The fused forward does not call the modules inside, so what hangs on their calls would be lost."""
    return "a module inside has a hook or a replaced forward" if is_watched(module) else None


def _why_not_adapter(lora_b: Any, scaling: Any) -> str | None:
    if lora_b.bias is not None:
        return "the adapter has a bias (lora_bias)"
    if not isinstance(scaling, (int, float)):
        return f"a scaling of type {type(scaling).__name__}"
    return None


def _why_not_dtype(layer: Any, weight: Tensor, lora_a: Any, lora_b: Any) -> str | None:
    if weight.dtype not in FLOATS:
        return f"clipft.lora_linear has no kernel for {weight.dtype} on {weight.device.type}"
    if (reason := problem(weight.device, "lora")) is not None:
        return f"clipft.lora_linear has no kernel on {weight.device.type}: {reason}"
    if {lora_a.weight.dtype, lora_b.weight.dtype} - {weight.dtype, torch.float32}:
        return f"an adapter in {lora_a.weight.dtype} on a layer in {weight.dtype}"
    if lora_a.weight.dtype != weight.dtype and not layer.cast_input_dtype_enabled:
        return "casting the input to the adapter's dtype is turned off"
    return None


def _why_not_in_float32(lora_a: Any, lora_b: Any) -> str | None:
    """On a base in int8, which has no dtype of its own."""
    if {lora_a.weight.dtype, lora_b.weight.dtype} - {torch.float32}:
        return f"an adapter in {lora_a.weight.dtype} on a layer in int8"
    return None


def _fits(x: Tensor, layer: Any) -> bool:
    """Whether the input is one for which the fused forward gives what peft's gives; peft's also has the errors."""
    base = layer.base_layer
    in_int8 = isinstance(base, FrozenLinear)
    weight = base.codes.weight_scale if in_int8 else base.weight
    if x.device != weight.device or x.dtype not in FLOATS or not 1 <= x.dim() <= MAX_DIM:
        return False
    return in_int8 or x.dtype == weight.dtype or autocasts(x.device)
