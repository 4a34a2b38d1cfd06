"""What all ops share: whether the kernels run on a device and what is done where they do not, autocast there, errors
of C as Python's, and the checks that C cannot make."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd.forward_ad import unpack_dual

import clipft._C

__all__ = [
    "FLOATS",
    "MAX_DIM",
    "PLAIN",
    "autocasts",
    "bias_or_empty",
    "call",
    "check_floats",
    "check_fraction",
    "check_number",
    "check_tensors",
    "dtype_name",
    "exports_to_onnx",
    "has_kernel",
    "in_order",
    "like_if",
    "no_second_derivative",
    "problem",
    "refuse_derivatives",
    "refuse_second_derivative",
    "shape_of",
    "wants_plain",
    "without_autocast",
]

_WARNED: set[tuple[str, str]] = set()


def problem(device: torch.device, *code: str) -> str | None:
    """Why the kernels do not run on the device; None where they do. Those of a GPU, of ``cuda/<code>.cu`` or of all
    files, are compiled and loaded by then.
    """
    if device.type in ("cpu", "meta"):
        return None
    if device.type == "cuda":
        return _cuda_problem(device.index or 0, *code)
    return f"there are none for {device.type} tensors"


@torch.compiler.assume_constant_result
def _cuda_problem(index: int, *code: str) -> str | None:
    return clipft._C.cuda_problem(index, *code)


def has_kernel(op: str, tensor: Tensor, instead: str, *code: str, needed: str | None = None) -> bool:
    """Whether the kernels run on the tensor's device. Where they do not: ``instead`` happens, said once with the cause
    (of a kind of device that has none, once for all ops), or an error, in an environment with ``CLIPFT_STRICT=1`` or
    where something (``needed``) cannot do without. ``code``: as :func:`problem` has it; an op without one has none for
    any GPU.
    """
    on_gpu = not code and tensor.device.type == "cuda"
    reason = "there is none for cuda tensors" if on_gpu else problem(tensor.device, *code)
    if reason is None:
        return True
    message = f"clipft.{op}: the kernels do not run here: {reason}"
    if needed is not None or os.environ.get("CLIPFT_STRICT") == "1":
        raise NotImplementedError(message + (f"; {needed} needs them" if needed is not None else ""))
    if tensor.device.type not in ("cpu", "meta", "cuda"):
        op, message, instead = (
            "",
            f"clipft: the kernels do not run here: {reason}",
            "Plain torch computes in their place",
        )
    if (op, tensor.device.type) not in _WARNED:
        _WARNED.add((op, tensor.device.type))
        warnings.warn(f"{message}. {instead}", stacklevel=3)
    return False


def wants_plain(*tensors: Tensor) -> bool:
    """Whether plain torch must compute what the ops could: ONNX has no such operators, and derivatives besides backward
    are plain torch's alone."""
    return exports_to_onnx() or _differentiates(*tensors)


@torch.compiler.assume_constant_result
def exports_to_onnx() -> bool:
    """Within ``torch.onnx.export``, which calls the model and, where that fails, traces it by dynamo; dynamo itself
    would take no for the answer."""
    return torch.onnx.is_in_onnx_export()


def _differentiates(*tensors: Tensor) -> bool:
    """In forward mode, or within ``torch.func.grad``, ``vjp``, ``jvp`` and what is made of them. (Dispatched as an op
    of ours, a dual tensor would lose its tangent without a word.)"""
    if torch.compiler.is_compiling():
        return False
    transforms = {transform.key() for transform in get_interpreter_stack() or ()}
    if transforms & {TransformType.Grad, TransformType.Jvp}:
        return True
    return any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse_derivatives(op: str, *tensors: Tensor) -> None:
    """That none is taken in forward mode or by ``torch.func``, of an op that has none at all."""
    if _differentiates(*tensors):
        raise NotImplementedError(f"clipft.{op}: int8 layers are for inference and have no derivative")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; devices that have none (meta) are never asked."""
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    """Dynamo of torch < 2.12 cannot trace the question."""
    return torch.amp.is_autocast_available(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For plain torch in a kernel's place: its products stay in the dtype in which the kernel would compute them."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


_ERRORS = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    "NotImplementedError": NotImplementedError,
    "OutOfMemoryError": torch.OutOfMemoryError,
}


def call(op: Any, *args: Any, name: str | None = None) -> Any:
    """Through torch's C ABI every error is a RuntimeError, whose text begins with what it is (csrc/error.h): that is
    raised. ``name`` is what users know the op by, where that is not its own.
    """
    try:
        return op(*args)
    except RuntimeError as error:
        kind, _, text = str(error).partition(": ")
        if kind not in _ERRORS or not text.startswith("clipft."):
            raise
        if name is not None:
            text = f"clipft.{name}: {text.partition(': ')[2]}"
        raise _ERRORS[kind](text) from None


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 8  # CLIPFT_MAX_DIM in csrc/tensor.h
PLAIN = "Plain torch computes it"


# ---- checks that C cannot make ----
#
# Those of dtypes, shapes and numbers are C's, in csrc/ops. It never sees what is no tensor; with a meta tensor among
# others torch runs the fake kernels; and where there are no kernels, plain torch computes whatever it can.


def dtype_name(tensor: Tensor) -> str:
    """As error messages have it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> list[int]:
    """As error messages have it: [2, 3]."""
    return list(tensor.shape)


def check_tensors(op: str, **tensors: Any) -> None:
    """That arguments are tensors, on the device of the first."""
    device = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"clipft.{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"clipft.{op}: {name} must be on the device of the other tensors, {device}, got {tensor.device}"
            )


def check_floats(op: str, **tensors: Tensor) -> None:
    """That plain torch, in a kernel's place, gets dtypes that kernels take."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"clipft.{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(tensor)}")


def check_number(op: str, name: str, value: Any) -> None:
    """That an argument is a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"clipft.{op}: {name} must be a float, got {type(value).__name__}")


def check_fraction(op: str, name: str, value: Any) -> None:
    """That an argument is a float in [0, 1), also where nothing is done with it."""
    check_number(op, name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"clipft.{op}: {name} must be in [0, 1), got {value:g}")


def bias_or_empty(op: str, bias: Tensor | None, weight: Tensor, x: Tensor) -> Tensor:
    """A layer's bias as the ops take it: empty for none. So a bias that is empty itself is refused here. ``weight``,
    or its scales: [out, ...].
    """
    if bias is None:
        return x.new_empty(0)
    check_tensors(op, input=x, bias=bias)
    if bias.numel() == 0:
        raise ValueError(f"clipft.{op}: bias must be [out], {shape_of(weight)[:1]}, got shape {shape_of(bias)}")
    return bias


def like_if(needed: bool, tensor: Tensor) -> Tensor:
    """A gradient as the fakes of backward ops have it: of that tensor, empty where nobody asks for it."""
    return tensor.new_empty(tensor.shape if needed else (0,))


def in_order(x: Tensor) -> Tensor:
    """With rows that the ops can walk through."""
    return x.contiguous() if x.dim() > 2 else x


def refuse_second_derivative() -> None:
    """In a backward pass of plain torch, which would leave out what its own inputs are made of."""
    if torch.is_grad_enabled():
        no_second_derivative(None)


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The gradient of a backward op."""
    raise RuntimeError("clipft's ops have no second derivative: do not call their backward with create_graph=True")
