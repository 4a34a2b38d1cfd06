"""``clipft::quantized_linear`` in standard ONNX operators: the same levels, sums and scales as ``csrc/kernels/int8.h``.

Seven bits to an activation matter here too: ONNX Runtime's MatMulInteger adds pairs of products in 16 bits on CPUs
without int8 dot products, where eight bits would saturate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxscript import FLOAT, INT8, opset20

__all__ = ["TRANSLATIONS"]

op: Any = opset20  # its types say that everything may be everything
_LEVELS, _SMALLEST = 127.0, float(np.finfo(np.float32).tiny)
_QUICK_GELU, _GELU, _GELU_TANH = 1, 2, 3


def quantized_linear(
    input: FLOAT,  # noqa: A002  (the op's name for it)
    weight_int8: INT8,
    weight_scale: FLOAT,
    bias: FLOAT,
    activation: int = 0,
) -> Any:
    """y = act(row_scale weight_scale (q Wᵀ - zero Σ W) + b), q = round(x / row_scale) + zero in 0 .. 127."""
    last, nothing = op.Constant(value_ints=[-1]), op.Constant(value_float=0.0)
    low = op.Min(op.ReduceMin(input, last, keepdims=1), nothing)
    high = op.Max(op.ReduceMax(input, last, keepdims=1), nothing)
    levels = op.Constant(value_float=_LEVELS)
    scale = op.Max(op.Sub(op.Div(high, levels), op.Div(low, levels)), op.Constant(value_float=_SMALLEST))
    inverse = op.Reciprocal(scale)
    zero = op.Neg(op.Round(op.Mul(low, inverse)))
    q = op.Cast(op.Clip(op.Add(op.Round(op.Mul(input, inverse)), zero), nothing, levels), to=2)  # uint8
    weight = op.Transpose(weight_int8, perm=[1, 0])
    column_sums = op.ReduceSum(op.Cast(weight, to=6), op.Constant(value_ints=[0]), keepdims=0)  # int32
    sums = op.Sub(op.MatMulInteger(q, weight), op.Mul(op.Cast(zero, to=6), column_sums))
    y = op.Mul(op.Mul(op.Cast(sums, to=1), weight_scale), scale)
    if bias.shape is None or tuple(bias.shape) != (0,):
        y = op.Add(y, bias)
    if activation == _QUICK_GELU:
        return op.Mul(y, op.Sigmoid(op.Mul(y, op.Constant(value_float=1.702))))
    if activation == _GELU_TANH:
        return op.Gelu(y, approximate="tanh")
    return op.Gelu(y) if activation == _GELU else y


TRANSLATIONS = {torch.ops.clipft.quantized_linear.default: quantized_linear}
