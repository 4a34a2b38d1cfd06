"""Attention as functions over ``torch.ops.clipft.attention``."""

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
    dtype_name,
    has_kernel,
    no_second_derivative,
    shape_of,
    wants_plain,
    without_autocast,
)

__all__ = ["attend", "attention"]


def attention(
    qkv: Tensor, heads: int, *, scale: float | None = None, causal: bool = False, queries: int | None = None
) -> Tensor:
    """:func:`attend` from one projection of queries, keys and values, without a copy in between.

    Args:
        qkv: [batch, length, 3 * heads * dim]: all heads' queries, then keys, then values.
        queries: attend from the first so many tokens only; default: from all.

    Returns:
        [batch, queries, heads * dim].
    """
    check_tensors("attention", qkv=qkv)
    _check_heads(heads)
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"clipft.attention: qkv must be [batch, length, 3 * heads * dim] with {heads} heads, got shape "
            f"{shape_of(qkv)}"
        )
    if queries is not None and not 0 <= queries <= qkv.shape[1]:
        raise ValueError(f"clipft.attention: queries must be 0 to the length, {qkv.shape[1]}, got {queries}")
    query, key, value = qkv.chunk(3, dim=2)
    return attend(query[:, :queries], key, value, heads, scale=scale, causal=causal)


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, scale: float | None = None, causal: bool = False
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` for every head (Vaswani et al. 2017, arXiv:1706.03762), from projections to the input
    of the output projection: heads lie side by side, as linear layers leave them and take them.

    Args:
        query: [batch, queries, heads * dim] float32, bfloat16 or float16.
        key, value: [batch, length, heads * dim] in the dtype of ``query``.
        heads: at least 1.
        scale: finite and > 0; default: ``dim ** -0.5``.
        causal: query i attends to tokens 0 .. i; no more queries than tokens.

    Returns:
        [batch, queries, heads * dim] in the dtype of ``query``, computed in float32. A NaN reaches the queries that
        attend to it, no other picture and no other head; in the backward pass, which computes the weights again rather
        than keep them, it may reach all gradients of its head.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or number that does not fit.
        NotImplementedError: with ``CLIPFT_STRICT=1`` on a device that the kernel does not run on, which is any but the
            CPU. Otherwise plain torch computes it there, with a warning that tells the cause.
    """
    check_tensors("attention", query=query, key=key, value=value)
    if scale is None:  # 1 where heads do not fit, of which C tells
        width = query.shape[-1] if query.dim() else 0
        scale = (width // heads) ** -0.5 if 0 < heads <= width else 1.0
    if wants_plain(query, key, value) or not has_kernel("attention", query, PLAIN):
        _check(query, key, value, heads, scale, causal)
        with without_autocast(query.device):
            return reference.attend(query.float(), key.float(), value.float(), heads, scale, causal).to(query.dtype)
    rows = (_in_order(x) for x in (query, key, value))
    return call(torch.ops.clipft.attention, *rows, heads, scale, causal)


def _in_order(x: Tensor) -> Tensor:
    """With rows that C can walk through: a part of a wider projection's has them."""
    if x.dim() != 3:
        return x  # which C refuses
    together = 1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)
    return x if together and x.stride(2) == 1 else x.contiguous()


def _check_heads(heads: int) -> None:
    if heads < 1:
        raise ValueError(f"clipft.attention: heads must be at least 1, got {heads}")


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, causal: bool) -> None:
    """As csrc/ops/attention.c, where that does not run."""
    check_floats("attention", query=query, key=key, value=value)
    _check_heads(heads)
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"clipft.attention: {name} must have the dtype of query, {dtype_name(query)}, got {dtype_name(tensor)}"
            )
        if tensor.dim() != 3 or tensor.shape[2] == 0 or tensor.shape[2] % heads:
            raise ValueError(
                f"clipft.attention: {name} must be [batch, length, heads * dim] with {heads} heads, got shape "
                f"{shape_of(tensor)}"
            )
    batch, queries, width = query.shape
    if value.shape != key.shape:
        raise ValueError(
            f"clipft.attention: value must have the shape of key, {shape_of(key)}, got shape {shape_of(value)}"
        )
    if key.shape[0] != batch or key.shape[2] != width:
        raise ValueError(
            f"clipft.attention: key must be [{batch}, length, {width}] as query is, got shape {shape_of(key)}"
        )
    if queries > (key.shape[1] if causal else queries * key.shape[1]):
        needed = "a token for each query" if causal else "tokens"
        raise ValueError(f"clipft.attention: key must have {needed}, got {key.shape[1]} of them for {queries} queries")
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"clipft.attention: scale must be finite and > 0, got {scale:g}")


@torch.library.register_fake("clipft::attention")
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, causal: bool = False) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.register_fake("clipft::attention_backward")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gradient(ctx: Any, grad: Tensor) -> Any:
    grads = call(torch.ops.clipft.attention_backward, _in_order(grad), *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None)


torch.library.register_autograd("clipft::attention", _gradient, setup_context=_context)
torch.library.register_autograd("clipft::attention_backward", no_second_derivative)
