"""The losses on a GPU against what people use, forward + backward, and the linear layers (gpu_layers.py).

    pip install open_clip_torch inf_cl memeff siglip-kernel torchao
    python benchmarks/gpu.py [--sizes 4096 8192 ...] [--dims 512 768 1024] [--dtype bfloat16] [--repeats 10]

Peers: eager (transformers' image_text_contrastive_loss), the same under torch.compile, open_clip's ClipLoss and
SigLipLoss, and the Triton kernels inf-cl, memeff (whose scale is a constant) and siglip-kernel, where they import; one
that runs out of memory or fails has its error in the results. Runs are interleaved, each timed by CUDA events. "of
products" is the time that the loss's matrix products (8 N^2 D operations, 6 of the sigmoid loss) take at the rate of
torch's own product of two [4096, 4096] matrices of that dtype in this run, over the loss's time; "of bandwidth" is the
time that a float32 tile's trip out of and into the kernels takes from the GPU's memory, 12 bytes a logit (8), at the
rate of a copy in this run. Memory is the growth of the peak over one step, gradients included. Goals on
an H100 at N = 32768, D = 768, bfloat16: half of eager's time, no slower than the fastest Triton kernel, below 1 GB.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import gpu_seconds, machine, ratio, save, summary
from contrastive import eager_contrastive
from gpu_layers import layer_table, measure_layers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import clipft

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = 100.0
PRODUCTS = {"contrastive": 8, "sigmoid": 6}  # times N^2 D operations
TRIPS = {"contrastive": 12, "sigmoid": 8}  # bytes a logit


def eager_sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As transformers' SiglipModel computes it."""
    logits = torch.matmul(text, image.t()) * scale - 10.0
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -torch.sum(F.logsigmoid(signs * logits), dim=-1).mean()


def competitors() -> tuple[dict[str, dict[str, Loss]], dict[str, str]]:
    """Losses by kind and name, and which peers do not import and why."""
    bias = torch.tensor(-10.0, device="cuda")
    losses: dict[str, dict[str, Loss]] = {
        "contrastive": {
            "clipft": clipft.contrastive_loss,
            "eager": eager_contrastive,
            "compiled": torch.compile(eager_contrastive, dynamic=False),
        },
        "sigmoid": {
            "clipft": lambda i, t, s: clipft.sigmoid_loss(i, t, s, bias),
            "eager": eager_sigmoid,
            "compiled": torch.compile(eager_sigmoid, dynamic=False),
        },
    }
    absent: dict[str, str] = {}
    try:
        peer = importlib.import_module("open_clip.loss")
        clip, siglip = peer.ClipLoss(), peer.SigLipLoss()
        losses["contrastive"]["open_clip"] = clip
        losses["sigmoid"]["open_clip"] = lambda i, t, s: siglip(i, t, s, bias)
    except Exception as error:  # whatever a peer's import does
        absent["open_clip"] = repr(error)
    try:
        flash = importlib.import_module("inf_cl").cal_flash_loss
        losses["contrastive"]["inf-cl"] = lambda i, t, s: (flash(i, t, scale=s) + flash(t, i, scale=s)).mean() / 2
    except Exception as error:
        absent["inf-cl"] = repr(error)
    try:
        memeff = importlib.import_module("memeff").MemoryEfficientCLIPLoss(
            temperature=1 / SCALE, normalized_inputs=True, stable=False
        )
        losses["contrastive"]["memeff"] = lambda i, t, s: memeff(i, t)
    except Exception as error:
        absent["memeff"] = repr(error)
    try:
        fused = importlib.import_module("siglip_kernel").fused_siglip_loss
        losses["sigmoid"]["siglip-kernel"] = lambda i, t, s: fused(i, t, s.log(), bias)
    except Exception as error:
        absent["siglip-kernel"] = repr(error)
    return losses, absent


