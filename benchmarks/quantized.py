"""Int8 linear layers and image towers: clipft, torch.ao, ONNX Runtime, OpenVINO with NNCF, torchao, and float32.

    pip install openvino nncf torchao onnxruntime onnx onnxscript
    python benchmarks/quantized.py [--towers vit-b-32] [--batches 1 8 32] [--repeats 9] [--skip-layers] [--without ...]

Random weights, forward pass, two threads or what the machine has; all competitors interleaved in one process. torch.ao,
torchao and clipft round activations at run time; ONNX Runtime's dynamic quantisation has one scale for a whole tensor;
NNCF fixes scales from random pictures beforehand, which real data would need. OpenVINO computes what is not int8 in
bfloat16 where the CPU has it. torchao's layers are measured without torch.compile, and left out where slower than 20
times float32. The limit is that of int8_peak.c, for all cores, measured in this run.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, machine, ratio, save, summary
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import clipft
from clipft.nn import QuantizedLinear

Run = Callable[[], Any]
INT8 = ("torch.ao", "onnxruntime", "openvino", "torchao")  # the peers
LAYERS = {  # rows, in, out, activation: of image towers at batch 8
    "B/32 qkv": (400, 768, 2304, None),
    "B/32 out": (400, 768, 768, None),
    "B/32 fc1": (400, 768, 3072, "quick_gelu"),
    "B/32 fc2": (400, 3072, 768, None),
    "B/16 fc1": (1576, 768, 3072, "quick_gelu"),
    "B/16 fc2": (1576, 3072, 768, None),
    "L/14 fc1": (2056, 1024, 4096, "quick_gelu"),
    "L/14 fc2": (2056, 4096, 1024, None),
}
TOWERS: dict[str, dict[str, Any]] = {
    "vit-b-32": {},
    "vit-b-16": {"patch_size": 16},
    "vit-l-14": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
BARS = {1: 1.2, 8: 1.15, 32: 1.15}  # the best int8 peer's time over ours, of ViT-B/32 ...
BAR_VNNI, BAR_FLOAT = 1.3, 2.0  # ... with int8 dot products, and float32's time over ours


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ImageTower(nn.Module):
    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=x).pooler_output


# ---- competitors ----


def competitors(plain: nn.Module, ours: nn.Module, x: Tensor, without: list[str]) -> dict[str, Run]:
    """Each as a function of nothing; the first is float32."""
    runs: dict[str, Run] = {"float32": lambda: plain(x), "clipft": lambda: ours(x)}
    makers = {"torch.ao": torch_ao, "onnxruntime": onnx_runtime, "openvino": openvino, "torchao": torchao}
    for name, maker in makers.items():
        if name not in without:
            runs[name] = maker(plain, x)
    return runs


def torch_ao(plain: nn.Module, x: Tensor) -> Run:
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    return lambda: model(x)


def torchao(plain: nn.Module, x: Tensor) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(plain)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return lambda: model(x)


def to_onnx(plain: nn.Module, x: Tensor, folder: str) -> str:
    path = f"{folder}/model.onnx"
    torch.onnx.export(plain, (x,), path, dynamo=True, external_data=False, input_names=["x"], verbose=False)
    return path


def onnx_runtime(plain: nn.Module, x: Tensor) -> Run:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        quantize_dynamic(
            to_onnx(plain, x, folder), f"{folder}/int8.onnx", weight_type=QuantType.QInt8, per_channel=True
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(f"{folder}/int8.onnx", options)
    inputs = {"x": x.numpy()}
    return lambda: session.run(None, inputs)[0]


def openvino(plain: nn.Module, x: Tensor) -> Run:
    import nncf
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        model = ov.Core().read_model(to_onnx(plain, x, folder))
    samples = [{"x": torch.randn_like(x).numpy()} for _ in range(4)]
    model = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    inputs = {"x": x.numpy()}
    return lambda: request.infer(inputs)[0]


# ---- measuring ----


def measure(runs: dict[str, Run], repeats: int, inner: int = 1) -> dict[str, Any]:
    import time

    start = time.perf_counter()
    want = torch.as_tensor(runs["float32"]())
    eager = time.perf_counter() - start
    cosines = {}
    for name in list(runs):
        start = time.perf_counter()
        got = torch.as_tensor(runs[name]())
        if time.perf_counter() - start > 20 * eager + 1:
            del runs[name]
            continue
        cosines[name] = float(nn.functional.cosine_similarity(got.flatten(1), want.flatten(1)).mean())
    loops = {name: (lambda run=run: [run() for _ in range(inner)]) for name, run in runs.items()}
    seconds = interleave(loops, repeats, rest=0.1)
    seconds = {name: [value / inner for value in values] for name, values in seconds.items()}
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "speedup_of_clipft": {
            name: ratio(values, seconds["clipft"]) for name, values in seconds.items() if name != "clipft"
        },
        "cosine": cosines,
    }


def operations(model: nn.Module, x: Tensor) -> float:
    """Of the layers that become int8: two a multiply-add."""
    total = 0.0

    def count(module: Any, args: Any, output: Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()
        total += 2.0 * output.numel() * per_output

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    model(x)
    for hook in hooks:
        hook.remove()
    return total


def int8_limit() -> float:
    """Operations a second of all cores; x86-64 only."""
    source = Path(__file__).with_name("int8_peak.c")
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-O2", "-march=native", "-pthread", str(source), "-o", f"{folder}/peak"]
        subprocess.run(command, check=True)
        measure = [f"{folder}/peak", str(torch.get_num_threads())]
        rates = [float(subprocess.run(measure, check=True, capture_output=True).stdout) for _ in range(5)]
    return 1e9 * max(rates)


def measure_layer(name: str, repeats: int, without: list[str], limit: float) -> dict[str, Any]:
    rows, features, out, activation = LAYERS[name]
    torch.manual_seed(0)
    linear = nn.Linear(features, out)
    plain = nn.Sequential(linear, QuickGELU()) if activation else nn.Sequential(linear)
    x = torch.randn(rows, features)
    ours = QuantizedLinear.from_linear(linear, activation)
    work = 2.0 * rows * features * out
    row = measure(competitors(plain, ours, x, without), repeats, inner=max(1, int(2e9 / work)))
    return {"layer": name, **row, "share_of_limit": work / limit / row["seconds"]["clipft"]["median_s"]}


def measure_tower(name: str, batch: int, repeats: int, without: list[str], limit: float) -> dict[str, Any]:
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=TOWERS[name], text_config={"num_hidden_layers": 1})
    model = CLIPModel(config).eval()
    x = torch.randn(batch, 3, 224, 224)
    plain, ours = ImageTower(model), ImageTower(clipft.quantize(model))
    work = operations(plain, x)
    row = measure(competitors(plain, ours, x, without), repeats)
    return {
        "tower": name,
        "batch": batch,
        **row,
        "gop": work / 1e9,
        "share_of_limit": work / limit / row["seconds"]["clipft"]["median_s"],
    }


# ---- output ----


def table(rows: list[dict[str, Any]], title: str) -> Table:
    out = Table("", title=title)
    out.add_column("clipft, ms", justify="right")
    for peer in ("float32", *INT8):
        out.add_column(peer, justify="right")
    out.add_column("cosine", justify="right")
    out.add_column("of limit", justify="right")
    for row in rows:
        name = row.get("layer") or f"{row['tower']}, batch {row['batch']}"
        cells = []
        for peer in ("float32", *INT8):
            speedup = row["speedup_of_clipft"].get(peer)
            cells.append(f"{speedup['median']:.2f} ({speedup['min']:.2f})" if speedup else "")
        ours = 1000 * row["seconds"]["clipft"]["median_s"]
        out.add_row(name, f"{ours:.2f}", *cells, f"{row['cosine']['clipft']:.5f}", f"{row['share_of_limit']:.0%}")
    return out


def missed_bars(towers: list[dict[str, Any]], vnni: bool) -> list[str]:
    missed = []
    for row in towers:
        if row["tower"] != "vit-b-32":
            continue
        speedups = {name: value["median"] for name, value in row["speedup_of_clipft"].items()}
        peers = {name: speedups[name] for name in INT8 if name in speedups}
        best = min(peers, key=peers.__getitem__)
        bar = BAR_VNNI if vnni else BARS.get(row["batch"], 0.0)
        if peers[best] < bar:
            missed.append(f"batch {row['batch']}: {peers[best]:.2f} x {best}, bar {bar}")
        if speedups["float32"] < BAR_FLOAT:
            missed.append(f"batch {row['batch']}: {speedups['float32']:.2f} x float32, bar {BAR_FLOAT}")
        if row["cosine"]["clipft"] < 0.999:
            missed.append(f"batch {row['batch']}: cosine {row['cosine']['clipft']:.5f}, bar 0.999")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=["vit-b-32"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--without", nargs="+", choices=INT8, default=[])
    parser.add_argument("--skip-layers", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(width=140)
    limit = int8_limit()
    results: dict[str, Any] = {"machine": machine(), "int8_limit_gops": limit / 1e9, "layers": [], "towers": []}
    with torch.no_grad():
        if not options.skip_layers:
            for name in LAYERS:
                results["layers"].append(measure_layer(name, options.repeats, options.without, limit))
            console.print(table(results["layers"], "layers: time of the peer / time of clipft (median; minimum)"))
        for tower in options.towers:
            for batch in options.batches:
                results["towers"].append(measure_tower(tower, batch, options.repeats, options.without, limit))
    console.print(table(results["towers"], "image towers: time of the peer / time of clipft (median; minimum)"))
    console.print(f"int8 limit of the machine: {limit / 1e9:.0f} GOP/s")
    console.print(f"written to {save('quantized', results)}")
    missed = missed_bars(results["towers"], "vnni" in results["machine"]["isa"])
    for line in missed:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
