"""Self-attention as a function over ``torch.ops.clipft.attention``, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipft.ops import reference
from clipft.ops.kernels import (
    PLAIN,
    call,
    check_floats,
    check_tensors,
    has_kernel,
    shape_of,
    wants_plain,
    without_autocast,
)

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
        to it, no other picture and no other head. For inference: ``backward`` is refused.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or number that does not fit.
        NotImplementedError: with ``CLIPFT_STRICT=1`` on a device that the kernel does not run on, which is any but the
            CPU. Otherwise plain torch computes it there, with a warning that tells the cause.
    """
    check_tensors("attention", qkv=qkv)
    length, width = qkv.shape[1:] if qkv.dim() == 3 else (0, 0)
    if scale is None:  # 1 where heads do not fit, of which C tells
        scale = (width // (3 * heads)) ** -0.5 if 0 < 3 * heads <= width else 1.0
    queries = length if queries is None else queries
    if wants_plain(qkv) or not has_kernel("attention", qkv, PLAIN):
        _check(qkv, heads, queries, scale)
        with without_autocast(qkv.device):
            return reference.attention(qkv.float(), heads, scale, causal, queries).to(qkv.dtype)
    return call(torch.ops.clipft.attention, qkv.contiguous(), heads, queries, scale, causal)


def _check(qkv: Tensor, heads: int, queries: int, scale: float) -> None:
    """As csrc/ops/attention.c, where that does not run."""
    check_floats("attention", qkv=qkv)
    if heads < 1:
        raise ValueError(f"clipft.attention: heads must be at least 1, got {heads}")
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"clipft.attention: qkv must be [batch, length, 3 * heads * dim] with {heads} heads, got shape "
            f"{shape_of(qkv)}"
        )
    if not 0 <= queries <= qkv.shape[1]:
        raise ValueError(f"clipft.attention: queries must be 0 to the length, {qkv.shape[1]}, got {queries}")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"clipft.attention: scale must be finite and > 0, got {scale:g}")


@torch.library.register_fake("clipft::attention")
def _(qkv: Tensor, heads: int, queries: int, scale: float, causal: bool = False) -> Tensor:
    return qkv.new_empty((qkv.shape[0], queries, qkv.shape[2] // 3))


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("clipft.attention has no gradient: it is for inference")


torch.library.register_autograd("clipft::attention", _no_gradient)
