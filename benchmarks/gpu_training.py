"""Pairs a second and peak memory of whole training runs on one GPU, loader included, in bfloat16.

    pip install peft sentence-transformers open_clip_torch timm
    python benchmarks/gpu_training.py [--models vit-b-32 vit-b-16 vit-l-14 siglip2-b-16] [--batch 256] [--steps 24]
        [--repeats 2] [--workers 12] [--without "Trainer, compiled"] [--device cuda]

Models of the checkpoints' sizes with random weights, AdamW, autocast, JPEG files of 256 px read by as many worker
processes on every side, captions of 4 to 14 words. "full" trains all weights, "lora" adapters of r = 16, dropout 0.1,
on every linear layer of the towers.

Peers: Hugging Face's ``Trainer`` (with peft for "lora"), captions padded to the longest of the batch (SigLIP's to its
64 tokens), also under ``torch_compile``; for "full" sentence-transformers with its loss in both directions, and
open_clip's model and loss in the steps of its ``train_one_epoch``, whose captions always have 77 tokens. All see the
same files, resized and cropped to the centre, by torchvision where the peer's documentation shows that. A run is
``steps`` optimiser steps, of which the first third, where compilers work, is left out; memory is the allocator's peak.
Runs are in turn. A peer that fails has its error in the results; clipft's ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from common import machine, ratio, save, summary
from lora import CONFIGS
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2
from training import MEAN, RANK, SIZE, STD, TARGETS, TOKENS, make_clip, make_data, make_processor
from transformers import (
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import clipft

FILES, SIGLIP_TOKENS = 1024, 64
SIGLIP = "siglip2-b-16"  # the fixed-size SigLIP 2 B/16 at 224 px
CLIPS = CONFIGS | {"vit-b-16": {"vision_config": {"patch_size": 16}}}
OPEN_CLIP = {"vit-b-32": "ViT-B-32", "vit-b-16": "ViT-B-16", "vit-l-14": "ViT-L-14", SIGLIP: "ViT-B-16-SigLIP2"}
Run = Callable[[], tuple[float, float]]


# ---- data and models ----


def make(name: str) -> tuple[Any, Any]:
    """The model and its processor, on the CPU."""
    processor = make_processor()
    torch.manual_seed(0)
    if name != SIGLIP:
        return make_clip(CLIPS[name], processor), processor
    tokenizer = processor.tokenizer
    tokenizer.model_max_length = SIGLIP_TOKENS
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = SiglipConfig(text_config={"vocab_size": 256000, **special}, vision_config={})
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)


def rows(data: datasets.Dataset, count: int) -> datasets.Dataset:
    """That many, of the same files again and again."""
    return data.select([number % len(data) for number in range(count)])


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.1, target_modules=TARGETS)


def torchvision_transform() -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


# ---- the clock ----


class Clock:
    """Pairs a second of the steps after the first third, and the allocator's peak in MiB from the first on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.first = args, args.steps // 3
        self.start = self.seconds = 0.0
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def step(self, number: int) -> None:
        """After step ``number``, from 1 on."""
        if number not in (self.first, self.args.steps):
            return
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if number == self.first:
            self.start = now
        self.seconds = now - self.start

    def result(self) -> tuple[float, float]:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.args.device == "cuda" else 0.0
        return self.args.batch * (self.args.steps - self.first) / self.seconds, peak


class ClockCallback(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.step(state.global_step)


def timed(trainer: Trainer, args: argparse.Namespace) -> tuple[float, float]:
    clock = Clock(args)
    trainer.add_callback(ClockCallback(clock))
    trainer.train()
    return clock.result()


# ---- the competitors ----


def options(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": 1e-5,
        "bf16": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": args.device == "cpu",
        "dataloader_num_workers": args.workers,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
    }


def clipft_run(name: str, scenario: str, data: datasets.Dataset, folder: Path, args: Any) -> tuple[float, float]:
    model, processor = make(name)
    if scenario == "lora":
        model = clipft.add_lora(model, r=RANK, alpha=2 * RANK, dropout=0.1)
    arguments = clipft.CLIPTrainingArguments(**options(folder, args))
    return timed(clipft.CLIPTrainer(model, arguments, train_dataset=data, processing_class=processor), args)


def hf_run(
    name: str, scenario: str, data: datasets.Dataset, folder: Path, args: Any, *, compiled: bool
) -> tuple[float, float]:
    model, processor = make(name)
    if scenario == "lora":
        model = get_peft_model(model, lora_config())
    transform, tokenizer = torchvision_transform(), processor.tokenizer
    padding = {"padding": "max_length", "max_length": SIGLIP_TOKENS} if name == SIGLIP else {"padding": "longest"}

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([transform(row["image"].convert("RGB")) for row in batch])
        tokens = tokenizer([row["caption"] for row in batch], truncation=True, return_tensors="pt", **padding)
        return {"pixel_values": pixels, **tokens, "return_loss": True}

    arguments = TrainingArguments(**options(folder, args), torch_compile=compiled)
    return timed(Trainer(model, arguments, train_dataset=data, data_collator=collate), args)


def sentence_transformers_run(name: str, data: datasets.Dataset, folder: Path, args: Any) -> tuple[float, float]:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    for part in make(name):
        part.save_pretrained(folder / "model")
    model = SentenceTransformer(str(folder / "model"), device=args.device)
    loss = MultipleNegativesRankingLoss(model, scale=100.0, directions=("query_to_doc", "doc_to_query"))
    arguments = SentenceTransformerTrainingArguments(**options(folder, args) | {"remove_unused_columns": True})
    return timed(SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss), args)


