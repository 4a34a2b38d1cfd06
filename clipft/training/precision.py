"""What mixed precision gains on this machine, measured: bfloat16 without instructions for it is slower than float32."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

__all__ = ["bf16_speedup", "fastest_precision"]

_ROWS, _IN, _OUT = 512, 768, 768  # of a linear layer as in ViT-B, forward and backward
_RUNS = 3
_WORTH = 1.2  # less is not worth the rounding


def fastest_precision(device: str) -> str:
    """``"bf16"`` where it gains at least a fifth over float32 on this type of device, else ``"fp32"``."""
    return "bf16" if bf16_speedup(device) >= _WORTH else "fp32"


@cache
def bf16_speedup(device: str) -> float:
    """Time of a linear layer's forward and backward pass in float32 over that under bfloat16 autocast: the median of
    three ratios."""
    return statistics.median(_step(device, False) / _step(device, True) for _ in range(_RUNS))


def _step(device: str, autocast: bool) -> float:
    layer = torch.nn.Linear(_IN, _OUT, device=device)
    x = torch.ones(_ROWS, _IN, device=device, requires_grad=True)
    seconds = []
    for _ in range(2):  # the first of each finds its kernels
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.float().sum().backward()
        if device != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[-1]
