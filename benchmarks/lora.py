"""LoRA fine-tuning of CLIP: the frozen model, peft, and clipft, in float32 on one machine.

    python benchmarks/lora.py [--models vit-b-32 vit-l-14] [--batch 16] [--repeats 7] [--skip-layers] [--skip-memory]
    python benchmarks/lora.py --frozen  # whole steps on clipft's int8 base, beside its float base, peft, and peft's own
        int8 bases: bitsandbytes' and torchao's, where they are installed
    ... --isa avx2  # clipft's instruction set; torch's own goes by the environment, as ATEN_CPU_CAPABILITY=avx2
        MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

A step is forward + backward of the model's contrastive loss, r = 16 on q, k, v, out, fc1 and fc2, random weights and
inputs. The frozen step has no adapter and no trainable weight; the outputs of its embeddings require gradients, so that
every layer passes a gradient on, and so do those of the others. Everything is interleaved in one process. Memory is the
growth of the peak RSS over one step beyond the model, each in a process of its own, and ("whole") beyond the process
before it had a model. A layer is one linear layer of the
vision tower, forward + backward.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, machine, memory, place, ratio, reset_peak_memory, save, summary, torch_limits
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import clipft
from clipft import _C
from clipft.models.frozen import to_int8
from clipft.models.lora_layers import FusedLoraLinear

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CAPTION = 16
BARS = {0.0: 1.07, 0.1: 1.11}  # of the frozen ViT-B/32 step at batch 16
MEMORY_BAR = 1.05
COMPETITORS = ("frozen", "peft p=0", "peft p=0.1", "clipft p=0", "clipft p=0.1")
INT8 = {"bitsandbytes": "peft bitsandbytes p=0.1", "torchao": "peft torchao p=0.1"}  # by package
FROZEN = ("frozen", "peft p=0.1", *INT8.values(), "clipft p=0.1", "clipft int8 p=0.1")
FROZEN_BARS = {"avx2": 0.68, "avx512_vnni": 0.52, "amx": 0.52}  # of the frozen ViT-B/32 step at batch 16
FROZEN_MEMORY_BAR = 0.80  # model and step, of the float base's
LARGE = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}
CONFIGS: dict[str, dict[str, Any]] = {"vit-b-32": {}, "vit-l-14": LARGE}


# ---- the competitors ----


def build(model_name: str, competitor: str) -> nn.Module:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(**CONFIGS[model_name])).requires_grad_(False)
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    if competitor == "frozen":
        return model.train()
    kind, _, p = competitor.partition(" p=")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=float(p), init_lora_weights=False
    )
    if kind in ("peft bitsandbytes", "peft torchao"):
        to_peers_int8(model, kind)
    wrapped = get_peft_model(model, config).train()
    if kind == "clipft int8":
        to_int8(wrapped)
    if kind.startswith("clipft"):
        clipft.fuse(wrapped)
    return wrapped


def to_peers_int8(model: nn.Module, kind: str) -> None:
    """The layers that the adapter goes to, as peft's documentation has their weights: int8, a scale a channel."""
    named = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in TARGETS}
    if kind == "peft torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(version=2), filter_fn=lambda layer, name: name in named)
        return
    import bitsandbytes

    for name, layer in named.items():
        int8 = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
        int8.load_state_dict(layer.state_dict())
        model.set_submodule(name, int8.to("cpu"))
    model.is_loaded_in_8bit = True