class OpenClipRows(torch.utils.data.Dataset):
    """What open_clip's CSV data set gives: a picture and its tokens, 77 of them."""

    def __init__(self, data: datasets.Dataset, transform: Any, tokenize: Any) -> None:
        self.data, self.transform, self.tokenize = data, transform, tokenize

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.data[index]
        return self.transform(row["image"]), self.tokenize(row["caption"])


def open_clip_run(name: str, data: datasets.Dataset, args: Any) -> tuple[float, float]:
    import open_clip
    from open_clip.loss import ClipLoss, SigLipLoss

    model: Any = open_clip.create_model(OPEN_CLIP[name], load_weights=False).to(args.device).train()
    transform = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    tokenizer = make_processor().tokenizer
    length = SIGLIP_TOKENS if name == SIGLIP else TOKENS

    def tokenize(caption: str) -> torch.Tensor:
        tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens["input_ids"][0]

    loader = torch.utils.data.DataLoader(
        OpenClipRows(data, transform, tokenize), args.batch, num_workers=args.workers, pin_memory=True, drop_last=True
    )
    loss = SigLipLoss() if name == SIGLIP else ClipLoss()
    return open_clip_steps(model, loss, loader, args)


def open_clip_steps(model: Any, loss: Any, loader: Iterable[Any], args: Any) -> tuple[float, float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    clock = Clock(args)
    for number, batch in enumerate(loader, 1):
        images, texts = (part.to(args.device, non_blocking=True) for part in batch)
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16):
            found = model(images, texts)
            if isinstance(found, tuple):
                found = dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), found, strict=False))
            value = loss(**found)
        value.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        clock.step(number)
    return clock.result()


def competitors(name: str, scenario: str, data: datasets.Dataset, folder: Path, args: Any) -> dict[str, Run]:
    runs: dict[str, Run] = {
        "clipft": lambda: clipft_run(name, scenario, data, folder, args),
        "Trainer": lambda: hf_run(name, scenario, data, folder, args, compiled=False),
        "Trainer, compiled": lambda: hf_run(name, scenario, data, folder, args, compiled=True),
    }
    if scenario == "full":
        runs["open_clip"] = lambda: open_clip_run(name, data, args)
    if scenario == "full" and name != SIGLIP:  # it has no sigmoid loss
        runs["sentence-transformers"] = lambda: sentence_transformers_run(name, data, folder, args)
    return runs


# ---- the table ----


def measure(name: str, scenario: str, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = rows(make_data(folder, min(FILES, args.batch * args.steps)), args.batch * args.steps)
        every = competitors(name, scenario, data, folder, args)
        runs = {who: run for who, run in every.items() if who not in args.without}
        for _, who in itertools.product(range(args.repeats), runs):
            if who in failed:
                continue
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    found.setdefault(who, []).append(runs[who]())
            except Exception as error:
                if who == "clipft":
                    raise
                failed[who] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            gc.collect()
            torch.compiler.reset()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    seconds = {who: [1.0 / rate for rate, _ in values] for who, values in found.items() if who not in failed}
    return {
        "model": name,
        "scenario": scenario,
        "pair": {who: summary(values) for who, values in seconds.items()},
        "ratio": {who: ratio(seconds["clipft"], values) for who, values in seconds.items() if who != "clipft"},
        "memory_mb": {who: max(peak for _, peak in found[who]) for who in seconds},
        "failed": failed,
    }


def show(measured: list[dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    peers = list(dict.fromkeys(who for row in measured for who in (*row["pair"], *row["failed"])))
    table = Table("", title=f"batch {args.batch}, {args.workers} workers: pairs a second (median), peak MiB")
    for who in peers:
        table.add_column(who, justify="right")
    for row in measured:
        cells = [
            f"{1.0 / row['pair'][who]['median_s']:.0f}, {row['memory_mb'][who]:.0f}"
            if who in row["pair"]
            else ("failed" if who in row["failed"] else "")
            for who in peers
        ]
        table.add_row(f"{row['model']}, {row['scenario']}", *cells)
    console.print(table)
    for row in measured:
        for who, error in row["failed"].items():
            console.print(f"failed: {row['model']}, {row['scenario']}, {who}: {error}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(OPEN_CLIP), default=list(OPEN_CLIP))
    parser.add_argument("--scenarios", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PEER", help="leave out what takes minutes to compile"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the program alone")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_training.py: torch sees no GPU here")
    about = machine()
    if args.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    settings = {"batch": args.batch, "steps": args.steps, "repeats": args.repeats, "workers": args.workers}
    place = "gpu-training" if args.models == list(OPEN_CLIP) else "-".join(["gpu-training", *args.models])
    measured: list[dict[str, Any]] = []
    for name, scenario in itertools.product(args.models, args.scenarios):
        measured.append(measure(name, scenario, args))
        if args.device == "cuda":  # a run that is stopped leaves what it has
            save(place, {"machine": about, "settings": settings, "rows": measured})
    show(measured, args, Console(width=140))
    return 0


if __name__ == "__main__":
    sys.exit(main())
