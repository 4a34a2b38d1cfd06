"""The int8 linear layer as a function over ``torch.ops.clipft.quantized_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipft.ops import reference
from clipft.ops.kernels import (
    FLOATS,
    bias_or_empty,
    call,
    check_floats,
    check_tensors,
    dtype_name,
    has_kernel,
    in_order,
    refuse_derivatives,
    shape_of,
)

__all__ = ["quantize_and_pack", "quantize_weight", "quantized_linear"]

MAX_IN, _MAX_OUT = 131072, 1 << 24  # CLIPFT_INT8_MAX_IN and _OUT in csrc/kernels/int8/int8.h
_HEADER = 64  # clipft_int8_header there
_PANEL = 16  # CLIPFT_INT8_PANEL in csrc/kernels/int8/int8_kernels.h
_ACTIVATIONS = {None: 0, "quick_gelu": 1, "gelu": 2, "gelu_tanh": 3}  # clipft_activation there
_NAMES = 'None, "quick_gelu", "gelu" or "gelu_tanh"'


def quantized_linear(
    input: Tensor,  # noqa: A002  (torch.nn.functional.linear's name)
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A linear layer with int8 weights, ``activation(x (weight_int8 * weight_scale[:, None])ᵀ + bias)``.

    Each row of ``input`` is brought to 7 bits when it comes, with a scale and a zero point of its own; products and
    sums are exact integers, the same on every CPU and GPU. On a CPU it packs the weights at every call:
    ``clipft.nn.QuantizedLinear`` keeps them packed.

    Args:
        input: [..., in] float32, bfloat16 or float16, at most 8 dimensions.
        weight_int8: [out, in] int8, in <= 131072, out <= 2^24.
        weight_scale: [out] float32; channel j's weights are ``weight_int8[j] * weight_scale[j]``.
        bias: [out], float32 or the dtype of ``input``, or None.
        activation: None, "quick_gelu" (``x · sigmoid(1.702 x)``), "gelu" (exact) or "gelu_tanh" (torch's
            ``F.gelu(approximate="tanh")``).

    Returns:
        [..., out] in the dtype of ``input``. A row that holds a NaN or an infinity comes out NaN; other rows do not
        notice. For inference: there is no gradient. Autocast changes nothing.

    Raises:
        TypeError: a dtype that is not supported, or that does not fit the input's.
        ValueError: a shape, device or ``activation`` that does not fit.
        NotImplementedError: with ``CLIPFT_STRICT=1`` on a device that the kernels do not run on. Otherwise plain torch
            computes it there, with a warning that tells the cause.
    """
    name = "quantized_linear"
    check_tensors(name, input=input, weight_int8=weight_int8, weight_scale=weight_scale)
    refuse_derivatives(name, input, weight_scale)
    some_bias, code = bias_or_empty(name, bias, weight_int8, input), activation_code(name, activation)
    if not runs(name, input, "quantized"):
        check_floats(name, input=input)
        return plain_linear(name, input, weight_int8, weight_scale, bias, activation)
    return call(torch.ops.clipft.quantized_linear, in_order(input), weight_int8, weight_scale, some_bias, code)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] float weights as int8 in -127 .. 127 and a float32 scale per output channel; a channel of zeros gets
    scale 1.

    Raises:
        TypeError: not a float tensor. ValueError: not [out, in], or NaN or Inf in it.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = dtype_name(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"clipft.quantize_weight: weight must be a float tensor, got {got}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"clipft.quantize_weight: weight must be [out, in], not empty, got shape {shape_of(weight)}")
    wide = weight.detach().float()
    if not torch.isfinite(wide).all():
        raise ValueError("clipft.quantize_weight: weight must be finite, got NaN or Inf in it")
    scale = wide.abs().amax(dim=1) / 127.0
    scale = torch.where(scale > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), torch.ones_like(scale))
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def quantize_and_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a float32 weight on a CPU, [out, in], the packings of its codes and of their transpose, and the scales, [out]
    float32: those of :func:`quantize_weight`, in one op, for layers whose weights change at every step.

    Raises:
        TypeError: not float32. ValueError: not [out, in], or NaN or Inf in it.
    """
    check_tensors("quantized_weight", weight=weight)
    packed, packed_t, scale = call(torch.ops.clipft.quantized_weight, weight.detach().contiguous())
    return packed, packed_t, scale


def runs(op: str, x: Tensor, *code: str) -> bool:
    """Whether there are kernels; without them plain torch computes the layer in float64, where the device has that."""
    needed = "an int8 layer on a device without float64 (keep the model on the CPU)" if x.device.type == "mps" else None
    return has_kernel(op, x, "Plain torch computes it, in float64", *code, needed=needed)


def plain_linear(
    op: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The layer where there is no kernel."""
    check_weight(op, weight, scale)
    if bias is not None:
        check_floats(op, bias=bias)
    out = reference.quantized_linear(x.reshape(-1, x.shape[-1]), weight, scale, bias, activation)
    return out.to(x.dtype).view(*x.shape[:-1], -1)


