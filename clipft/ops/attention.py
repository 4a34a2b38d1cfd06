"""Self-attention as a function over ``torch.ops.clipft.attention``, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipft.ops.kernels import FLOATS, dtype_name

__all__ = ["attention"]

_MAX_SIZE = 1 << 24  # MAX_SIZE in csrc/ops/attention.c


def attention(
    qkv: Tensor, heads: int, *, scale: float | None = None, causal: bool = False, queries: int | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` for every head, from one projection of queries, keys and values to the input of the
    output projection, without a copy in between.

    Args:
        qkv: [batch, length, 3 * heads * dim] float32, bfloat16 or float16: all heads' queries, then keys, then values.
        heads: at least 1.
        scale: finite and > 0; default: ``dim ** -0.5``.
        causal: token i attends to tokens 0 .. i.
        queries: attend from the first so many tokens only; default: from all.

    Returns:
        [batch, queries, heads * dim] in the dtype of ``qkv``, computed in float32. A NaN reaches the tokens that attend
        to it, no other picture and no other head. For inference: there is no gradient.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or number that does not fit.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"clipft.attention: qkv must be a tensor, got {type(qkv).__name__}")
    if qkv.dtype not in FLOATS:
        raise TypeError(f"clipft.attention: qkv must be float32, bfloat16 or float16, got {dtype_name(qkv)}")
    if heads < 1:
        raise ValueError(f"clipft.attention: heads must be at least 1, got {heads}")
    width = qkv.shape[-1] if qkv.dim() == 3 else 0
    if width == 0 or width % 3 != 0 or width // 3 % heads != 0 or qkv.shape[1] > _MAX_SIZE or width > _MAX_SIZE:
        raise ValueError(
            f"clipft.attention: qkv must be [batch, length, 3 * heads * dim] with {heads} heads, "
            f"got shape {list(qkv.shape)}"
        )
    length = qkv.shape[1]
    if queries is None:
        queries = length
    if not 0 <= queries <= length:
        raise ValueError(f"clipft.attention: queries must be 0 to the length, {length}, got {queries}")
    if scale is None:
        scale = (width // 3 // heads) ** -0.5
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"clipft.attention: scale must be finite and > 0, got {scale:g}")
    return torch.ops.clipft.attention(qkv.contiguous(), heads, queries, scale, causal)


@torch.library.register_fake("clipft::attention")
def _(qkv: Tensor, heads: int, queries: int, scale: float, causal: bool = False) -> Tensor:
    return qkv.new_empty((qkv.shape[0], queries, qkv.shape[2] // 3))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("clipft.attention has no gradient: it is for inference")


torch.library.register_autograd("clipft::attention", _no_gradient)
