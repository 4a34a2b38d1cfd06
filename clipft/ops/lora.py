"""The LoRA linear layer as a function over ``torch.ops.clipft.lora_linear``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipft.ops import reference
from clipft.ops.kernels import (
    FLOATS,
    PLAIN,
    autocasts,
    bias_or_empty,
    call,
    check_floats,
    check_fraction,
    check_number,
    check_tensors,
    has_kernel,
    in_order,
    like_if,
    no_second_derivative,
    wants_plain,
    without_autocast,
)

__all__ = ["dropout_mask", "lora_linear", "quick_gelu_lora_linear"]

_RANK_PAD = 16  # CLIPFT_RANK_PAD in csrc/kernels/lora/lora_kernels.h


# ---- public functions ----


def lora_linear(
    input: Tensor,  # noqa: A002  (torch.nn.functional.linear's name)
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A linear layer with a LoRA branch (arXiv:2106.09685): ``x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ``, as peft's
    ``lora.Linear`` computes it.

    Args:
        input: [..., in] float32, bfloat16 or float16, at most 8 dimensions.
        weight: [out, in], the dtype of ``input``.
        bias: [out], the dtype of ``input``, or None.
        lora_a: [r, in], float32 or the dtype of ``input``.
        lora_b: [out, r], float32 or the dtype of ``input``.
        scaling: factor of the branch, ``alpha / r`` or what peft's adapter says.
        dropout: probability in [0, 1) with which an element of the branch's input is zeroed, the others being divided
            by ``1 - dropout``.
        training: whether dropout happens. The mask comes from a seed drawn from torch's generator of the input's
            device; it is made again in the backward pass, and is the same when a checkpoint recomputes the layer.

    Returns:
        [..., out] in the dtype of ``input``. The branch is computed in float32 and added there to the rest, which in 16
        bits was rounded before; all five tensors get gradients in their own dtype, where they need one. The result does
        not depend on the number of threads beyond what the BLAS's own products do. Under autocast ``input``, ``weight``
        and ``bias`` are cast to its dtype; ``lora_a`` and ``lora_b`` stay as they are.

    Raises:
        TypeError: a dtype that is not supported, or that does not fit the input's.
        ValueError: a shape, device or ``dropout`` that does not fit.
        NotImplementedError: with ``CLIPFT_STRICT=1`` on a device that the kernels do not run on. Otherwise plain torch
            computes it there, with a warning that tells the cause.
        torch.OutOfMemoryError: as torch raises it.
    """
    return _lora_linear(input, weight, bias, lora_a, lora_b, scaling, dropout if training else 0.0, dropout, False)


def quick_gelu_lora_linear(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``lora_linear(quick_gelu(input), ...)`` in one: the activation takes no pass of its own, and the backward pass
    keeps ``input`` only. Arguments, result and errors are those of :func:`lora_linear`.
    """
    return _lora_linear(input, weight, bias, lora_a, lora_b, scaling, dropout if training else 0.0, dropout, True)


def dropout_mask(seed: int | Tensor, rows: int, cols: int, dropout: float) -> Tensor:
    """[rows, cols] float32: 1 where ``lora_linear`` with this seed keeps an element of its input, as [rows, cols], else
    0.
    """
    check_number("dropout_mask", "dropout", dropout)
    seed = torch.as_tensor(seed, dtype=torch.int64)
    return call(torch.ops.clipft.dropout_mask, seed, rows, cols, float(dropout))


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    active_dropout: float,
    dropout: float,
    activation: bool,
) -> Tensor:
    name = "lora_linear"
    check_tensors(name, input=x, weight=weight, lora_a=lora_a, lora_b=lora_b)
    if autocasts(x.device):
        x, weight, bias = _autocast(x, weight, bias)
    some_bias = bias_or_empty(name, bias, weight, x)
    check_number(name, "scaling", scaling)
    check_fraction(name, "dropout", dropout)
    if wants_plain(x, weight, some_bias, lora_a, lora_b) or not has_kernel(name, x, PLAIN, "lora"):
        return _plain(x, weight, bias, lora_a, lora_b, scaling, active_dropout, activation)
    x = in_order(x)
    seed = draw_seed(x) if active_dropout else torch.empty((), dtype=torch.int64, device=x.device)
    scaling, active_dropout = float(scaling), float(active_dropout)
    op = torch.ops.clipft.lora_linear
    return call(op, x, weight, some_bias, lora_a, lora_b, seed, scaling, active_dropout, activation)[0]


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout: float,
    activation: bool,
) -> Tensor:
    """The layer where there is no kernel, whose mask comes from torch's own dropout."""
    check_floats("lora_linear", input=x, lora_a=lora_a, lora_b=lora_b)
    wide = reference.quick_gelu(x.float()) if activation else x.float()
    with without_autocast(x.device):
        base = F.linear(wide.to(x.dtype), weight, bias)
        branch = F.linear(F.linear(F.dropout(wide, dropout), lora_a.float()), lora_b.float())
    return (base.float() + scaling * branch).to(x.dtype)


def draw_seed(like: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=like.device)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast does for ``torch.nn.functional.linear``; the branch's own weights keep their precision."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Any) -> Any:
        return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in FLOATS else tensor

    return cast(x), cast(weight), cast(bias)


# ---- fake kernels ----


def padded(rank: int) -> int:
    return (rank + _RANK_PAD - 1) // _RANK_PAD * _RANK_PAD


@torch.library.register_fake("clipft::lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor,
    scaling: float,
    dropout: float = 0.0,
    quick_gelu: bool = False,
) -> Any:
    rows = math.prod(x.shape[:-1])
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        x.new_empty((rows, padded(lora_a.shape[0])), dtype=torch.float32),
    )


@torch.library.register_fake("clipft::lora_linear_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor,
    rank: Tensor,
    scaling: float,
    dropout: float,
    quick_gelu: bool,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    needs_a: bool,
    needs_b: bool,
) -> Any:
    return (
        like_if(needs_input, x),
        like_if(needs_weight, weight),
        x.new_empty((weight.shape[0] if needs_bias else 0,)),
        like_if(needs_a, lora_a),
        like_if(needs_b, lora_b),
    )


@torch.library.register_fake("clipft::dropout_mask")
def _(seed: Tensor, rows: int, cols: int, dropout: float) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.float32)


# ---- autograd ----


def _lora_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, lora_a, lora_b, seed, ctx.scaling, ctx.dropout, ctx.quick_gelu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, lora_a, lora_b, seed, output[1])


def _lora_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:5]
    op = torch.ops.clipft.lora_linear_backward
    grads = call(op, in_order(grad), *ctx.saved_tensors, ctx.scaling, ctx.dropout, ctx.quick_gelu, *needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


torch.library.register_autograd("clipft::lora_linear", _lora_gradients, setup_context=_lora_context)
torch.library.register_autograd("clipft::lora_linear_backward", no_second_derivative)
