"""Trains the embedded base model, seeded: ``python -m clipft.demo.pretrain`` (about an hour a run on 2 cores).

Views of the sources are drawn once, and the teacher's features of them found (``views``, ``teacher``). The model then
sees them in batches with three losses: contrastive between the drawings and their names with some keywords (this
package's, equal captions being positives), and the squared error of a linear map of the vision tower's patches, and of
its class token, from the teacher's features. OpenMoji is left to the demo.

The embedded weights took two runs: ten epochs at 72 px in patches of 12 (seed 0, commit 6cb406b), and from these eight
at 96 px in patches of 16 (``--start FOLDER --epochs 8 --seed 1``).

    apt install openclipart-png openclipart-svg dataset-fashion-mnist
    pip install 'clipft[pretrain]'
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPProcessor, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import clipft
from clipft.data import mix_seed, tokenize
from clipft.demo.drawings import noto
from clipft.demo.pretrain import sources
from clipft.demo.pretrain.model import build_model, build_processor, resume_model, train_tokenizer
from clipft.demo.pretrain.sources import Drawing
from clipft.demo.pretrain.teacher import GLOBAL, GRID, LOCAL, Targets, Teacher
from clipft.demo.pretrain.views import scenes, single_views
from clipft.models import DEMO_MODEL
from clipft.report import ProgressReport, bar, save_model

REPEATS = {"emoji": 16, "clipart": 4, "fashion": 1}  # views of each drawing; emoji are about half of them
SCENES = 60_000
LAYERS = 3
MAX_WORDS = 6  # keywords in a caption
MAX_TOKENS = 24
CHUNK, EXAMPLES = 128, 2048  # views at a time; and to find the principal components on
NO_CAPTION = -1


class Views(NamedTuple):
    """What the model is trained on; row i of all of them is one picture."""

    pixels: Tensor  # [N, 3, SIZE, SIZE] uint8
    drawing: Tensor  # [N] int64, which one, or NO_CAPTION
    targets: Targets


def draw_views(drawings: list[Drawing], repeats: list[int], scene_count: int, console: Console) -> Views:
    """Every drawing ``repeats`` times, and scenes of all of them."""
    pictures, photographs = torch.stack([drawing.pixels for drawing in drawings]), sources.read_photographs()
    chosen = torch.arange(len(drawings)).repeat_interleave(torch.tensor(repeats))
    chosen = torch.cat([chosen, torch.full((scene_count,), NO_CAPTION)])[torch.randperm(len(chosen) + scene_count)]

    def draw(which: Tensor) -> Tensor:
        captioned = which != NO_CAPTION
        pixels = torch.empty(len(which), 3, sources.SIZE, sources.SIZE)
        layers = torch.randint(len(drawings), (LAYERS * int((~captioned).sum()),))
        pixels[captioned] = single_views(pictures[which[captioned]], photographs)
        pixels[~captioned] = scenes(pictures[layers], photographs, LAYERS)
        return pixels

    teacher, chunks = Teacher(draw(chosen[:EXAMPLES])), []
    with bar(console) as progress:
        for which in progress.track(chosen.split(CHUNK), description="views"):
            pixels = draw(which)
            chunks.append(Views((pixels * 255).round().to(torch.uint8), which, teacher(pixels)))
    pixels_of, drawing_of, targets_of = zip(*chunks, strict=True)
    targets = Targets(*(torch.cat(part) for part in zip(*targets_of, strict=True)))
    return Views(torch.cat(pixels_of), torch.cat(drawing_of), targets)


class Indices(Dataset[int]):
    """Rows for ``Trainer``; the collator looks them up."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Collator:
    """Rows of ``views`` to a batch, half of them mirrored, names with some keywords."""

    def __init__(self, views: Views, drawings: list[Drawing], processor: CLIPProcessor) -> None:
        self.views, self.drawings, self.processor = views, drawings, processor
        images: Any = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (images.image_mean, images.image_std))

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        """``captioned`` [N] bool, and for those that are, ``input_ids`` and ``labels``."""
        index = torch.tensor(rows)
        pixels, drawing = self.views.pixels[index].float() / 255, self.views.drawing[index]
        local, whole = (target[index].float() for target in self.views.targets)
        mirrored = torch.rand(len(rows)) < 0.5
        pixels[mirrored] = pixels[mirrored].flip(3)
        local[mirrored] = local[mirrored].unflatten(1, (GRID, GRID)).flip(2).flatten(1, 2)
        captioned = drawing != NO_CAPTION
        captions = [some_words(self.drawings[which]) for which in drawing[captioned].tolist()]
        return {
            "pixel_values": (pixels - self.mean) / self.std,
            "local": local,
            "whole": whole,
            "captioned": captioned,
            "labels": torch.tensor([mix_seed(caption) for caption in captions]),
        } | tokenize(self.processor, captions, MAX_TOKENS)


