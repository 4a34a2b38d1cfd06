"""What a model costs to use: its parameters, and the time of one picture through its image tower, in float32 and int8.

    OMP_NUM_THREADS=1 python benchmarks/models.py [--only openai/clip-vit-base-patch32 ...] [--repeats 5]

Random weights in the shape of the published ones, whose time they have; float32 and int8 in turn, the least of all
runs, since others on the machine only ever add. Written after each model; a run of the same settings on the same
machine and versions goes on after those that it finds, so that a file to be measured anew is deleted first.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from common import interleave, kept, machine, save, summary
from transformers import ChineseCLIPConfig, ChineseCLIPModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import clipft

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
WIDE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": (CLIPModel, {}),
    "openai/clip-vit-base-patch16": (CLIPModel, {"vision_config": {"patch_size": 16}}),
    "openai/clip-vit-large-patch14": (
        CLIPModel,
        {"text_config": WIDE_TEXT, "vision_config": LARGE | {"patch_size": 14}, "projection_dim": 768},
    ),
    "openai/clip-vit-large-patch14-336": (
        CLIPModel,
        {
            "text_config": WIDE_TEXT,
            "vision_config": LARGE | {"patch_size": 14, "image_size": 336},
            "projection_dim": 768,
        },
    ),
    "google/siglip-base-patch16-224": (SiglipModel, {}),
    "google/siglip2-base-patch16-224": (SiglipModel, {"text_config": {"vocab_size": 256000}}),
    "OFA-Sys/chinese-clip-vit-base-patch16": (ChineseCLIPModel, {"vision_config": {"patch_size": 16}}),
}
CONFIGS = {CLIPModel: CLIPConfig, SiglipModel: SiglipConfig, ChineseCLIPModel: ChineseCLIPConfig}


def measure(name: str, repeats: int) -> dict[str, Any]:
    kind, config = MODELS[name]
    model = kind(CONFIGS[kind](**config)).eval()
    vision, text = model.config.vision_config, model.config.text_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=torch.Generator().manual_seed(0))
    small = clipft.quantize(model)
    with torch.inference_mode():
        runs = {
            "float32": lambda: model.get_image_features(pixel_values=pixels),
            "int8": lambda: small.get_image_features(pixel_values=pixels),
        }
        seconds = interleave(runs, repeats)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pixels": vision.image_size,
        "patch": vision.patch_size,
        "tokens": text.max_position_embeddings,
        "seconds": {who: summary(own) for who, own in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    about, settings = machine(), {"repeats": options.repeats}
    rows = {row["model"]: row for row in kept("models", about, settings)}
    for name in options.only:
        if name in rows:
            print(f"{name}: measured before")
            continue
        rows[name] = measure(name, options.repeats)
        own = [rows[model] for model in MODELS if model in rows]
        print(rows[name], save("models", {"machine": about, "settings": settings, "rows": own}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
