"""The tables of README.md and docs/, drawn from benchmarks/results/*.json, and from clipft's registry of families.

    python benchmarks/tables.py            # writes them in place
    python benchmarks/tables.py --check    # says where a page differs, and exits with 1

A page holds ``<!-- table: NAME -->`` and ``<!-- /table -->`` on lines of their own; all between them is drawn. A table
is a function below, named as in the page, and reads the files of results that it names: a new measurement of another
machine changes no page until its file is named here. Ratios have one direction everywhere: clipft's time or memory over
that of what the column names, so that below 1 clipft needs less.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

from cells import NAMES, ROOT, XEON, ZEN3, ZEN4, machine, part, ratios, results, significant, size, span, table
from learning_tables import demo, learning, learning_frozen, rates, small_sets

MARKED = re.compile(r"^<!-- table: (\S+) -->\n.*?^<!-- /table -->$", re.DOTALL | re.MULTILINE)


# ---- the tables ----


def contrastive() -> str:
    found = results(f"contrastive-{ZEN4}")
    kinds = {kind: [row for row in found["rows"] if row["kind"] == kind] for kind in ("contrastive", "sigmoid")}
    rows = kinds["contrastive"]
    cells = [
        [
            str(row["n"]),
            *ratios(row, ("eager", "compiled", "open_clip")),
            *(size(row["memory_mb"][who]) for who in ("clipft", "eager")),
        ]
        for row in rows
    ]
    head = ("N", "/ eager (transformers)", "/ `torch.compile`", "/ open_clip", "memory", "eager's memory")
    limits = [span(row["share_of_limit"] for row in kinds[kind]) for kind in kinds]
    return (
        f"{machine(found)}, D = {rows[0]['dim']}:\n\n{table(head, cells)}\n\n"
        f"The loss takes {limits[0]} of the machine's limit, the sigmoid loss {limits[1]}."
    )


GPU = "gpu-nvidia-h200-intel-r-xeon-r-processor-family-6-model-207-avx512_vnni"


def gpu_losses() -> str:
    found = results(GPU)
    losses = {(row["kind"], row["n"]): row for row in found["rows"]}
    cells = []
    for n in sorted({n for _, n in losses}):
        clip, siglip = losses["contrastive", n], losses["sigmoid", n]
        memory = [size(clip["memory_mb"][who]) for who in ("clipft", "eager")]
        both = ("eager", "compiled", "open_clip")
        cells.append([str(n), *ratios(clip, (*both, "memeff")), *memory, *ratios(siglip, (*both, "siglip-kernel"))])
    peers = ("/ `torch.compile`", "/ open_clip")
    head = ["N", "contrastive / eager", *peers, "/ memeff (Triton)", "memory", "eager's"]
    head += ["sigmoid / eager", *peers, "/ siglip-kernel (Triton)"]
    clip, siglip = losses["contrastive", 32768], losses["sigmoid", 32768]
    whole = " and ".join(size(row["memory_mb"]["compiled"]) for row in (clip, siglip))
    tiled = " and ".join(size(m) for m in (clip["memory_mb"]["memeff"], siglip["memory_mb"]["siglip-kernel"]))
    return (
        f"{machine(found)}, {clip['dtype']}, D = {clip['dim']}:\n\n{table(head, cells)}\n\n"
        f"`torch.compile` keeps N x N matrices ({whole} at N = 32768), memeff and siglip-kernel none\n({tiled})."
    )


def gpu_layers() -> str:
    found = results(GPU)
    layers = {(row["kind"], row["layer"]): row["seconds"] for row in found["layers"]}
    cells = []
    for layer in dict.fromkeys(layer for _, layer in layers):
        lora, int8 = layers["lora", layer], layers["int8", layer]
        pairs = [(lora, f"clipft p={p}", f"peft p={p}") for p in ("0", "0.1")]
        pairs += [(int8, "clipft", peer) for peer in ("torchao, compiled", "plain", "plain, compiled")]
        times = [f"{row[ours]['median_s'] / row[peer]['median_s']:.2f}" for row, ours, peer in pairs]
        cells.append([f"ViT-{layer.replace(' ', ', ')}", *times])
    head = ("", "LoRA / peft", "/ peft, with dropout", "int8 / torchao, compiled", "/ the bfloat16 layer")
    return table((*head, "/ that layer, compiled"), cells, "---")


def lora() -> str:
    found = results("lora-amd-epyc-family-25-model-17-avx512")
    cells = []
    for row in found["steps"]:
        name = row["model"].replace("vit-b-32", "ViT-B/32").replace("vit-l-14", "ViT-L/14")
        time = {who: ratio["median"] for who, ratio in row["of_frozen"].items()} | {"frozen": 1.0}
        memory = {who: one["step_mb"] for who, one in row["memory"].items()}
        for what, of in ((f"{name}, batch {row['batch']}: time", time), ("its peak memory", memory)):
            pairs = [(f"clipft p={p}", other) for p in ("0", "0.1") for other in (f"peft p={p}", "frozen")]
            cells.append([what, *(f"{of[ours] / of[theirs]:.2f}" for ours, theirs in pairs)])
    head = ("", "/ peft", "/ the frozen model", "dropout 0.1: / peft", "/ the frozen model")
    return f"{machine(found)}:\n\n{table(head, cells, '---')}"


def frozen() -> str:
    found = {isa: results(f"lora-frozen-{XEON}-{isa}") for isa in ("amx", "avx512_vnni", "avx2")}
    runs = []
    for isa, model in (("amx", ""), ("amx", "vit-l-14-"), ("avx512_vnni", ""), ("avx2", "")):
        row = next(row for row in results(f"training-{model}{XEON}-{isa}")["rows"] if row["scenario"] == "int8")
        name = "ViT-L/14" if model else "ViT-B/32"
        runs.append(f"{name} with {NAMES[isa]} {part(1 / row['gain']['median'], 2)}")
    peers = ("frozen", "clipft p=0.1", "peft p=0.1", "peft bitsandbytes p=0.1", "peft torchao p=0.1")
    cells = []
    for isa, one in found.items():
        for row in sorted(one["steps"], key=lambda row: -row["batch"]):
            name = row["model"].replace("vit-b-32", "ViT-B/32").replace("vit-l-14", "ViT-L/14")
            time = {who: ratio["median"] for who, ratio in row["of_frozen"].items()} | {"frozen": 1.0}
            memory = {who: share["whole_mb"] for who, share in row["memory"].items()}
            own = "clipft int8 p=0.1"
            times = [f"{time[own] / time[peer]:.2f}" if peer in time else "" for peer in peers]
            memories = [f"{memory[own] / memory[peer]:.2f}" for peer in ("clipft p=0.1", "peft p=0.1")]
            cells.append([f"{name}, batch {row['batch']}, {NAMES[isa]}", *times, *memories])
    head = ("", "time / the frozen model", "/ LoRA on the float base", "/ peft", "/ peft, bitsandbytes int8")
    head += ("/ peft, torchao int8", "memory / LoRA on the float base", "/ peft")
    return f"{machine(found['amx']).replace(', AMX', '')}:\n\n{table(head, cells, '---')}\n\n" + fill(
        f"Whole runs, from JPEG files, take of the time of `Trainer` with peft: {'; '.join(runs)}.", 118
    )


TRAINED = {
    "full": "everything",
    "lora": "LoRA, r = 16, dropout 0.1, every linear layer",
    "int8": "the same on an int8 base (`--frozen int8`)",
    "text": "the image tower (`--freeze text`)",
    "towers": "the projections (`--freeze towers`), after the first epoch",
}


def training() -> str:
    found = results(f"training-{ZEN4}")

    def rate(seconds: float) -> str:
        return f"{1 / seconds:.1f}" if seconds > 0.01 else significant(1 / seconds, 3)

    cells = [
        [
            TRAINED[row["scenario"]],
            significant(1 / row["gain"]["median"], 2),
            *(rate(row[who]["median_s"]) for who in ("clipft", "hf")),
        ]
        for row in found["rows"]
    ]
    head = ("what trains", "time / `Trainer`", "pairs a second", "of `Trainer`")
    return f"{machine(found)}, batch {found['settings']['batch']}:\n\n{table(head, cells, '---')}"


def loader() -> str:
    found = results(f"loader-{ZEN4}")
    cells = []
    for name, tasks in found["sets"].items():
        if " x " not in name:
            continue  # pictures that are not everyone's
        use, crop = (tasks[task]["pictures_per_second"] for task in ("as in use", "random crop"))
        times = [use[who] / use["clipft"] for who in ("processor", "torchvision")]
        crops = crop["torchvision"] / crop["clipft"]
        cells.append([name, *(f"{time:.2f}" for time in (*times, crops)), f"{use['clipft']:.0f}"])
    head = ("JPEG files", "/ transformers' processor", "/ torchvision", "cropped at random: / torchvision", "a second")
    return f"{machine(found)}:\n\n{table(head, cells, '---')}"


def int8() -> str:
    found = results(f"quantized-{ZEN4}")
    peers = {
        "float32": "/ float32",
        "torch.ao": "/ torch.ao int8",
        "onnxruntime": "/ ONNX Runtime int8",
        "openvino": "/ OpenVINO int8",
    }
    cells = [
        [
            str(row["batch"]),
            *(f"{1 / row['speedup_of_clipft'][peer]['median']:.2f}" for peer in peers),
            f"{row['cosine']['clipft']:.4f}",
        ]
        for row in found["towers"]
    ]
    return f"{machine(found)}:\n\n{table(['batch', *peers.values(), 'cosine'], cells)}"


def summary() -> str:
    """What stands in the README: a line a promise, one that is not kept among them where there is one."""
    loss = {row["kind"]: row for row in results(f"contrastive-{ZEN4}")["rows"] if row["n"] == 8192}["contrastive"]
    adapter = next(row for row in results("lora-amd-epyc-family-25-model-17-avx512")["steps"] if row["batch"] == 16)
    steps = {row["scenario"]: 1 / row["gain"]["median"] for row in results(f"training-{ZEN4}")["rows"]}
    step = results(f"lora-frozen-{XEON}-avx512_vnni")["steps"][0]
    int8 = 1 / results(f"training-{XEON}-avx512_vnni")["rows"][0]["gain"]["median"]
    tower = next(row for row in results(f"quantized-{ZEN4}")["towers"] if row["batch"] == 1)["speedup_of_clipft"]
    gpu = {(row["kind"], row["n"]): row for row in results(GPU)["rows"]}["contrastive", 32768]
    memory = {who: one["step_mb"] for who, one in adapter["memory"].items()}
    of_frozen = {who: one["median"] for who, one in adapter["of_frozen"].items()}

    def of_loss(row: dict[str, Any], peer: str) -> tuple[float, float]:
        return row["ratio"][peer]["median"], row["memory_mb"]["clipft"] / row["memory_mb"][peer]

    p = "p=0.1"
    rows: list[tuple[str, str, float, float | None]] = [
        ("contrastive loss, N = 8192", "transformers, eager", *of_loss(loss, "eager")),
        ("the same", "`torch.compile`", *of_loss(loss, "compiled")),
        (
            "a LoRA step, ViT-B/32, dropout 0.1",
            "peft",
            of_frozen[f"clipft {p}"] / of_frozen[f"peft {p}"],
            memory[f"clipft {p}"] / memory[f"peft {p}"],
        ),
        ("a pair in training, from its JPEG file", "transformers' `Trainer`", steps["full"], None),
        ("the same with LoRA", "`Trainer` and peft", steps["lora"], None),
        ("one picture through ViT-B/32 in int8", "float32", 1 / tower["float32"]["median"], None),
        ("the same", "ONNX Runtime int8", 1 / tower["onnxruntime"]["median"], None),
        ("the same", "OpenVINO int8", 1 / tower["openvino"]["median"], None),
        (
            "on a Xeon, one thread: a LoRA step with `--frozen int8`",
            "peft",
            step["of_frozen"]["clipft int8 p=0.1"]["median"] / step["of_frozen"]["peft p=0.1"]["median"],
            step["memory"]["clipft int8 p=0.1"]["whole_mb"] / step["memory"]["peft p=0.1"]["whole_mb"],
        ),
        ("a pair in training with it, from its JPEG file", "`Trainer` and peft", int8, None),
        ("on an H200: the loss, N = 32768", "transformers, eager", *of_loss(gpu, "eager")),
        ("the same", "`torch.compile`", *of_loss(gpu, "compiled")),
    ]
    cells = [[what, peer, f"{time:.2f}", "" if kept is None else f"{kept:.2f}"] for what, peer, time, kept in rows]
    head = ("clipft's", "over that of", "time", "peak memory")
    return table(head, cells, "---").replace("| --- | ---: |", "| --- | --- |", 1)


def explain() -> str:
    found = results(f"explain-{ZEN3}")
    cells = []
    for drawn_at, row in found["sizes"].items():
        about = f"{row['drawings']} {drawn_at} drawings a scene"
        for measure, name in (("auroc", "area"), ("pointing", "pointing")):
            shares = [row[who][measure] for who in ("clipft", "alone", "edges", "centre", "random weights")]
            correlation = part(row["correlation"]["mean_of_sizes"], 2) if measure == "auroc" else ""
            cells.append([f"{about}: {name}", *(part(share, 3) for share in shares), correlation])
    names = ("all names", "one at a time", "blurred edges", "middle", "random weights", "rank correlation with these")
    return f"{machine(found)}, {found['scenes']} scenes of each kind:\n\n{table(('', *names), cells, '---')}"


def explain_variants() -> str:
    found = results(f"explain-{ZEN3}")
    cells = [
        [name, part(row["auroc"], 3), part(row["pointing"], 2), part(row["correlation"]["mean_of_sizes"], 2)]
        for name, row in found["variants"].items()
    ]
    return table(("", "area", "pointing", "\\|rho\\|"), cells, "---")


def coreset() -> str:
    found = results(f"coreset-{ZEN3}")
    radii, seconds = found["radius"], found["seconds"]
    cells = []
    for name, own in seconds.items():
        other = "a tenth, random" if name.startswith("a tenth") else "random"
        cells.append([name, significant(own["min_s"], 2), f"{radii[name]:.3f}", f"{radii[other]:.3f}"])
    head = ("", "seconds", "the farthest patch", "of as many at random")
    return table(head, cells, "---")


def families() -> str:
    from clipft.families.registry import FAMILIES

    cells = [
        [
            family.title,
            f"`{family.model.__name__}`",
            f"{family.loss} loss",
            *("yes" if use else "no" for use in (family.int8, family.onnx)),
        ]
        for family in FAMILIES
    ]
    head = ("", "class", "pre-trained with", "int8", "ONNX (in int8 too, where int8 is)")
    return table(head, cells, "---").replace("---:", "---")  # words


LICENCES = {"openai": "MIT", "google": "Apache-2.0"}  # of who says so plainly


def models() -> str:
    found = results(f"models-{XEON}-amx")
    cells = [
        [
            f"`{row['model']}`",
            f"{row['parameters'] / 1e6:.0f}",
            f"{row['pixels']}/{row['patch']}",
            str(row["tokens"]),
            *(significant(1000 * row["seconds"][who]["min_s"], 2) for who in ("float32", "int8")),
            LICENCES.get(row["model"].split("/")[0], ""),
        ]
        for row in found["rows"]
    ]
    head = ("model", "million parameters", "pixels / patch", "tokens", "ms a picture", "in int8", "licence")
    about = f"{machine(found)}, random weights, the least of {found['settings']['repeats']} runs"
    return f"{about}:\n\n{table(head, cells, '---')}"


def costs() -> str:
    found = results(f"costs-{XEON}-amx")
    trains = TRAINED | {"towers": "the projections (`--freeze towers`): the towers, once"}
    cells = [
        [
            f"`{row['model']}`",
            trains[row["method"]],
            significant(1000 * row["seconds"]["min_s"], 2),
            size(row["peak_mb"]),
        ]
        for row in found["rows"]
    ]
    head = ("model", "what trains", "seconds a thousand pairs", "peak memory")
    drawn = table(head, cells, "---").replace("| --- | ---: |", "| --- | --- |", 1)
    return f"{machine(found)}, batch {found['settings']['batch']}:\n\n{drawn}"


def anomaly() -> str:
    found = results(f"anomaly-{ZEN3}")
    counts = [str(count) for count in found["arguments"]["normal"].split(",")]
    sets = {**found["sets"], "mean": found["mean"]}
    cells = [
        [name, *(part(own[n][f"{what}_auroc"], 2) for n in counts for what in ("image", "pixel"))]
        for name, own in sets.items()
    ]
    head = [f"{by}{what}" for n in counts for by, what in ((f"by {n} normal ones: ", "pictures"), ("", "pixels"))]
    return table(["AUROC", *head], cells, "---")


def predict() -> str:
    found = results(f"predict-{ZEN3}")
    cells = [[row["kind"], f"{row['ratio']['min']:.2f}"] for row in found["rows"]]
    about = f"{machine(found)}, {found['pictures']} small pictures, the least of {found['repeats']} runs each"
    return f"{about}:\n\n{table(('', 'time / that of `clipft embed`'), cells, '---')}"


TABLES: dict[str, Callable[[], str]] = {
    drawn_by.__name__: drawn_by
    for drawn_by in (
        *(summary, contrastive, lora, frozen, training, loader, int8, gpu_losses, gpu_layers, predict, coreset),
        *(learning, learning_frozen, small_sets, demo, rates),
        *(explain, explain_variants, anomaly, families, models, costs),
    )
}


# ---- pages ----


def drawn(page: str) -> str:
    """A page's text with every table as the results have it."""
    new, found = MARKED.subn(lambda mark: f"<!-- table: {mark[1]} -->\n\n{TABLES[mark[1]]()}\n\n<!-- /table -->", page)
    if not found == page.count("<!-- table: ") == page.count("<!-- /table -->"):
        raise ValueError("every <!-- table: NAME --> needs a <!-- /table --> of its own, each on a line of its own")
    return new


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    options = parser.parse_args(arguments)
    differs = False
    for path in options.pages:
        page = path.read_text()
        try:
            new = drawn(page)
        except (KeyError, ValueError) as error:
            sys.exit(f"{path}: {f'no table {error}' if isinstance(error, KeyError) else error}")
        if new == page:
            continue
        differs = True
        if options.check:
            old, wanted = (text.splitlines(keepends=True) for text in (page, new))
            sys.stdout.writelines(difflib.unified_diff(old, wanted, str(path), "as drawn"))
        else:
            path.write_text(new)
    return int(differs and options.check)


if __name__ == "__main__":
    sys.exit(main())
