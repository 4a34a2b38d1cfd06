"""The fused losses against what people use, forward + backward in float32 on one machine.

    python benchmarks/contrastive.py [--sizes 2048 4096 8192 16384] [--dim 512] [--repeats 5]

Peers: eager (transformers' image_text_contrastive_loss on the matrix of logits), the same under torch.compile,
open_clip's ClipLoss, and for the sigmoid loss eager and open_clip's SigLipLoss. "of limit" is the time that the loss's
matrix products alone take at the rate of torch's GEMM in this run (8 N^2 D operations, 6 for tiles that are kept and
for the sigmoid loss), over its time; on AMD the loss has a GEMM of its own, which may pass torch's. Memory is the
growth of the peak RSS beyond inputs and gradients, each in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleave, machine, memory, ratio, reset_peak_memory, save, summary
from rich.console import Console
from rich.table import Table
from torch import Tensor

import clipft

TILE, KEEP = 1024, 40 * 1024 * 1024 // 4
BARS = {2048: (0.70, None), 4096: (0.62, 1.0), 8192: (0.58, 0.95), 16384: (0.50, 0.75)}  # of eager, of compiled

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    return image_text_contrastive_loss(torch.matmul(text, image.t()) * scale)


def eager_sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """As transformers' SiglipModel computes it."""
    logits = torch.matmul(text, image.t()) * scale - 10.0
    signs = -torch.ones_like(logits) + 2 * torch.eye(len(logits))
    return -torch.sum(F.logsigmoid(signs * logits), dim=-1).mean()


def competitors() -> dict[str, dict[str, Loss]]:
    from open_clip.loss import ClipLoss, SigLipLoss

    clip, siglip = ClipLoss(), SigLipLoss()
    bias = torch.tensor(-10.0)
    return {
        "contrastive": {
            "clipft": clipft.contrastive_loss,
            "eager": eager_contrastive,
            "compiled": torch.compile(eager_contrastive),
            "open_clip": clip,
        },
        "sigmoid": {
            "clipft": lambda i, t, s: clipft.sigmoid_loss(i, t, s, bias),
            "eager": eager_sigmoid,
            "open_clip": lambda i, t, s: siglip(i, t, s, bias),
        },
    }


def inputs(n: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    text = F.normalize(image + torch.randn(n, dim, generator=generator) / dim**0.5, dim=1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(100.0, requires_grad=True)


def step(loss: Loss, args: tuple[Tensor, Tensor, Tensor]) -> None:
    for tensor in args:
        tensor.grad = None
    loss(*args).backward()


def products_of_a_tile(dim: int) -> dict[str, Callable[[], object]]:
    """The three products of a tile of TILE^2 logits."""
    image, text, tile = torch.randn(TILE, dim), torch.randn(TILE, dim), torch.randn(TILE, TILE)
    logits, d_image, d_text = torch.empty(TILE, TILE), torch.empty(TILE, dim), torch.empty(TILE, dim)
    return {
        "logits": lambda: torch.mm(image, text.t(), out=logits),
        "d_image": lambda: torch.addmm(d_image, tile, text, out=d_image),
        "d_text": lambda: torch.addmm(d_text, tile.t(), image, out=d_text),
    }


def made_again(kind: str, n: int) -> float:
    """The share of tiles whose logits the backward pass makes again."""
    room = KEEP // n
    return 0.0 if kind == "sigmoid" or n <= room else 1.0 - (room // TILE * TILE) / n


def limit_seconds(kind: str, n: int, per_tile: dict[str, float]) -> float:
    return (n / TILE) ** 2 * (sum(per_tile.values()) + made_again(kind, n) * per_tile["logits"])


def measure(kind: str, losses: dict[str, Loss], n: int, dim: int, repeats: int) -> dict[str, object]:
    args = inputs(n, dim)
    gemms = products_of_a_tile(dim)
    runs: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: step(loss, args)) for name, loss in losses.items()
    }
    runs |= {f"gemm {name}": (lambda run=run: [run() for _ in range(20)]) for name, run in gemms.items()}
    seconds = interleave(runs, repeats)
    per_tile = {name: statistics.median(seconds.pop(f"gemm {name}")) / 20 for name in gemms}
    limit = limit_seconds(kind, n, per_tile)
    return {
        "kind": kind,
        "n": n,
        "dim": dim,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio": {name: ratio(seconds["clipft"], values) for name, values in seconds.items() if name != "clipft"},
        "gemm_gflops": sum(2e-9 * TILE * TILE * dim / s for s in per_tile.values()) / len(per_tile),
        "share_of_limit": limit / statistics.median(seconds["clipft"]),
        "memory_mb": {name: peak_memory(kind, name, n, dim) for name in losses},
    }


def peak_memory(kind: str, name: str, n: int, dim: int) -> float:
    command = [sys.executable, __file__, "--memory", kind, name, "--sizes", str(n), "--dim", str(dim)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(kind: str, name: str, n: int, dim: int) -> None:
    """Growth of the peak RSS over one step, in MiB, less the two gradients. A small step first loads what every step
    needs."""
    loss = competitors()[kind][name]
    step(loss, inputs(256, dim))
    if name == "compiled":
        step(loss, inputs(n, dim))
    args = inputs(n, dim)
    reset_peak_memory()
    before = memory("VmRSS")
    step(loss, args)
    print((memory("VmHWM") - before - 2 * n * dim * 4) / 2**20)


def table(results: list[dict], kind: str) -> Table:
    out = Table(title=f"{kind} loss, forward + backward, float32: time of clipft / time of the peer (median; minimum)")
    peers = list(results[0]["ratio"])
    out.add_column("N", justify="right")
    for peer in peers:
        out.add_column(f"/ {peer}", justify="right")
    out.add_column("of limit", justify="right")
    out.add_column("GFLOP/s", justify="right")
    out.add_column("MiB, clipft", justify="right")
    out.add_column("MiB, eager", justify="right")
    for row in results:
        cells = [f"{row['ratio'][peer]['median']:.2f} ({row['ratio'][peer]['min']:.2f})" for peer in peers]
        memories = [f"{row['memory_mb'][name]:.0f}" for name in ("clipft", "eager")]
        out.add_row(str(row["n"]), *cells, f"{row['share_of_limit']:.0%}", f"{row['gemm_gflops']:.0f}", *memories)
    return out


def missed_bars(results: list[dict]) -> list[str]:
    missed = []
    for row in results:
        eager, compiled = BARS.get(row["n"], (None, None))
        for peer, bar in (("eager", eager), ("compiled", compiled)):
            if bar is not None and row["ratio"][peer]["median"] > bar:
                missed.append(f"N = {row['n']}: {row['ratio'][peer]['median']:.2f} of {peer}, bar {bar}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_peak_memory(*options.memory, options.sizes[0], options.dim)
        return 0
    console = Console(width=120)
    results: dict = {"machine": machine(), "rows": []}
    for kind, losses in competitors().items():
        rows = [measure(kind, losses, n, options.dim, options.repeats) for n in options.sizes]
        console.print(table(rows, kind))
        results["rows"] += rows
    console.print(f"written to {save('contrastive', results)}")
    missed = missed_bars([row for row in results["rows"] if row["kind"] == "contrastive"])
    for line in missed:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
