"""The linear layer with frozen int8 weights and a LoRA branch, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipft.ops import int8, reference
from clipft.ops.gelu import quick_gelu
from clipft.ops.kernels import (
    FLOATS,
    autocasts,
    bias_or_empty,
    call,
    check_floats,
    check_fraction,
    check_number,
    check_tensors,
    dtype_name,
    exports_to_onnx,
    shape_of,
    wants_plain,
    without_autocast,
)
from clipft.ops.lora import draw_seed, dropout_mask
from clipft.ops.packed import PackedWeight

__all__ = ["Int8Weight", "int8_lora_linear", "quick_gelu_int8_lora_linear"]

_OP = "int8_lora_linear"


class Int8Weight(PackedWeight):
    """A frozen [out, in] weight as int8 codes, for products forward and backward.

    What is saved is plain and moves between machines: ``weight_int8`` [out, in] int8 and ``weight_scale`` [out]
    float32, once. On a CPU two packings are kept, of the codes and of their transpose, together half the size of the
    float32 weight; they are made when the module is made, moved, loaded, or ``weight_int8`` assigned. Nothing here gets
    a gradient, and ``weight_scale`` stays float32 whatever dtype the module is cast to.
    """

    _packed_t: Tensor  # of the transpose; empty where there are no packings
    _name = "nn.Int8Weight"
    _packings = ("_packed", "_packed_t")

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        if out_features > int8.MAX_IN:
            raise ValueError(f"clipft.{self._name}: out_features must be at most {int8.MAX_IN}, got {out_features}")
        super().__init__(in_features, out_features, device)

    @classmethod
    def from_weight(cls, weight: Tensor) -> Int8Weight:
        """The codes of a finite [out, in] float weight, by :func:`clipft.ops.quantize_weight`."""
        codes, scale = int8.quantize_weight(weight)
        frozen = cls(weight.shape[1], weight.shape[0], weight.device)
        frozen.weight_int8, frozen.weight_scale = codes, scale
        return frozen

    def _keep(self, weight: Tensor) -> None:
        super()._keep(weight)
        self._packed_t = self._pack(weight.t()) if weight.device.type == "cpu" else weight.new_empty(0)


def int8_lora_linear(
    input: Tensor,  # noqa: A002  (torch.nn.functional.linear's name)
    weight: Int8Weight,
    bias: Tensor | None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """:func:`clipft.lora_linear` on a frozen int8 weight, with gradients: ``x̂ Ŵᵀ + b + scaling · dropout(x) Aᵀ Bᵀ``.

    ``Ŵ`` is the codes times their channels' scales, ``x̂`` the input with each row brought to 7 bits, as
    :func:`quantized_linear` does it. The backward pass multiplies with the same codes: ``(dy · scale) weight_int8``,
    each row of the bracket brought to 7 bits, and the branch's. So a product costs what int8 costs, in both directions
    (SwitchBack, arXiv:2304.13013, did this on GPUs). The branch and the gradients of ``lora_a`` and ``lora_b`` are of
    the true input, in float32.

    Args:
        input: [..., in] float32, bfloat16 or float16, at most 8 dimensions.
        weight: :class:`clipft.nn.Int8Weight`, [out, in].
        bias: [out], float32 or the dtype of ``input``, or None.
        lora_a: [r, in], float32 or the dtype of ``input``; None, as ``lora_b`` then: no branch, and nothing is kept
            for the backward pass.
        lora_b: [out, r], float32 or the dtype of ``input``.
        scaling: factor of the branch, ``alpha / r`` or what peft's adapter says.
        dropout: probability in [0, 1) with which an element of the branch's input is zeroed, the others being divided
            by ``1 - dropout``.
        training: whether dropout happens, as in :func:`clipft.lora_linear`.

    Returns:
        [..., out] in the dtype of ``input``. A row that holds a NaN or an infinity comes out NaN, forward and backward;
        other rows do not notice. Sums are exact integers, the same on every CPU. Under autocast ``input`` and ``bias``
        are cast to its dtype; ``lora_a`` and ``lora_b`` stay as they are.

    Raises:
        TypeError: a dtype that is not supported, or that does not fit the input's.
        ValueError: a shape, device or ``dropout`` that does not fit.
        NotImplementedError: within ``torch.onnx.export``, or with ``CLIPFT_STRICT=1`` on a device that is no CPU.
            There, without it, plain torch computes the same, and says so.
    """
    return _linear(input, weight, bias, lora_a, lora_b, scaling, dropout if training else 0.0, dropout, False)


def quick_gelu_int8_lora_linear(
    input: Tensor,  # noqa: A002
    weight: Int8Weight,
    bias: Tensor | None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``int8_lora_linear(quick_gelu(input), ...)``. Arguments, result and errors are those of
    :func:`int8_lora_linear`.
    """
    return _linear(input, weight, bias, lora_a, lora_b, scaling, dropout if training else 0.0, dropout, True)