# ---- checks that C cannot make ----


def activation_code(op: str, activation: Any) -> int:
    """The op's number of an activation."""
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"clipft.{op}: activation must be {_NAMES}, got {type(activation).__name__}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f'clipft.{op}: activation must be {_NAMES}, got "{activation}"')
    return _ACTIVATIONS[activation]


def check_codes(op: str, weight: Any, shape: tuple[int, int]) -> None:
    """Of a layer of that shape."""
    check_tensors(op, weight_int8=weight)
    if weight.dtype != torch.int8:
        raise TypeError(f"clipft.{op}: weight_int8 must be int8, got {dtype_name(weight)}")
    if weight.shape != shape:
        raise ValueError(f"clipft.{op}: weight_int8 must be [out, in], {list(shape)}, got shape {shape_of(weight)}")


def check_weight(op: str, weight: Any, scale: Any) -> None:
    """Dtypes and shapes of a layer's state, before any op takes it."""
    check_tensors(op, weight_int8=weight, weight_scale=scale)
    if weight.dtype != torch.int8:
        raise TypeError(f"clipft.{op}: weight_int8 must be int8, got {dtype_name(weight)}")
    if weight.dim() != 2 or not 0 < weight.shape[0] <= _MAX_OUT or not 0 < weight.shape[1] <= MAX_IN:
        raise ValueError(
            f"clipft.{op}: weight_int8 must be [out, in] with 0 < out <= {_MAX_OUT} and 0 < in <= {MAX_IN}, "
            f"got shape {shape_of(weight)}"
        )
    if scale.dtype != torch.float32:
        raise TypeError(f"clipft.{op}: weight_scale must be float32, got {dtype_name(scale)}")
    if scale.shape != weight.shape[:1]:
        raise ValueError(f"clipft.{op}: weight_scale must be [out], [{len(weight)}], got shape {shape_of(scale)}")


def check_surroundings(op: str, x: Tensor, norm: Any, residual: Any, features: int, out: int) -> None:
    """The norm before a layer of ``features`` and what is added to its ``out``, of which C sees the tensors only."""
    if x.dtype not in FLOATS or x.shape[-1:] != (features,):
        return  # C tells of the input
    if norm is not None:
        if not isinstance(norm, torch.nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise TypeError(f"clipft.{op}: norm must be a torch.nn.LayerNorm with weight and bias, got {norm!r}")
        if norm.normalized_shape != (features,):
            raise ValueError(
                f"clipft.{op}: norm must be over the input's {features} features, got {norm.normalized_shape}"
            )
    if residual is not None:
        check_tensors(op, input=x, residual=residual)
        if residual.dtype != x.dtype:
            raise TypeError(
                f"clipft.{op}: residual must have the dtype of input, {dtype_name(x)}, got {dtype_name(residual)}"
            )
        if residual.shape != (*x.shape[:-1], out):
            raise ValueError(
                f"clipft.{op}: residual must have the result's shape, {[*x.shape[:-1], out]}, got {shape_of(residual)}"
            )


# ---- fake kernels; no gradient ----


def _packed_size(out: int, features: int) -> int:
    panels, depth = (out + _PANEL - 1) // _PANEL, (features + 3) // 4 * 4
    return _HEADER + panels * (_PANEL * (depth + 4) + (depth + 63) // 64)


@torch.library.register_fake("clipft::quantized_pack")
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((_packed_size(*weight.shape),), dtype=torch.uint8)


@torch.library.register_fake("clipft::quantized_weight")
def _(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, features = weight.shape
    sizes = _packed_size(out, features), _packed_size(features, out)
    packed, packed_t = (weight.new_empty((size,), dtype=torch.uint8) for size in sizes)
    return packed, packed_t, weight.new_empty((out,))


@torch.library.register_fake("clipft::quantized_unpack")
def _(packed: Tensor, channels: int, features: int) -> Tensor:
    return packed.new_empty((channels, features), dtype=torch.int8)


@torch.library.register_fake("clipft::quantized_linear")
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, activation: int = 0) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@torch.library.register_fake("clipft::quantized_chain")
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    activation: int,
    packed2: Tensor,
    scale2: Tensor,
    bias2: Tensor,
    residual: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], (scale2 if len(packed2) else scale).shape[0]))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("clipft.quantized_linear has no gradient: int8 layers are for inference")


for _op in ("quantized_linear", "quantized_chain"):
    torch.library.register_autograd(f"clipft::{_op}", _no_gradient)
