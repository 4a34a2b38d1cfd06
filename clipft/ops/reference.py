"""The ops in plain torch, as one would write them from the papers: the truth that tests compare with, run in float64.

They build the full N x N matrix of logits and whole dropout masks, and support autograd in every dtype that torch does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attend",
    "attention",
    "contrastive_loss",
    "dropout_mask",
    "int8_input_gradient",
    "int8_lora_linear",
    "lora_linear",
    "quantize_rows",
    "quantized_linear",
    "quick_gelu",
    "sigmoid_loss",
]


def contrastive_targets(n: int, labels: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """[n, n] target probabilities: uniform over the pairs of equal label, smoothed as (1 - e) q + e / n. In float64,
    but for labels on Apple's GPU, which has none.
    """
    exact = torch.float32 if labels is not None and labels.device.type == "mps" else torch.float64
    equal = torch.eye(n, dtype=exact) if labels is None else (labels[:, None] == labels[None, :]).to(exact)
    return (1.0 - label_smoothing) * equal / equal.sum(dim=1, keepdim=True) + label_smoothing / n


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric cross-entropy over cosine logits (CLIP, arXiv:2103.00020, figure 3); the dtype is the embeddings'."""
    logits = logit_scale * image_embeds @ text_embeds.t()
    targets = contrastive_targets(len(logits), labels, label_smoothing).to(logits)
    return (_cross_entropy(logits, targets) + _cross_entropy(logits.t(), targets)) / 2


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's, of probabilities, which ONNX does not have."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, algorithm 1): the sum over all pairs divided by N."""
    logits = logit_scale * image_embeds @ text_embeds.t() + logit_bias
    n = len(logits)
    positive = torch.eye(n, device=logits.device) if labels is None else labels[:, None] == labels[None, :]
    signs = 2.0 * positive.to(logits) - 1.0
    return -F.logsigmoid(signs * logits).sum() / n


