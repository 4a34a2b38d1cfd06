"""CLIP's activation as a function over ``torch.ops.clipft.quick_gelu``."""

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
    no_second_derivative,
    wants_plain,
)

__all__ = ["quick_gelu"]


def quick_gelu(input: Tensor) -> Tensor:  # noqa: A002
    """CLIP's activation ``x · sigmoid(1.702 x)``, one pass forward and one backward, which keeps ``input`` only.

    Args:
        input: float32, bfloat16 or float16, 1 to 8 dimensions.

    Returns:
        The same shape and dtype; 16-bit floats are computed in float32 and rounded once.

    Raises:
        TypeError: another dtype. ValueError: no dimensions, or more than 8.
    """
    check_tensors("quick_gelu", input=input)
    if wants_plain(input) or not has_kernel("quick_gelu", input, PLAIN, "lora"):
        check_floats("quick_gelu", input=input)
        return reference.quick_gelu(input.float()).to(input.dtype)
    return call(torch.ops.clipft.quick_gelu, input.contiguous())


@torch.library.register_fake("clipft::quick_gelu")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("clipft::quick_gelu_backward")
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return call(torch.ops.clipft.quick_gelu_backward, grad.contiguous(), *ctx.saved_tensors)


torch.library.register_autograd("clipft::quick_gelu", _gelu_gradient, setup_context=_gelu_context)
torch.library.register_autograd("clipft::quick_gelu_backward", no_second_derivative)