def batch_of(model_name: str, batch: int) -> dict[str, Tensor]:
    config = CLIPConfig(**CONFIGS[model_name])
    g = torch.Generator().manual_seed(1)
    size = config.vision_config.image_size
    ids = torch.randint(1, 40000, (batch, CAPTION), generator=g)
    ids[:, -1] = config.text_config.eos_token_id or 49407
    return {
        "pixel_values": torch.randn(batch, 3, size, size, generator=g),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(**inputs, return_loss=True).loss.backward()


# ---- whole steps ----


def measure_steps(model_name: str, batch: int, repeats: int, competitors: tuple[str, ...]) -> dict[str, Any]:
    inputs = batch_of(model_name, batch)
    models = {name: build(model_name, name) for name in competitors}
    runs: dict[str, Callable[[], object]] = {
        name: (lambda model=model: step(model, inputs)) for name, model in models.items()
    }
    seconds = interleave(runs, repeats)
    row: dict[str, Any] = {
        "model": model_name,
        "batch": batch,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "of_frozen": {name: ratio(values, seconds["frozen"]) for name, values in seconds.items() if name != "frozen"},
    }
    if "clipft int8 p=0.1" in seconds:
        row["int8_of_float"] = ratio(seconds["clipft int8 p=0.1"], seconds["clipft p=0.1"])
    runs.clear()
    models.clear()
    gc.collect()  # modules know each other; the processes that come need the memory
    return row


def peak_memory(model_name: str, batch: int, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", name, "--models", model_name, "--batch", str(batch)]
    command += ["--isa", _C.isa()]
    words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {"step_mb": float(words[-3]), "process_mb": float(words[-2]), "whole_mb": float(words[-1])}


def print_peak_memory(model_name: str, batch: int, name: str) -> None:
    """Growth of the peak RSS over a step, the peak itself, and that beyond the process without a model. A step with one
    pair first loads what every step needs."""
    empty = memory("VmRSS")
    model = build(model_name, name)
    step(model, batch_of(model_name, 1))
    inputs = batch_of(model_name, batch)
    for parameter in model.parameters():
        parameter.grad = None
    reset_peak_memory()
    before = memory("VmRSS")
    step(model, inputs)
    peak = memory("VmHWM")
    print((peak - before) / 2**20, peak / 2**20, (peak - empty) / 2**20)


# ---- layer by layer ----


def layer_shapes(model_name: str, batch: int) -> dict[str, tuple[int, int, int]]:
    """Rows, in and out of each kind of linear layer in the vision tower."""
    vision = CLIPConfig(**CONFIGS[model_name]).vision_config
    rows = batch * ((vision.image_size // vision.patch_size) ** 2 + 1)
    wide, narrow = vision.intermediate_size, vision.hidden_size
    return {"q, k, v, out": (rows, narrow, narrow), "fc1": (rows, narrow, wide), "fc2": (rows, wide, narrow)}


def measure_layer(rows: int, n_in: int, n_out: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, dy = torch.randn(rows, n_in, requires_grad=True), torch.randn(rows, n_out)

    def layer(name: str) -> nn.Module:
        base = nn.Linear(n_in, n_out).requires_grad_(False)
        kind, _, p = name.partition(" p=")
        if kind == "frozen":
            return base
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=float(p), init_lora_weights=False)
        wrapped = PeftLinear(base, "default", config, r=RANK, lora_alpha=ALPHA)
        if kind == "clipft":
            wrapped.__class__ = FusedLoraLinear
        return wrapped.train()

    def run(module: nn.Module) -> None:
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        module(x).backward(dy)

    layers = {name: layer(name) for name in COMPETITORS}
    seconds = interleave({name: (lambda m=module: run(m)) for name, module in layers.items()}, repeats * 5)
    return {
        "rows": rows,
        "in": n_in,
        "out": n_out,
        "limit": 1 + 1.5 * RANK * (n_in + n_out) / (n_in * n_out),
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "of_frozen": {name: ratio(values, seconds["frozen"]) for name, values in seconds.items() if name != "frozen"},
    }


# ---- report ----


def cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """Of each competitor; one that was not run has none."""
    found = row["of_frozen"]
    return [f"{found[name]['median']:.3f} ({found[name]['min']:.3f})" if name in found else "" for name in names]


def tables(results: dict[str, Any]) -> list[Table]:
    names = list(results["steps"][0]["of_frozen"])
    layers = Table(title="One layer, forward + backward: time / frozen layer's (median; minimum)")
    steps = Table(title="Whole steps: time / frozen step's (median; minimum); step's peak memory / frozen's")
    for table in (layers, steps):
        table.add_column("")
        table.add_column("frozen, ms", justify="right")
        for name in names:
            table.add_column(name, justify="right")
    layers.add_column("operations", justify="right")
    for row in results["layers"]:
        milliseconds = f"{1e3 * row['seconds']['frozen']['median_s']:.1f}"
        layers.add_row(f"{row['model']} {row['layer']}", milliseconds, *cells(row, names), f"{row['limit']:.3f}")
    for row in results["steps"]:
        milliseconds = f"{1e3 * row['seconds']['frozen']['median_s']:.0f}"
        steps.add_row(f"{row['model']}, batch {row['batch']}", milliseconds, *cells(row, names))
        if "memory" in row:
            for kind, title in (("step_mb", "peak memory"), ("whole_mb", "with the model")):
                frozen = row["memory"]["frozen"][kind]
                shares = [
                    f"{row['memory'][name][kind] / frozen:.3f}" if name in row["memory"] else "" for name in names
                ]
                steps.add_row(f"  {title}", f"{frozen:.0f} MiB", *shares)
    return [layers, steps] if results["layers"] else [steps]


def of_others(name: str, about: dict[str, Any], models: list[str]) -> dict[str, list[Any]]:
    """What an earlier run on the same machine, with the same versions, left of models that are not measured now."""
    path = place(name, about["machine"])
    found = json.loads(path.read_text()) if path.exists() else {}
    same = all(found.get(key) == value for key, value in about.items())
    return {
        kind: [row for row in found[kind] if row["model"] not in models] if same else [] for kind in ("layers", "steps")
    }


def missed_frozen_bars(results: dict[str, Any]) -> list[str]:
    missed, bar = [], FROZEN_BARS.get(results["machine"]["isa"], 1.0)
    for row in results["steps"]:
        if row["batch"] != {"vit-b-32": 16, "vit-l-14": 4}[row["model"]]:
            continue
        if (got := row["of_frozen"]["clipft int8 p=0.1"]["median"]) > bar:
            missed.append(f"{row['model']}: {got:.3f} of the frozen step, bar {bar}")
        if "memory" in row:
            share = row["memory"]["clipft int8 p=0.1"]["whole_mb"] / row["memory"]["clipft p=0.1"]["whole_mb"]
            if share > FROZEN_MEMORY_BAR:
                missed.append(f"{row['model']}: {share:.3f} of the float base's memory, bar {FROZEN_MEMORY_BAR}")
    return missed


def missed_bars(results: dict[str, Any]) -> list[str]:
    missed = []
    for row in results["steps"]:
        if row["model"] != "vit-b-32" or row["batch"] != 16:
            continue
        for p, bar in BARS.items():
            got = row["of_frozen"][f"clipft p={p:g}"]["median"]
            if got > bar:
                missed.append(f"p = {p:g}: {got:.3f} of the frozen step, bar {bar}")
            if "memory" in row:
                share = row["memory"][f"clipft p={p:g}"]["step_mb"] / row["memory"]["frozen"]["step_mb"]
                if share > MEMORY_BAR:
                    missed.append(f"p = {p:g}: {share:.3f} of the frozen step's peak memory, bar {MEMORY_BAR}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--batch", type=int, help="pairs in a step; by default 16, and 4 for vit-l-14")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-layers", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--isa", choices=_C.isas())
    parser.add_argument("--memory", choices=(*COMPETITORS, *FROZEN), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.isa:
        _C.set_isa(options.isa)
    if options.memory:
        print_peak_memory(options.models[0], options.batch, options.memory)
        return 0
    about = {"machine": machine(), "limits": torch_limits()}
    name = "lora-frozen" if options.frozen else "lora"
    results: dict[str, Any] = {**about, **of_others(name, about, options.models)}
    absent = [name for package, name in INT8.items() if importlib.util.find_spec(package) is None]
    for model_name in options.models:
        large = tuple(INT8.values()) if model_name == "vit-l-14" else ()  # six of them take over 20 GB
        batch = options.batch or (4 if model_name == "vit-l-14" else 16)
        competitors = tuple(name for name in FROZEN if name not in (*absent, *large)) if options.frozen else COMPETITORS
        if not options.skip_layers and not options.frozen:
            for layer, shape in layer_shapes(model_name, batch).items():
                row = measure_layer(*shape, options.repeats)
                results["layers"].append({"model": model_name, "batch": batch, "layer": layer, **row})
        row = measure_steps(model_name, batch, options.repeats, competitors)
        if not options.skip_memory:
            row["memory"] = {name: peak_memory(model_name, batch, name) for name in competitors}
        results["steps"].append(row)
        path = save(name, results)
    console = Console(width=130)
    for table in tables(results):
        console.print(table)
    console.print(f"written to {path}")
    missed = (missed_frozen_bars if options.frozen else missed_bars)(results)
    for line in missed:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