def lora_linear(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """LoRA (arXiv:2106.09685) as peft computes it; ``mask``, of the input's shape, says what dropout keeps."""
    kept = input if mask is None else torch.where(mask.bool(), input / (1.0 - dropout), torch.zeros_like(input))
    return F.linear(input, weight, bias) + scaling * F.linear(F.linear(kept, lora_a), lora_b)


def attention(qkv: Tensor, heads: int, scale: float, causal: bool = False, queries: int | None = None) -> Tensor:
    """[batch, length, 3 * heads * dim] -> [batch, queries, heads * dim], with the matrix of weights of every head."""
    query, key, value = qkv.chunk(3, dim=2)
    return attend(query[:, :queries], key, value, heads, scale, causal)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, causal: bool = False) -> Tensor:
    """[batch, queries, heads * dim], and [batch, length, heads * dim] twice -> the shape of ``query``, likewise."""
    q, k, v = (x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2) for x in (query, key, value))
    logits = scale * q @ k.mT
    if causal:
        later = torch.ones(logits.shape[2:], dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    return (logits.softmax(dim=3) @ v).transpose(1, 2).reshape(query.shape)


def quick_gelu(input: Tensor) -> Tensor:  # noqa: A002
    """CLIP's activation."""
    return input * torch.sigmoid(1.702 * input)


def quantize_rows(input: Tensor, bits: int = 7) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
    """[rows, in] as levels 0 .. 2^bits - 1, int64, with a float32 scale [rows] and an int64 zero point [rows]: the
    row's least and greatest value, and 0, are levels. Rows that are not finite get scale NaN. Step by step in float32,
    as the kernels do it, so that levels agree bit for bit.
    """
    x = input.float()
    top = 2.0**bits - 1.0
    low, high = x.amin(dim=1).clamp_max(0.0), x.amax(dim=1).clamp_min(0.0)
    scale = (high / top - low / top).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = 1.0 / scale
    zero = -(low * inverse).round()
    levels = ((x * inverse[:, None]).round() + zero[:, None]).clamp(0.0, top)
    bad = ~torch.isfinite(x).all(dim=1)
    levels[bad], zero[bad], scale[bad] = 0.0, 0.0, float("nan")
    return levels.long(), scale, zero.long()


def quantized_linear(
    input: Tensor,  # noqa: A002
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    bits: int = 7,
) -> Tensor:
    """Exact integer sums, and float64 from there on; [rows, in] -> [rows, out] float64."""
    levels, scale, zero = quantize_rows(input, bits)
    sums = (levels - zero[:, None]).double() @ weight_int8.double().t()  # exact below 2^53
    out = sums * weight_scale.double() * scale.double()[:, None]
    out = out if bias is None else out + bias.double()
    if activation == "quick_gelu":
        return quick_gelu(out)
    if activation == "gelu_tanh":
        return F.gelu(out, approximate="tanh")
    return F.gelu(out) if activation == "gelu" else out


def int8_input_gradient(grad: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    """The gradient [rows, in] float32 of an int8 layer's input by that of its result, [rows, out]: ``(grad * scale)
    weight_int8``, the rows of the bracket brought to 7 bits as those of an input are (SwitchBack, arXiv:2304.13013, has
    8 bits and a scale for the whole weight). Step by step in float32, as the kernels do it: they agree bit for bit.
    """
    levels, scale, zero = quantize_rows(grad.float() * weight_scale)
    sums = (levels - zero[:, None]).double() @ weight_int8.double()  # exact below 2^53
    return sums.float() * scale[:, None]


class _Int8Product(torch.autograd.Function):
    """[rows, in] -> [rows, out] float64, with the gradient above in place of that of rounding, which is zero."""

    @staticmethod
    def forward(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:  # type: ignore[override]
        return quantized_linear(x, weight_int8, weight_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, *weight = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return int8_input_gradient(grad, *ctx.saved_tensors).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("clipft.int8_lora_linear: the input has no derivative in forward mode, only backward")


def int8_lora_linear(
    input: Tensor,  # noqa: A002
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    *,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`lora_linear` on int8 weights, [..., in] -> [..., out] float64: the base of the input rounded, the branch
    of the input as it is; without ``lora_a`` and ``lora_b`` no branch. The input's gradient is
    :func:`int8_input_gradient` and the branch's.
    """
    x = input.reshape(-1, input.shape[-1])
    out = _Int8Product.apply(x, weight_int8, weight_scale)
    if bias is not None:
        out = out + bias.double()
    if lora_a is not None and lora_b is not None:
        wide = x.double()
        if mask is not None:
            wide = torch.where(mask.reshape(x.shape).bool(), wide / (1.0 - dropout), torch.zeros_like(wide))
        out = out + scaling * F.linear(F.linear(wide, lora_a.double()), lora_b.double())
    return out.view(*input.shape[:-1], len(weight_int8))


_WORD = 0xFFFFFFFF


def _signed(value: int) -> int:
    """A 64-bit constant as int64 holds it."""
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """int64 shifted right as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, which wraps."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def dropout_mask(seed: int, rows: int, cols: int, dropout: float) -> Tensor:
    """[rows, cols] bool: what ``clipft.lora_linear`` keeps. A 64-bit key of the seed and the row, then a 32-bit hash of
    the key and the column, compared with ``dropout`` as a share of 2^32.
    """
    key = _mix(_mix(torch.tensor(seed)) + torch.arange(rows) * _signed(0x9E3779B97F4A7C15))[:, None]
    h = (torch.arange(cols) * 0x9E3779B9 + (key & _WORD)) & _WORD
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _WORD
    h = (((h ^ (h >> 15)) + _shift(key, 32)) * 0xD35A2D97) & _WORD
    h = h ^ (h >> 15)
    return ((h + 2**31) & _WORD) >= min(int(dropout * 2**32 + 0.5), _WORD)