def inputs(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    image = F.normalize(torch.randn(n, dim, generator=generator, device="cuda"), dim=1)
    text = F.normalize(image + torch.randn(n, dim, generator=generator, device="cuda") / dim**0.5, dim=1)
    scale = torch.tensor(SCALE, device="cuda", requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def step(loss: Loss, args: tuple[Tensor, Tensor, Tensor]) -> None:
    for tensor in args:
        tensor.grad = None
    loss(*args).backward()


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of torch's product, and bytes a second of a copy (read and write)."""
    a, b = (torch.randn(4096, 4096, device="cuda").to(dtype) for _ in range(2))
    big = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(big)
    products, copies = [], []
    for _ in range(20):
        products.append(gpu_seconds(lambda: a @ b))
        copies.append(gpu_seconds(lambda: copy.copy_(big)))
    return 2 * 4096**3 / statistics.median(products), 2 * 2**28 / statistics.median(copies)


def usable(losses: dict[str, Loss], args: tuple[Tensor, Tensor, Tensor]) -> tuple[dict[str, float], dict[str, str]]:
    """Peak memory in MiB of a step of each loss that works here (warmed up), and the others' errors."""
    memory, failed = {}, {}
    for name, loss in losses.items():
        try:
            step(loss, args)
            for tensor in args:
                tensor.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(loss, args)
            torch.cuda.synchronize()
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:
            if name == "clipft":
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        torch.cuda.empty_cache()
    return memory, failed


def measure(kind: str, losses: dict[str, Loss], n: int, dim: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    torch.compiler.reset()  # code for this very shape, and no limit of recompilations
    args = inputs(n, dim, dtype)
    memory, failed = usable(losses, args)
    times: dict[str, list[float]] = {name: [] for name in memory}
    for _ in range(repeats):
        for name, values in times.items():
            values.append(gpu_seconds(lambda name=name: step(losses[name], args)))
    operations, bandwidth = limits(dtype)
    ours = statistics.median(times["clipft"])
    return {
        "kind": kind,
        "n": n,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: summary(values) for name, values in times.items()},
        "ratio": {name: ratio(times["clipft"], values) for name, values in times.items() if name != "clipft"},
        "share_of_products": PRODUCTS[kind] * n * n * dim / operations / ours,
        "share_of_bandwidth": TRIPS[kind] * n * n / bandwidth / ours,
        "memory_mb": memory,
        "failed": failed,
    }


def table(rows: list[dict[str, Any]], kind: str) -> Table:
    rows = [row for row in rows if row["kind"] == kind]
    out = Table(title=f"{kind} loss, forward + backward: time of clipft / time of the peer (median)")
    peers = list(dict.fromkeys(name for row in rows for name in (*row["ratio"], *row["failed"])))
    for column in ("N", "D", "ms", *(f"/ {p}" for p in peers), "of products", "of bandwidth", "MiB", "MiB, eager"):
        out.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['ratio'][p]['median']:.2f}" if p in row["ratio"] else "failed" for p in peers]
        eager = f"{row['memory_mb']['eager']:.0f}" if "eager" in row["memory_mb"] else "failed"
        out.add_row(
            str(row["n"]),
            str(row["dim"]),
            f"{row['seconds']['clipft']['median_s'] * 1000:.2f}",
            *cells,
            f"{row['share_of_products']:.0%}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['memory_mb']['clipft']:.0f}",
            eager,
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch sees no GPU here")
    console = Console(width=140)
    losses, absent = competitors()
    results: dict[str, Any] = {
        "machine": machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "absent": absent,
        "rows": [],
    }
    slug = "".join(c if c.isalnum() else "-" for c in results["machine"]["gpu"]).lower()
    results["layers"] = measure_layers(getattr(torch, options.dtype), options.repeats)
    for kind in ("lora", "int8"):
        console.print(layer_table(results["layers"], kind))
    for n, dim, (kind, kernels) in itertools.product(options.sizes, options.dims, losses.items()):
        results["rows"].append(measure(kind, kernels, n, dim, getattr(torch, options.dtype), options.repeats))
        save(f"gpu-{slug}", results)  # a run that is stopped leaves what it has
    for kind in losses:
        console.print(table(results["rows"], kind))
    for name, error in absent.items():
        console.print(f"not measured: {name}: {error}")
    console.print(f"written to {save(f'gpu-{slug}', results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
