"""Trains the embedded base model, seeded: ``python -m clipft.demo.pretrain`` (15 minutes on one H200).

Every step draws views of the sources anew and finds the teacher's features of them, on the device that trains
(``views``, ``teacher``). The model has three losses: contrastive between drawings and their names with some keywords
(this package's, equal captions being positives), and the squared error of a linear map of the vision tower's patches,
and of its class token, from the teacher's features. OpenMoji is left to the demo. It runs on a CPU too, for days;
``--epochs 2`` shows that it learns.

    apt install openclipart-png openclipart-svg dataset-fashion-mnist
    pip install 'clipft[pretrain]'
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPProcessor, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import clipft
from clipft.data.collate import tokenize
from clipft.data.sampling import mix_seed
from clipft.demo.pretrain import sources
from clipft.demo.pretrain.model import build_model, build_processor, train_tokenizer
from clipft.demo.pretrain.sources import Drawing
from clipft.demo.pretrain.teacher import GLOBAL, LOCAL, Teacher
from clipft.demo.pretrain.views import SCENE, Views, crop
from clipft.demo.styles import noto
from clipft.models.formats import DEMO_MODEL
from clipft.models.saving import save_model
from clipft.training.progress import ProgressReport

REPEATS = {"emoji": 16, "clipart": 4, "fashion": 1}  # views of each drawing an epoch; emoji are about half of them
SCENES = 120_000
CROPS = 8192  # of photographs, for grounds
MAX_WORDS = 6  # keywords in a caption
MAX_TOKENS = 24
EXAMPLES = 2048  # views to find the principal components on


class Collator:
    """Which drawings to show, and the names of those that are no scenes with some keywords."""

    def __init__(self, drawings: list[Drawing], processor: CLIPProcessor) -> None:
        self.drawings, self.processor = drawings, processor

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        """``which`` [N], and for those that are no scenes, ``input_ids`` and ``labels``."""
        captions = [some_words(self.drawings[row]) for row in rows if row != SCENE]
        labels = torch.tensor([mix_seed(caption) for caption in captions])
        return {"which": torch.tensor(rows), "labels": labels} | tokenize(self.processor, captions, MAX_TOKENS)


def some_words(drawing: Drawing) -> str:
    """The name, and after it some of the keywords in any order."""
    keywords = drawing.keywords
    chosen = torch.randperm(len(keywords))[: int(torch.randint(min(MAX_WORDS, len(keywords)) + 1, ()))]
    return ", ".join([drawing.name.lower(), *(keywords[index] for index in chosen)])


class Student(nn.Module):
    """The model with what it is shown and taught; its forward pass gives the loss."""

    def __init__(self, clip: Any, processor: CLIPProcessor, views: Views, teacher: Teacher) -> None:
        super().__init__()
        self.clip, self.views, self.teacher = clip, views, teacher
        width = clip.config.vision_config.hidden_size
        self.local, self.whole = nn.Linear(width, LOCAL), nn.Linear(width, GLOBAL)
        images: Any = processor.image_processor
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(3, 1, 1)) for v in (images.image_mean, images.image_std))

    def forward(self, which: Tensor, labels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The sum of the three losses; the squared errors count thrice."""
        pixels = self.views(which)
        local, whole = self.teacher(pixels)
        seen = self.clip.vision_model((pixels - self.mean) / self.std)
        errors = F.mse_loss(self.local(seen.last_hidden_state[:, 1:]).float(), local)
        errors = errors + F.mse_loss(self.whole(seen.pooler_output).float(), whole)
        text = self.clip.text_model(input_ids, attention_mask).pooler_output
        images, texts = self.clip.visual_projection(seen.pooler_output[which != SCENE]), self.clip.text_projection(text)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        contrastive = clipft.contrastive_loss(images, texts, self.clip.logit_scale.exp(), labels=labels)
        return {"loss": contrastive + 3 * errors}


def training_arguments(output: Path, epochs: float, seed: int) -> TrainingArguments:
    """The recipe."""
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=512,
        learning_rate=1.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=500,
        weight_decay=0.05,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        bf16=True,
        seed=seed,
        dataloader_num_workers=4,
        dataloader_persistent_workers=True,
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
    parser.add_argument("--epochs", type=float, default=44.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if torch.accelerator.device_count() > 1:  # Trainer would split a batch's pictures apart from their captions
        raise SystemExit("pretrain: expected one GPU to be visible; set CUDA_VISIBLE_DEVICES=0")
    sources.check()
    console, started = Console(), time.monotonic()
    parts = {"emoji": sources.read_emoji(), "clipart": sources.read_clipart(), "fashion": sources.read_fashion()}
    drawings = [drawing for part in parts.values() for drawing in part]
    console.print(", ".join(f"{len(part)} of {name}" for name, part in parts.items()))

    torch.manual_seed(options.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    photographs = sources.read_photographs()
    crops = torch.stack([crop(photographs[index]) for index in torch.randint(len(photographs), (CROPS,)).tolist()])
    views = Views(torch.stack([drawing.pixels for drawing in drawings]), crops).to(device)
    repeats = [REPEATS[name] for name, part in parts.items() for _ in part]
    shown = [row for row, count in enumerate(repeats) for _ in range(count)] + [SCENE] * SCENES
    examples = torch.tensor(shown)[torch.randperm(len(shown))[:EXAMPLES]]
    teacher = Teacher(views(examples.to(device)))
    if device.type == "cuda":
        teacher.maps.compile(dynamic=False)

    tokenizer = train_tokenizer([text for drawing in drawings for text in (drawing.name, *drawing.keywords)])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    trainer = Trainer(
        Student(model, processor, views, teacher),
        training_arguments(options.output, options.epochs, options.seed),
        train_dataset=shown,
        data_collator=Collator(drawings, processor),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReport(console, "pre-training"))
    trainer.train()
    save_model(model.cpu().eval(), processor, options.output)
    scores = clipft.evaluate_retrieval(model, processor, noto())
    console.print({name: value if name == "intervals" else round(value, 3) for name, value in scores.items()})
    console.print(f"{options.output} in {(time.monotonic() - started) / 60:.0f} min")


if __name__ == "__main__":
    main()
