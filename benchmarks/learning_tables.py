"""The tables of what a model learns, as ``tables.py`` draws them."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from cells import XEON, ZEN4, machine, part, results, signed, table


def demo() -> str:
    found = results("demo")
    before, after, scratch = (found[stage]["retrieval"] for stage in ("before", "after", "from_scratch"))
    old = {stage: found["old_style"][stage]["retrieval"] for stage in ("before", "after", "gain")}

    def both(scores: dict[str, Any], way: str) -> str:
        return " / ".join(f"{scores[f'{way}_R@{k}']:.3f}".lstrip("0") for k in (1, 5))

    def gained(gains: dict[str, Any], way: str) -> str:
        gain = gains[f"{way}_R@5"]
        return f"{part(gain['value'], 2)} ({' - '.join(part(end, 2) for end in gain['interval'])})"

    cells = [
        [
            f"{way.replace('_', ' ')}, R@1 / R@5",
            *(both(scores, way) for scores in (before, after)),
            gained(found["gain"]["retrieval"], way),
            both(scratch, way),
        ]
        for way in ("image_to_text", "text_to_image")
    ]
    way = "image_to_text"
    names = "the old style (Noto, same names), image to text, R@1 / R@5"
    cells.append([names, *(both(old[stage], way) for stage in ("before", "after")), gained(old["gain"], way), ""])
    head = ("310 drawings of names the fine-tune did not see", "before", "after")
    return table((*head, "gain in R@5, 95 % interval", "from scratch, same steps"), cells, "---")


def rates() -> str:
    """As the code sets them, for models of these sizes."""
    import torch

    from clipft.training.arguments import default_learning_rate

    sizes = {"the demo's model": 2.8e6, "ViT-B/32, ViT-B/16": 1.5e8, "SigLIP base": 2.0e8, "ViT-L/14": 4.3e8}
    cells = []
    for name, count in sizes.items():
        model = torch.nn.Linear(int(count), 1, bias=False, device="meta")
        both = (default_learning_rate(model, lora=lora) for lora in (False, True))
        cells.append([name, f"{count / 1e6:.3g} million", *(f"{rate:.1e}".replace("e-0", "e-") for rate in both)])
    return table(("model", "parameters", "weights themselves", "LoRA"), cells, "---").replace(".0e", "e")


def learning() -> str:
    what = {
        "chest_xray": "400 radiographs, 2 classes",
        "clothing": "600 product photographs, 10 classes",
        "elpv": "2223 solar cells, 2 classes",
    }
    sets = {name: results(f"learning-{name}-{ZEN4}") for name in what}
    about = {machine(found) for found in sets.values()}

    def cell(score: dict[str, Any]) -> str:
        low, high = (part(end, 2) for end in score["interval"])
        return f"{part(score['balanced_accuracy'], 3)} ({low} - {high})"

    cells = [
        [
            f"{what[name]}, {found['epochs']} epochs",
            part(found["start"]["balanced_accuracy"], 3),
            *(cell(found[stage]) for stage in ("fine-tuned", "scratch", "HOG + LR", "over scratch")),
        ]
        for name, found in sets.items()
    ]
    head = ("", "start", "fine-tuned", "from scratch", "HOG + LR", "gain over scratch")
    return f"{'; '.join(sorted(about))}:\n\n{table(head, cells, '---')}"


def learning_frozen() -> str:
    found = results(f"learning-frozen-{XEON}-amx")
    what = {
        "chest_xray": "radiographs",
        "clothing": "product photographs",
        "elpv": "solar cells",
        "drawings": "drawings (mAP of names found by picture)",
    }
    rows = [{"set": "mean of the sets", **found["all"]}] if len(found["rows"]) > 1 else []

    def cell(gap: dict[str, float]) -> str:
        return f"{gap['mean']:+.4f} (at least {gap['at_least']:+.4f})"

    cells = [
        [
            what.get(row["set"], row["set"]),
            *(part(row[stage], 3) if stage in row else "" for stage in ("start", "float", "int8")),
            *(cell(row[which]) for which in ("gap", "gap_on_int8")),
            f"{row['loss']:.4f}",
        ]
        for row in [*found["rows"], *rows]
    ]
    head = ("", "start", "float base", "int8 base", "int8 - float", "the same, both scored on the int8 base")
    seeds = len(found["settings"]["seeds"])
    gaps = [found["all"][which] for which in ("gap", "gap_on_int8")]
    least = " and ".join(f"{gap['at_least_paired']:+.4f}" for gap in gaps)
    return f"{machine(found)}, {seeds} splits each:\n\n{table((*head, 'loss / loss'), cells, '---')}\n\n" + fill(
        f"With splits taken as independent the {gaps[0]['pairs']} pairs of runs say: at least {least}.", 118
    )


def small_sets() -> str:
    from clipft.recipes.options import LEAST_STEPS

    found = results(f"small-sets-{XEON}-amx")
    own = [row for row in found["summary"] if (row["method"], row["batch"]) == ("model", 32)]
    rows = {(row["set"], row["size"], row["least"]): row for row in own}
    sets = {"chest_xray": "radiographs", "clothing": "clothing", "elpv": "solar cells"}
    cells = []
    for size in sorted({row["size"] for row in own}, key=lambda size: (size == "whole", len(size), size)):
        both = [[rows.get((name, size, least)) for least in (0, LEAST_STEPS)] for name in sets]
        means = (" → ".join(part(row["balanced_accuracy"], 2) for row in pair) if all(pair) else "" for pair in both)
        gain = rows["all", size, LEAST_STEPS]["gain"]
        low, high = (signed(end, 2) for end in gain["interval"])
        over = f"{signed(gain['balanced_accuracy'], 2)} ({low} to {high}), {gain['pairs']} pairs"
        cells.append(["all" if size == "whole" else f"{size} a class", *means, over])
    return f"{machine(found)}:\n\n{table(('pictures', *sets.values(), 'gain, 95 % interval'), cells, '---')}"
