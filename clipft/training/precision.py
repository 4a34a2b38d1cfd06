"""float32 masters of what trains; what mixed precision and int8 gain on this machine, measured: bfloat16 without
instructions for it is slower than float32; and cuDNN's choice of kernels.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from clipft.models.switchback import SwitchBackLinear

__all__ = [
    "bf16_speedup",
    "cudnn_benchmark",
    "fastest_precision",
    "hold_masters",
    "int8_speedup",
    "warn_of_slow_bf16",
    "warn_of_slow_int8",
    "weights_kept",
    "wide_copy",
]

_logger = logging.getLogger(__name__)
_ROWS, _IN, _OUT = 512, 768, 768  # of a linear layer as in ViT-B, forward and backward
_RUNS = 3
_WORTH = 1.2  # less is not worth the rounding


def hold_masters(model: nn.Module) -> None:
    """Let what trains be float32, whatever the file says: most steps are below half an ulp of a 16-bit weight, and
    would move nothing. A model of which a part trains becomes float32 whole, so that all its layers fit each other;
    where only an adapter in float32 trains, its base stays as it is.
    """
    floats = [p for p in model.parameters() if p.is_floating_point()]
    low = {p.dtype for p in floats if p.requires_grad and p.dtype.itemsize < torch.float32.itemsize}
    apart = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    if not low and len(apart) < 2:
        return
    found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in apart | low))
    _logger.warning("model: weights in %s; they train, and are saved, in float32", found)
    model.float()


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the model is cast to within, its weights are what they were afterwards, of the same type."""
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, own in weights:
            parameter.data = own
        for module, buffers_of in buffers:
            module._buffers.update(buffers_of)


def wide_copy(weights: Tensor) -> Tensor:
    """A copy of no less than float32, apart from the graph."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)


def fastest_precision(device: str) -> str:
    """``"bf16"`` where it gains at least a fifth over float32 on this type of device, else ``"fp32"``."""
    return "bf16" if bf16_speedup(device) >= _WORTH else "fp32"


@cache
def bf16_speedup(device: str) -> float:
    """Time of a linear layer's forward and backward pass in float32 over that under bfloat16 autocast: the median of
    three ratios."""
    linear = nn.Linear(_IN, _OUT, device=device)
    return statistics.median(_step(linear) / _step(linear, autocast=True) for _ in range(_RUNS))


@cache
def int8_speedup() -> float:
    """Time of a linear layer that trains, forward and backward pass in float32, over that of one in int8, on this CPU:
    the median of three ratios."""
    plain, int8 = nn.Linear(_IN, _OUT), SwitchBackLinear(_IN, _OUT)
    return statistics.median(_step(plain) / _step(int8) for _ in range(_RUNS))


def warn_of_slow_bf16(device: str) -> None:
    """Where a CPU is slower in bfloat16."""
    if device == "cpu" and (gain := bf16_speedup(device)) < 1.0:
        _logger.warning(
            "bf16: this CPU takes %.1f times as long in bfloat16 as in float32 (a linear layer, measured now); "
            "float32 is faster here",
            1.0 / gain,
        )


def warn_of_slow_int8() -> None:
    """Where this CPU gains little by int8 in layers that train."""
    if (gain := int8_speedup()) < _WORTH:
        _logger.warning(
            "precision: int8 takes %.2f of float32's time on this CPU (a linear layer, measured now): a run "
            "is not much faster here, if at all",
            1.0 / gain,
        )


def _step(layer: nn.Linear, *, autocast: bool = False) -> float:
    device = layer.weight.device.type
    x = torch.ones(_ROWS, _IN, device=device, requires_grad=True)
    seconds = []
    for _ in range(2):  # the first of each finds its kernels
        layer.eval().train()  # no codes of the pass before, as after an optimiser's step
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().sum().backward()
        if device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[-1]


@contextmanager
def cudnn_benchmark(value: bool) -> Iterator[None]:
    """Whether cuDNN times its kernels, within."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = value
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
