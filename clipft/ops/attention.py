"""Self-attention as a function over ``torch.ops.clipft.attention``, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipft.ops.kernels import call, check_tensors

__all__ = ["attention"]


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
    check_tensors("attention", qkv=qkv)
    length, width = qkv.shape[1:] if qkv.dim() == 3 else (0, 0)
    if scale is None:  # 1 where heads do not fit, of which C tells
        scale = (width // (3 * heads)) ** -0.5 if 0 < 3 * heads <= width else 1.0
    queries = length if queries is None else queries
    return call(torch.ops.clipft.attention, qkv.contiguous(), heads, queries, scale, causal)


@torch.library.register_fake("clipft::attention")
def _(qkv: Tensor, heads: int, queries: int, scale: float, causal: bool = False) -> Tensor:
    return qkv.new_empty((qkv.shape[0], queries, qkv.shape[2] // 3))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("clipft.attention has no gradient: it is for inference")


torch.library.register_autograd("clipft::attention", _no_gradient)
