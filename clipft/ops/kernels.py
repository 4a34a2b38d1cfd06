"""What all ops share: whether the kernels run on a device and what is done where they do not, autocast there, errors of
torch's C ABI, and checks of a tensor's kind."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import clipft._C

__all__ = [
    "FLOATS",
    "MAX_DIM",
    "PLAIN",
    "autocasts",
    "call",
    "check_float",
    "dtype_name",
    "has_kernel",
    "no_second_derivative",
    "problem",
    "shape_of",
    "without_autocast",
]

_WARNED: set[tuple[str, str]] = set()


def problem(device: torch.device) -> str | None:
    """Why the kernels do not run on the device; None where they do. Those of a GPU are compiled and loaded by then."""
    if device.type in ("cpu", "meta"):
        return None
    return _cuda_problem(device.index or 0) if device.type == "cuda" else f"there are none for {device.type} tensors"


@torch.compiler.assume_constant_result
def _cuda_problem(index: int) -> str | None:
    return clipft._C.cuda_problem(index)


def has_kernel(op: str, tensor: Tensor, instead: str, needed: str | None = None) -> bool:
    """Whether the kernels run on the tensor's device. Where they do not: ``instead`` happens, said once with the cause,
    or an error, in an environment with ``CLIPFT_STRICT=1`` or where something (``needed``) cannot do without.
    """
    reason = problem(tensor.device)
    if reason is None:
        return True
    message = f"clipft.{op}: the kernels do not run here: {reason}"
    if needed is not None or os.environ.get("CLIPFT_STRICT") == "1":
        raise NotImplementedError(message + (f"; {needed} needs them" if needed is not None else ""))
    if (op, tensor.device.type) not in _WARNED:
        _WARNED.add((op, tensor.device.type))
        warnings.warn(f"{message}. {instead}", stacklevel=3)
    return False


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; devices that have none (meta) are never asked."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """For plain torch in a kernel's place: its products stay in the dtype in which the kernel would compute them."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def call(op: Any, *args: Any) -> Any:
    """Torch's C ABI tells of every error in the same way; what was an OutOfMemoryError becomes one again."""
    try:
        return op(*args)
    except RuntimeError as error:
        if "CUDA out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(str(error)) from None


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 8  # CLIPFT_MAX_DIM in csrc/tensor.h
PLAIN = "Plain torch computes it"


# ---- checks: the messages equal those of csrc/ops/lora_inputs.c ----


def dtype_name(tensor: Tensor) -> str:
    """As error messages have it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> list[int]:
    """As error messages have it: [2, 3]."""
    return list(tensor.shape)


def check_float(op: str, name: str, tensor: Any) -> None:
    """That an argument is a tensor of a dtype that the kernels have."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"clipft.{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"clipft.{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(tensor)}")


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The gradient of a backward op."""
    raise RuntimeError("clipft's ops have no second derivative: do not call their backward with create_graph=True")
