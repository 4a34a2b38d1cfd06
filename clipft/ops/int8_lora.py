"""The linear layer with frozen int8 weights and a LoRA branch, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipft.ops import int8, reference
from clipft.ops.kernels import (
    FLOATS,
    autocasts,
    bias_or_empty,
    call,
    check_floats,
    check_fraction,
    check_number,
    check_tensors,
    exports_to_onnx,
    in_order,
    like_if,
    no_second_derivative,
    wants_plain,
    without_autocast,
)
from clipft.ops.lora import draw_seed, padded
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
        other rows do not notice. What float16 does not hold is infinite, as the float layer's. Sums are exact
        integers, the same on every CPU. Under autocast ``input`` and ``bias`` are cast to its dtype; ``lora_a`` and
        ``lora_b`` stay as they are.

    Raises:
        TypeError: a dtype that is not supported, or that does not fit the input's.
        ValueError: a shape, device or ``dropout`` that does not fit.
        NotImplementedError: within ``torch.onnx.export``; a derivative by ``input`` in forward mode; or with
            ``CLIPFT_STRICT=1`` on a device that is no CPU. There, without it, plain torch computes the same, and says
            so.
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
    if wants_plain(x, *branch, *([] if bias is None else [bias])) or not int8.runs(_OP, x):
        return _plain(x, weight, bias, branch, scaling, active_dropout, activation)
    x, none = in_order(x), x.new_empty(0)
    some_bias = bias_or_empty(_OP, bias, weight.weight_scale, x)
    if not branch:
        active_dropout = 0.0
    seed = draw_seed(x) if active_dropout else torch.empty((), dtype=torch.int64, device=x.device)
    packings = weight._packed, weight._packed_t, weight.weight_scale
    rest = *(branch or (none, none)), seed, float(scaling), float(active_dropout), activation
    output: Tensor = call(torch.ops.clipft.int8_lora_linear, x, *packings, some_bias, *rest)[0]
    return output


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
    return x, bias, tuple(named.values())


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
        wide = reference.quick_gelu(x.float()) if activation else x
        codes = weight._plain_weight(), weight.weight_scale
        lora_a, lora_b = branch or (None, None)
        out = reference.int8_lora_linear(wide, *codes, bias, lora_a, lora_b, scaling, dropout=dropout, mask=mask)
        return out.to(x.dtype)


# ---- fake kernels ----


@torch.library.register_fake("clipft::int8_lora_linear")
def _(
    x: Tensor,
    packed: Tensor,
    packed_t: Tensor,
    scale: Tensor,
    bias: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor,
    scaling: float,
    dropout: float = 0.0,
    quick_gelu: bool = False,
) -> Any:
    rank = (math.prod(x.shape[:-1]), padded(lora_a.shape[0])) if lora_a.dim() == 2 else (0,)
    return x.new_empty((*x.shape[:-1], scale.shape[0])), x.new_empty(rank, dtype=torch.float32)


@torch.library.register_fake("clipft::int8_lora_linear_backward")
def _(
    grad: Tensor,
    x: Tensor,
    packed_t: Tensor,
    scale: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor,
    rank: Tensor,
    features: int,
    scaling: float,
    dropout: float,
    quick_gelu: bool,
    needs_input: bool,
    needs_bias: bool,
    needs_a: bool,
    needs_b: bool,
) -> Any:
    return (
        grad.new_empty((*grad.shape[:-1], features) if needs_input else (0,)),
        grad.new_empty((scale.shape[0] if needs_bias else 0,), dtype=torch.float32),
        like_if(needs_a, lora_a),
        like_if(needs_b, lora_b),
    )


# ---- autograd ----


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, packed_t, scale, bias, lora_a, lora_b, seed, ctx.scaling, ctx.dropout, ctx.quick_gelu = inputs
    ctx.features, ctx.bias_dtype = x.shape[-1], bias.dtype
    ctx.mark_non_differentiable(output[1])
    kept = x if lora_a.dim() == 2 or ctx.quick_gelu else None  # else the gradient does not depend on it
    ctx.save_for_backward(kept, packed_t, scale, lora_a, lora_b, seed, output[1])


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    needs = tuple(ctx.needs_input_grad[k] for k in (0, 4, 5, 6))
    x, *rest = ctx.saved_tensors
    numbers = ctx.features, ctx.scaling, ctx.dropout, ctx.quick_gelu
    op = torch.ops.clipft.int8_lora_linear_backward
    grads = call(op, in_order(grad), grad.new_empty(0) if x is None else x, *rest, *numbers, *needs)
    d_x, d_bias, d_a, d_b = (g if need else None for g, need in zip(grads, needs, strict=True))
    d_bias = None if d_bias is None else d_bias.to(ctx.bias_dtype)
    return d_x, None, None, None, d_bias, d_a, d_b, None, None, None, None


torch.library.register_autograd("clipft::int8_lora_linear", _gradients, setup_context=_context)
torch.library.register_autograd("clipft::int8_lora_linear_backward", no_second_derivative)
