"""Pairs a second of whole training runs: ``CLIPTrainer`` against Hugging Face's ``Trainer`` with peft.

    pip install peft
    python benchmarks/training.py [--batch 16] [--steps 6] [--repeats 3] [--scenarios full lora text towers int8]
        [--model vit-l-14] [--isa avx2]

ViT-B/32 or ViT-L/14 with random weights, JPEG files of 256 px, captions of 6 to 16 tokens, float32, AdamW, no loader
workers. The peer goes as its documentation shows (transformers' examples/pytorch/contrastive-image-text/run_clip.py:
torchvision's transforms, captions padded to the model's 77 tokens, ``return_loss=True``; peft's LoraConfig on every
linear layer of the towers, r = 16, dropout 0.1). Both see the same files and captions. A run is ``steps`` optimiser
steps over as many batches, in turn with the other's; the first step of each is left out. For frozen towers the outputs
that clipft keeps are computed before the clock starts: the time is that of every epoch after the first. "int8" is
"lora" on an int8 base, of clipft's alone. For another instruction set than the machine's best see ``lora.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from common import machine, ratio, save, summary
from lora import CONFIGS
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import clipft
from clipft import _C

SIZE, TOKENS, RANK = 224, 77, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BARS = {"full": 1.35, "lora": 2.1, "text": 1.25, "towers": 20.0}
INT8_BARS = {"avx2": 3.4, "avx512_vnni": 4.2, "amx": 4.2}
SCENARIOS = (*BARS, "int8")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- data and models ----


def make_data(folder: Path, count: int) -> datasets.Dataset:
    """Smooth random pictures as JPEG files, and captions of 4 to 14 words that are a token each."""
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "car", "red", "blue", "tree", "ball", "house", "hat", "cup"]
    rows: dict[str, list[str]] = {"image": [], "caption": []}
    for number in range(count):
        coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)
        rows["image"].append(str(path))
        rows["caption"].append(" ".join(generator.choice(words, generator.integers(4, 15))))
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def make_processor() -> CLIPProcessor:
    """The demo's tokenizer, whose words are tokens, and CLIP's preprocessing at 224 px."""
    tokenizer = cast(Any, clipft.load("demo")[1]).tokenizer
    tokenizer.model_max_length = TOKENS
    return CLIPProcessor(CLIPImageProcessor(), tokenizer)


def make_clip(config: dict[str, Any], processor: Any) -> CLIPModel:
    """Random weights, and the tokenizer's special tokens."""
    special = {key: getattr(processor.tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPModel(CLIPConfig(**{**config, "text_config": config.get("text_config", {}) | special}))


def make_model(scenario: str, processor: Any, peer: bool, name: str) -> Any:
    torch.manual_seed(0)
    model: Any = make_clip(CONFIGS[name], processor)
    if scenario in ("lora", "int8") and peer:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.1, target_modules=TARGETS)
        return get_peft_model(model, config)
    if scenario in ("lora", "int8"):
        base = "int8" if scenario == "int8" else "float"
        return clipft.add_lora(model, r=RANK, alpha=2 * RANK, dropout=0.1, frozen=base)
    return clipft.freeze(model, {"full": "none", "text": "text", "towers": "towers"}[scenario])


# ---- the two trainers ----


class Clock(TrainerCallback):
    """Seconds of the steps but the first."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.start = now
        self.seconds = now - self.start


def options(folder: Path, batch: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def peer_trainer(model: Any, data: datasets.Dataset, processor: Any, arguments: TrainingArguments) -> Trainer:
    tokens = processor.tokenizer(list(data["caption"]), max_length=TOKENS, padding="max_length", truncation=True)
    data = data.add_column("input_ids", tokens["input_ids"]).add_column("attention_mask", tokens["attention_mask"])
    transform = v2.Compose(
        [
            v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def pixels(rows: dict[str, Any]) -> dict[str, Any]:
        rows["pixel_values"] = [transform(image.convert("RGB")) for image in rows["image"]]
        return rows

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), **ids, "return_loss": True}

    data.set_transform(pixels)
    return Trainer(model, arguments, train_dataset=data, data_collator=collate)


def run(scenario: str, peer: bool, data: datasets.Dataset, processor: Any, folder: Path, args: Any) -> float:
    """Pairs a second."""
    model = make_model(scenario, processor, peer, args.model)
    shared = options(folder, args.batch, args.steps)
    trainer: Trainer
    if peer:
        trainer = peer_trainer(model, data, processor, TrainingArguments(**shared))
    else:
        arguments = clipft.CLIPTrainingArguments(**shared, feature_cache=str(folder / "features"))
        trainer = clipft.CLIPTrainer(model, arguments, train_dataset=data, processing_class=processor)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return args.batch * (args.steps - 1) / clock.seconds


# ---- the table ----


def measure(scenario: str, args: argparse.Namespace) -> dict[str, Any]:
    processor = make_processor()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder, args.batch * args.steps // 2)  # two epochs
        seconds: dict[str, list[float]] = {"clipft": [], "hf": []}
        for repeat in range(args.repeats):
            for competitor in seconds if repeat % 2 == 0 else reversed(seconds):
                rate = run(scenario, competitor == "hf", data, processor, folder, args)
                seconds[competitor].append(1.0 / rate)
    gain = ratio(seconds["hf"], seconds["clipft"])
    bar = INT8_BARS.get(_C.isa(), 1.0) if scenario == "int8" else BARS[scenario]
    return {"scenario": scenario, **{k: summary(v) for k, v in seconds.items()}, "gain": gain, "bar": bar}


def show(rows: list[dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    table = Table("", title=f"{args.model}, batch {args.batch}: pairs a second (median)")
    for heading in ("clipft", "Trainer + peft", "gain (median; minimum times)", "bar"):
        table.add_column(heading, justify="right")
    for row in rows:
        rates = [f"{1.0 / row[name]['median_s']:.1f}" for name in ("clipft", "hf")]
        table.add_row(
            row["scenario"], *rates, f"{row['gain']['median']:.2f} ({row['gain']['min']:.2f})", f"{row['bar']}"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--model", choices=list(CONFIGS), default="vit-b-32")
    parser.add_argument("--isa", choices=_C.isas())
    args = parser.parse_args()
    if args.isa:
        _C.set_isa(args.isa)
    console = Console()
    rows = [measure(scenario, args) for scenario in args.scenarios]
    show(rows, args, console)
    settings = {"model": args.model, "batch": args.batch, "steps": args.steps, "repeats": args.repeats}
    name = "training" if args.model == "vit-b-32" else f"training-{args.model}"
    console.print(f"written to {save(name, {'machine': machine(), 'settings': settings, 'rows': rows})}")
    for row in rows:
        if row["gain"]["median"] < row["bar"]:
            console.print(f"missed: {row['scenario']}: {row['gain']['median']:.2f}, bar {row['bar']}")


if __name__ == "__main__":
    main()
