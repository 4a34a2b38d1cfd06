"""The linear layers' part of gpu.py: LoRA against peft, int8 against torchao and the plain layer.

Layers of ViT-B/32's and ViT-L/14's image towers at a batch of 256. LoRA: r = 16, the base layer frozen, forward +
backward, in the dtype asked for, adapters in float32 as peft keeps them under autocast; "frozen" is the base layer
alone. int8: forward, fc1 with its activation; torchao's layer (rows and channels rounded as they come, as here) eager
and under torch.compile. Runs are interleaved, each timed by CUDA events.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import gpu_seconds, ratio, summary
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.table import Table
from torch import nn

from clipft.models.lora_layers import FusedLoraLinear, why_not
from clipft.nn import QuantizedLinear

RANK, ALPHA = 16, 32
LAYERS = {  # rows, in, out, activation
    "B/32 out": (256 * 50, 768, 768, None),
    "B/32 fc1": (256 * 50, 768, 3072, "quick_gelu"),
    "B/32 fc2": (256 * 50, 3072, 768, None),
    "L/14 fc1": (256 * 257, 1024, 4096, "quick_gelu"),
    "L/14 fc2": (256 * 257, 4096, 1024, None),
}
Run = Callable[[], object]


class QuickGELU(nn.Module):
    """CLIP's activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def lora_runs(rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> dict[str, Run]:
    x = torch.randn(rows, n_in, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, n_out, device="cuda", dtype=dtype)

    def layer(kind: str, p: float) -> nn.Module:
        base = nn.Linear(n_in, n_out, device="cuda", dtype=dtype).requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=p, init_lora_weights=False)
        wrapped = PeftLinear(base, "default", config, r=RANK, lora_alpha=ALPHA)
        wrapped.lora_A.float(), wrapped.lora_B.float()
        if kind == "clipft":
            wrapped.__class__ = FusedLoraLinear
            if reason := why_not(wrapped):
                raise RuntimeError(f"clipft's layer would run peft's forward: {reason}")
        return wrapped.train()

    def run(module: nn.Module) -> None:
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        module(x).backward(dy)

    layers = {f"{kind} p={p:g}": layer(kind, p) for p in (0.0, 0.1) for kind in ("clipft", "peft")}
    layers["frozen"] = nn.Linear(n_in, n_out, device="cuda", dtype=dtype).requires_grad_(False)
    return {name: (lambda module=module: run(module)) for name, module in layers.items()}


def int8_runs(
    rows: int, n_in: int, n_out: int, activation: str | None, dtype: torch.dtype
) -> tuple[dict[str, Run], dict[str, str]]:
    plain = nn.Linear(n_in, n_out, device="cuda", dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, n_in, device="cuda", dtype=dtype)
    whole = plain if activation is None else nn.Sequential(plain, QuickGELU())
    models = {
        "clipft": QuantizedLinear.from_linear(plain, activation),
        "plain": whole,
        "plain, compiled": torch.compile(whole, dynamic=False),
    }
    absent: dict[str, str] = {}
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        peer = copy.deepcopy(whole if activation else nn.Sequential(plain))
        quantize_(peer, Int8DynamicActivationInt8WeightConfig())
        models |= {"torchao": peer, "torchao, compiled": torch.compile(peer, dynamic=False)}
    except Exception as error:  # whatever a peer's import does
        absent["torchao"] = repr(error)
    return {name: (lambda model=model: model(x)) for name, model in models.items()}, absent


def timed(runs: dict[str, Run], repeats: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of those that work here, and the others' errors."""
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            seconds[name] = []
        except Exception as error:
            if name.startswith("clipft"):
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for _ in range(repeats):
        for name, values in seconds.items():
            values.append(gpu_seconds(runs[name]))
    return seconds, failed


def measure_layers(dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """A row for each layer and kind."""
    rows = []
    for name, (n, n_in, n_out, activation) in LAYERS.items():
        torch.compiler.reset()  # code for these very shapes, and no limit of recompilations
        int8, absent = int8_runs(n, n_in, n_out, activation, dtype)
        for kind, runs, reference in (("lora", lora_runs(n, n_in, n_out, dtype), "frozen"), ("int8", int8, "plain")):
            seconds, failed = timed(runs, repeats)
            rows.append(
                {
                    "kind": kind,
                    "layer": name,
                    "rows": n,
                    "in": n_in,
                    "out": n_out,
                    "dtype": str(dtype).removeprefix("torch."),
                    "seconds": {who: summary(values) for who, values in seconds.items()},
                    "of": reference,
                    "ratio": {who: ratio(values, seconds[reference]) for who, values in seconds.items()},
                    "tops": {who: 2 * n * n_in * n_out / statistics.median(v) / 1e12 for who, v in seconds.items()},
                    "failed": failed | (absent if kind == "int8" else {}),
                }
            )
        torch.cuda.empty_cache()
    return rows


def layer_table(rows: list[dict[str, Any]], kind: str) -> Table:
    """Times of one kind over those of its reference."""
    rows = [row for row in rows if row["kind"] == kind]
    names = list(dict.fromkeys(name for row in rows for name in (*row["ratio"], *row["failed"]) if name != row["of"]))
    what = "forward + backward" if kind == "lora" else "forward"
    out = Table(title=f"{kind} layer, {what}: time / {rows[0]['of']} layer's (median)")
    for column in ("", f"{rows[0]['of']}, ms", *names):
        out.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['ratio'][n]['median']:.2f}" if n in row["ratio"] else "failed" for n in names]
        out.add_row(row["layer"], f"{row['seconds'][row['of']]['median_s'] * 1000:.3f}", *cells)
    return out