def some_words(drawing: Drawing) -> str:
    """The name, and after it some of the keywords in any order."""
    keywords = drawing.keywords
    chosen = torch.randperm(len(keywords))[: int(torch.randint(min(MAX_WORDS, len(keywords)) + 1, ()))]
    return ", ".join([drawing.name.lower(), *(keywords[index] for index in chosen)])


class Student(nn.Module):
    """The model with a linear map to the teacher's features; its forward pass gives the loss."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.local, self.whole = nn.Linear(width, LOCAL), nn.Linear(width, GLOBAL)

    def forward(
        self,
        pixel_values: Tensor,
        local: Tensor,
        whole: Tensor,
        captioned: Tensor,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        """The sum of the three losses; the squared errors count thrice."""
        seen = self.clip.vision_model(pixel_values)
        errors = F.mse_loss(self.local(seen.last_hidden_state[:, 1:]).float(), local)
        errors = errors + F.mse_loss(self.whole(seen.pooler_output).float(), whole)
        text = self.clip.text_model(input_ids, attention_mask).pooler_output
        images, texts = self.clip.visual_projection(seen.pooler_output[captioned]), self.clip.text_projection(text)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        contrastive = clipft.contrastive_loss(images, texts, self.clip.logit_scale.exp(), labels=labels)
        return {"loss": contrastive + 3 * errors}


def training_arguments(output: Path, epochs: float, seed: int, rate: float) -> TrainingArguments:
    """The recipe."""
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=256,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=300,
        weight_decay=0.05,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        bf16=True,
        seed=seed,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )


def main() -> None:
    """Train, print what the model knows, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    parser.add_argument("--start", help="model to go on from, at half the rate; patches may be smaller")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources.check()
    console, started = Console(), time.monotonic()
    parts = {"emoji": sources.read_emoji(), "clipart": sources.read_clipart(), "fashion": sources.read_fashion()}
    drawings = [drawing for part in parts.values() for drawing in part]
    console.print(", ".join(f"{len(part)} of {name}" for name, part in parts.items()))

    torch.manual_seed(options.seed)
    start = clipft.load(options.start) if options.start else None
    words = [text for drawing in drawings for text in (drawing.name, *drawing.keywords)]
    tokenizer = start[1].tokenizer if start else train_tokenizer(words)
    repeats = [REPEATS[name] for name, part in parts.items() for _ in part]
    views = draw_views(drawings, repeats, SCENES, console)
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    if start:
        resume_model(start[0], model)
    model.set_attn_implementation("eager")  # for so few patches in bfloat16, half again as fast as sdpa on a CPU
    trainer = Trainer(
        Student(model),
        training_arguments(options.output, options.epochs, options.seed, 5e-4 if start else 1e-3),
        train_dataset=Indices(len(views.pixels)),
        data_collator=Collator(views, drawings, processor),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReport(console, "pre-training"))
    trainer.train()
    model.set_attn_implementation("sdpa")
    save_model(model.eval(), processor, options.output)
    scores = clipft.evaluate_retrieval(model, processor, noto())
    console.print({name: value if name == "intervals" else round(value, 3) for name, value in scores.items()})
    console.print(f"{options.output} in {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
