"""Full fine-tuning of CLIP with its linear layers in int8 (``clipft train --precision int8``) against float32.

    python benchmarks/switchback.py [--batch 16] [--repeats 9] [--isa avx512_vnni]
    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        python benchmarks/switchback.py --isa avx2  # as on a CPU without AVX-512
    CLIPFT_DATA=FOLDER python benchmarks/switchback.py --learn [--seeds 42 43 44]

A step is forward + backward of the contrastive loss + AdamW (torch's fused one, the Trainer's default) of a ViT-B/32
that trains whole, with random weights and inputs and captions of 16 tokens, one thread, in turn with the other's. Both
are one model, whose linear layers change between the two. "quantise" is the time in which all weights become codes and
are packed, which the int8 step has once.

With ``--learn``: the demo's model on 400 radiographs (``chest_xray``), five epochs at default settings, in float32 and
in int8 on the same splits, one a seed; balanced accuracy of either, both scored in float32, and the mean of the losses
that a run logged.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import interleave, machine, ratio, save, summary, torch_limits
from lora import batch_of
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import clipft
from clipft import _C
from clipft.models.switchback import to_float_linears, to_switchback, trained_linears
from clipft.ops.int8 import quantize_and_pack

BAR = 1.3
EPOCHS = 5


# ---- steps ----


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    model(**inputs, return_loss=True).loss.backward()
    optimizer.step()


def quantise_seconds(model: nn.Module) -> float:
    weights = [linear.weight for linear in trained_linears(model).values()]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for weight in weights:
            quantize_and_pack(weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(batch: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = clipft.fuse(CLIPModel(CLIPConfig())).train()
    inputs = batch_of("vit-b-32", batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def int8() -> None:
        to_switchback(model)
        step(model, optimizer, inputs)
        to_float_linears(model)

    seconds = interleave({"float32": lambda: step(model, optimizer, inputs), "int8": int8}, repeats)
    return {
        "model": "vit-b-32",
        "batch": batch,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "gain": ratio(seconds["float32"], seconds["int8"]),
        "quantise_s": quantise_seconds(model),
    }


# ---- what it learns ----


def learn(data: Path, seed: int) -> dict[str, Any]:
    run: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            found = clipft.train(
                "demo",
                str(data),
                Path(folder, precision),
                precision=precision,
                epochs=EPOCHS,
                seed=seed,
                control_data="none",
                console=Console(file=io.StringIO()),
            )
            losses = [entry["loss"] for entry in found.history if "loss" in entry]
            after = found.after["zero_shot"]
            run["start"] = found.before["zero_shot"]["balanced_accuracy"]
            run[precision] = {"balanced_accuracy": after["balanced_accuracy"], "loss": mean(losses)}
    return run


def measure_learning(seeds: list[int], console: Console) -> None:
    data = Path(os.environ["CLIPFT_DATA"]) / "chest_xray"
    runs = []
    for seed in seeds:
        run = learn(data, seed)
        scores = [run["start"], *(run[name]["balanced_accuracy"] for name in ("fp32", "int8"))]
        share = run["int8"]["loss"] / run["fp32"]["loss"]
        console.print("seed {}: start {:.3f}, float32 {:.3f}, int8 {:.3f}; ".format(seed, *scores), end="")
        console.print(f"loss {share:.4f} of float32's")
        runs.append(run)
    results = {"machine": machine(), "set": "chest_xray", "epochs": EPOCHS, "runs": runs}
    console.print(f"written to {save('switchback-learning', results)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--isa", choices=_C.isas(), help="kernels of clipft; torch's follow the environment")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    args = parser.parse_args()
    if args.learn and not os.environ.get("CLIPFT_DATA"):
        parser.error("CLIPFT_DATA: expected the folder that holds chest_xray/")
    torch.set_num_threads(1)
    if args.isa:
        _C.set_isa(args.isa)
    if args.learn:
        measure_learning(args.seeds, Console())
        return
    row = measure(args.batch, args.repeats)
    console = Console()
    for name, found in row["seconds"].items():
        console.print(f"{name}: {found['median_s']:.3f} s (least {found['min_s']:.3f})")
    console.print(f"quantise: {row['quantise_s']:.3f} s")
    gain = row["gain"]
    console.print(f"{_C.isa()}: {gain['median']:.2f} times as fast (of the minima {gain['min']:.2f}), bar {BAR}")
    results = {"machine": machine(), "limits": torch_limits(), "repeats": args.repeats, "bar": BAR, "steps": [row]}
    console.print(f"written to {save('switchback', results)}")


if __name__ == "__main__":
    main()
