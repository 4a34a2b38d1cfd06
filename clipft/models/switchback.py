"""Linear layers that train in int8: the products of the forward pass and of the input's gradient, not the weight's.

As SwitchBack (Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
arXiv:2304.13013) does it on GPUs: the weight is a float32 parameter as ever, its codes are made anew when it has
changed; its gradient is a sum over the rows of a batch, thousands of them, whose rounding would be noise in every
step, and stays float32. What int8 is here, and rounded how, is said in :mod:`clipft.ops.int8_lora`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipft.models.frozen import naming_layer, tower_linears
from clipft.ops.int8 import quantize_and_pack
from clipft.ops.kernels import bias_or_empty, call, check_tensors, dtype_name, in_order

__all__ = ["SwitchBackLinear", "to_float_linears", "to_switchback", "trained_linears"]

_OP = "SwitchBackLinear"
_steps = 0  # of all optimisers of this process


def _count_step(*_: Any) -> None:
    """Fused optimisers write to weights without torch's version of them counting it."""
    global _steps  # noqa: PLW0603
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Codes(NamedTuple):
    """A weight in int8."""

    packed: Tensor
    packed_t: Tensor  # of the transpose
    scale: Tensor  # [out] float32
    made_of: Tensor  # the weight, kept lest other numbers come to lie at its address
    version: tuple[int, int, int]


class SwitchBackLinear(nn.Linear):
    """An ``nn.Linear`` whose forward product and input's gradient are int8 while it trains. Made by
    :func:`to_switchback`, from a float32 layer on a CPU.

    In training mode (``module.training``) ``y = x̂ Ŵᵀ + b`` with the rows of ``x`` at 7 bits and the channels of the
    weight at 8, ``dx = (dy · scale) codes`` likewise, and in float32 ``dW = dyᵀ x`` of the true input and ``db`` the
    sum of ``dy``. In evaluation mode, which a Trainer's evaluation and clipft's scoring set, it is ``F.linear``: scores
    are those of the float model, which is what is saved.

    The codes are made once for each state of the weight: they are kept until torch has counted a change of it, an
    optimiser has made a step or the mode changes to evaluation. So accumulated batches, recomputed layers and the
    passes of a gradient cache have the same. A change that nobody counts, of ``weight.data`` between two steps, is
    not seen before the next of these. With ``torch.compile`` the layer stands between two graphs.

    Attributes:
        layer_name: its name in the model, for messages.
    """

    layer_name: str = "weight"
    _codes: _Codes | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the parameter's name in torch)
        """[..., in] -> [..., out], float32.

        Raises:
            TypeError: an input or a weight that is not float32 (nor are they under autocast).
            ValueError: NaN or Inf in the weight.
            NotImplementedError: not on a CPU.
        """
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        return self._in_int8(input)

    @torch.compiler.disable
    def _in_int8(self, x: Tensor) -> Tensor:
        _check(x, self.weight)
        codes = self._codes_now()
        bias = bias_or_empty(_OP, self.bias, self.weight, x)
        output: Tensor = _SwitchBack.apply(in_order(x), self.weight, bias, *codes[:3])
        return output

    def _codes_now(self) -> _Codes:
        weight = self.weight
        version = weight.data_ptr(), weight._version, _steps
        if self._codes is None or self._codes.version != version:
            with naming_layer(self.layer_name):
                made = quantize_and_pack(weight)
            self._codes = _Codes(*made, weight.detach(), version)
        return self._codes

    def train(self, mode: bool = True) -> SwitchBackLinear:
        """As ever; evaluation needs no codes."""
        if not mode:
            self._codes = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_codes"}


def _check(x: Tensor, weight: Tensor) -> None:
    check_tensors(_OP, input=x, weight=weight)
    if x.device.type != "cpu":
        raise NotImplementedError(f"clipft.{_OP}: precision int8 is for a model on the CPU, got one on {x.device}")
    for name, tensor in (("input", x), ("weight", weight)):
        if tensor.dtype != torch.float32:
            raise TypeError(
                f"clipft.{_OP}: {name} must be float32, got {dtype_name(tensor)}; precision int8 is for float32 models "
                "without autocast"
            )


class _SwitchBack(torch.autograd.Function):
    """[..., in], [out, in], [out] or [0], codes -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *codes: Tensor) -> Tensor:  # type: ignore[override]
        packed, packed_t, scale = codes
        none, seed = x.new_empty(0), torch.empty((), dtype=torch.int64)
        ctx.features = x.shape[-1]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, packed_t, scale)
        op = torch.ops.clipft.int8_lora_linear
        output: Tensor = call(op, x, packed, packed_t, scale, bias, none, none, seed, 1.0, name=_OP)[0]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, packed_t, scale = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad = in_order(grad)
        d_x, d_bias = _input_and_bias(grad, packed_t, scale, ctx.features, needs_input, needs_bias)
        d_weight = None
        if needs_weight:
            d_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return d_x if needs_input else None, d_weight, d_bias if needs_bias else None, None, None, None


def _input_and_bias(
    grad: Tensor, packed_t: Tensor, scale: Tensor, features: int, needs_input: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients by [..., out] of the result: [..., in] and [out], each empty where not needed."""
    none, seed = grad.new_empty(0), torch.empty((), dtype=torch.int64)
    op = torch.ops.clipft.int8_lora_linear_backward
    branch, numbers = (none, none, seed, none), (features, 1.0, 0.0, False)
    d_x, d_bias, _, _ = call(
        op, grad, none, packed_t, scale, *branch, *numbers, needs_input, needs_bias, False, False, name=_OP
    )
    return d_x, d_bias


# ---- there and back ----


def trained_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of both towers' layers whose weights train, by name; none beneath an adapter."""
    return {
        name: linear
        for name, linear in tower_linears(model).items()
        if type(linear) is nn.Linear and linear.weight.requires_grad
    }


def to_switchback(model: Any, names: Iterable[str] | None = None) -> None:
    """Let these layers, or all of :func:`trained_linears`, be :class:`SwitchBackLinear`, in place. Parameters and
    their names stay."""
    linears = trained_linears(model)
    for name in linears if names is None else names:
        linear: Any = linears[name]
        linear.__class__ = SwitchBackLinear
        linear.layer_name = name


def to_float_linears(model: nn.Module) -> None:
    """Undo :func:`to_switchback`."""
    for module in model.modules():
        if isinstance(module, SwitchBackLinear):
            for name in ("_codes", "layer_name"):
                module.__dict__.pop(name, None)
            module.__class__ = nn.Linear  # type: ignore[assignment]