def _linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    active_dropout: float,
    dropout: float,
    activation: bool,
) -> Tensor:
    x, bias, branch = _checked(x, weight, bias, lora_a, lora_b, scaling, dropout)
    if wants_plain(x, *branch) or not int8.runs(_OP, x):
        return _plain(x, weight, bias, branch, scaling, active_dropout, activation)
    x = int8.in_order(quick_gelu(x) if activation else x)
    some_bias = bias_or_empty(_OP, bias, weight.weight_scale, x)
    base: Tensor = _Int8Product.apply(x, weight._packed, weight._packed_t, weight.weight_scale, some_bias)
    if not branch:
        return base
    wide = x.float()
    with without_autocast(x.device):
        if active_dropout:
            mask = dropout_mask(draw_seed(x), math.prod(x.shape[:-1]), x.shape[-1], active_dropout).view(x.shape)
            wide = torch.where(mask.bool(), wide / (1.0 - active_dropout), torch.zeros_like(wide))
        return (base.float() + scaling * F.linear(F.linear(wide, branch[0].float()), branch[1].float())).to(x.dtype)


def _checked(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Input and bias as autocast wants them; the branch's two matrices, or none."""
    if not isinstance(weight, Int8Weight):
        raise TypeError(f"clipft.{_OP}: weight must be a clipft.nn.Int8Weight, got {type(weight).__name__}")
    if (lora_a is None) != (lora_b is None):
        raise TypeError(f"clipft.{_OP}: lora_a and lora_b must both be tensors or both be None")
    named = {} if lora_a is None or lora_b is None else {"lora_a": lora_a, "lora_b": lora_b}
    check_tensors(_OP, input=x, weight=weight.weight_scale, **named)
    check_number(_OP, "scaling", scaling)
    check_fraction(_OP, "dropout", dropout)
    if exports_to_onnx():
        raise NotImplementedError(f"clipft.{_OP}: torch.onnx.export has no operators for it; export the float model")
    if autocasts(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype) if x.dtype in FLOATS else x
        bias = bias.to(dtype) if isinstance(bias, Tensor) and bias.dtype in FLOATS else bias
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"clipft.{_OP}: input must have the weight's {weight.in_features} features last, got shape {shape_of(x)}"
        )
    if lora_a is not None and lora_b is not None:
        _check_branch(x, weight, lora_a, lora_b)
    return x, bias, tuple(named.values())


def _check_branch(x: Tensor, weight: Int8Weight, lora_a: Tensor, lora_b: Tensor) -> None:
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor.dtype not in (torch.float32, x.dtype):
            raise TypeError(
                f"clipft.{_OP}: {name} must have the dtype of input, {dtype_name(x)}, or float32, got "
                f"{dtype_name(tensor)}"
            )
    features, out = weight.in_features, weight.out_features
    if lora_a.dim() != 2 or len(lora_a) == 0 or lora_a.shape[1] != features:
        raise ValueError(f"clipft.{_OP}: lora_a must be [r, in] with in = {features}, got shape {shape_of(lora_a)}")
    if lora_b.shape != (out, len(lora_a)):
        raise ValueError(f"clipft.{_OP}: lora_b must be [out, r], {[out, len(lora_a)]}, got shape {shape_of(lora_b)}")


class _Int8Product(torch.autograd.Function):
    """The layer without its branch, of which the backward pass needs the weights alone."""

    @staticmethod
    def forward(x: Tensor, packed: Tensor, packed_t: Tensor, scale: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return _product(x, packed, scale, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, _, packed_t, scale, bias = inputs
        ctx.features, ctx.bias_dtype = x.shape[-1], bias.dtype
        ctx.save_for_backward(packed_t, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed_t, scale = ctx.saved_tensors
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            ones, none = scale.new_ones(ctx.features), scale.new_empty(0)
            d_x = _product(int8.in_order(grad.float() * scale), packed_t, ones, none).to(grad.dtype)
        if ctx.needs_input_grad[4]:
            d_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return d_x, None, None, None, d_bias


def _product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    none = x.new_empty(0)
    rest = packed, scale, bias, 0, none, none, none, none
    return call(torch.ops.clipft.quantized_chain, x, none, none, 0.0, *rest, name=_OP)


def _plain(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    branch: tuple[Tensor, ...],
    scaling: float,
    dropout: float,
    activation: bool,
) -> Tensor:
    """The layer where there is no kernel, whose mask comes from torch's own dropout."""
    check_floats(_OP, input=x)
    mask = F.dropout(torch.ones_like(x, dtype=torch.float32), dropout).bool() if dropout else None
    with without_autocast(x.device):
        wide = reference.quick_gelu(x.float()).to(x.dtype) if activation else x
        codes = weight._plain_weight(), weight.weight_scale
        lora_a, lora_b = branch or (None, None)
        out = reference.int8_lora_linear(wide, *codes, bias, lora_a, lora_b, scaling, dropout=dropout, mask=mask)
        return out.to(x.dtype)
