"""Trains the embedded base model, seeded: ``python -m clipft.demo.pretrain`` (about half an hour on 2 cores).

It sees Noto's drawings of all emoji with their names and keywords, openclipart's titled drawings (public domain) and
Fashion-MNIST's product pictures, each drawn anew every time: moved, scaled, turned or recoloured a little, on white, on
a colour or on a blur of colours. OpenMoji is left to the demo. The tokenizer is a byte-level BPE of CLIP's kind,
trained on the same captions.

Needs the Debian packages openclipart-png, openclipart-svg and dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.trainer_callback import PrinterCallback

from clipft.data import mix_seed, tokenize
from clipft.demo.drawings import noto
from clipft.demo.pictures import decode, read_pictures
from clipft.evaluation import evaluate_retrieval
from clipft.models import DEMO_MODEL, unfuse
from clipft.report import ProgressReport, save_model
from clipft.training import CLIPTrainer, CLIPTrainingArguments

SIZE, PATCH = 64, 16
VOCABULARY = 3000
EMOJI_REPEATS = 3  # in an epoch, so that they are about half of it
FASHION_COUNT = 600
MAX_WORDS = 6  # keywords in a caption
MAX_TOKENS = 24

CLIPART = Path("/usr/share/openclipart")
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
NAMESPACES = {"dc": "http://purl.org/dc/elements/1.1/", "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#"}
Pair = tuple[Tensor, str, list[str]]  # drawing [4, 64, 64] uint8 with its transparency, name, keywords


# ---- sources ----


def read_emoji() -> list[Pair]:
    """The drawings inside the package."""
    return [(to_tensor(decode(row)), row["name"], row["keywords"]) for row in read_pictures()]


def read_clipart() -> list[Pair]:
    """Openclipart's public-domain drawings, with their title and tags; without the stars and gradients by the dozen."""
    found = []
    for svg in sorted((CLIPART / "svg").rglob("*.svg")):
        relative = svg.relative_to(CLIPART / "svg")
        work = next((e for e in ElementTree.parse(svg).iter() if e.tag.endswith("}Work")), None)
        skipped = str(relative).startswith(("shapes/stars", "special/gradients"))
        if skipped or work is None or not _is_public_domain(work):
            continue
        tags = [_words(tag.text or "") for tag in work.iterfind("dc:subject//rdf:li", NAMESPACES)]
        folders = [_words(part) for part in relative.parts[:-1]]
        title = " ".join((work.findtext("dc:title", namespaces=NAMESPACES) or "").split())
        found.append((relative, title, list(dict.fromkeys(tag for tag in [*tags, *folders] if tag))))
    uses = Counter(title for _, title, _ in found)  # a title used again and again names a collection
    pairs = []
    for relative, title, tags in found:
        name = _words(relative.stem if uses[title] > 3 or " - " in title else title)
        drawing = _thumbnail((CLIPART / "png" / relative).with_suffix(".png"))
        if name and drawing is not None:
            pairs.append((drawing, name, tags))
    return pairs


def _is_public_domain(work: ElementTree.Element) -> bool:
    licences = [value for e in work if e.tag.endswith("}license") for value in e.attrib.values()]
    return any("ublic" in value for value in licences)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z]+", " ", text.lower()).split())


def _thumbnail(path: Path) -> Tensor | None:
    """The drawing in the middle of a transparent square; None for the few of a hundred million pixels."""
    try:
        drawing = Image.open(path).convert("RGBA")
    except Image.DecompressionBombError:
        return None
    drawing.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    square = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    square.paste(drawing, ((SIZE - drawing.width) // 2, (SIZE - drawing.height) // 2))
    return to_tensor(square)


def read_fashion() -> list[Pair]:
    """The first pictures of Fashion-MNIST, grey on black and turned to grey on white by turns."""
    pixels = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    classes = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    pictures = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[:FASHION_COUNT]
    pairs = []
    for index, grey in enumerate(pictures):
        image = Image.fromarray(grey if index % 2 else 255 - grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pairs.append((to_tensor(image.convert("RGBA")), FASHION_CLASSES[classes[index]], ["clothing", "fashion"]))
    return pairs


def to_tensor(image: Image.Image) -> Tensor:
    """[4, 64, 64] uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class Drawings(Dataset[dict[str, Any]]):
    """Rows as ``CLIPTrainer`` takes them; the name is the first caption, the keywords are the others."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawing, name, keywords = self.pairs[index]
        return {"image": drawing, "caption": [name, *keywords]}


# ---- batches ----


class DrawingCollator:
    """Rows to a batch: every drawing changed at random and laid on a random ground, its name with some keywords."""

    def __init__(self, processor: CLIPProcessor, seed: int) -> None:
        self.processor, self.seed = processor, seed
        images: Any = processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (images.image_mean, images.image_std))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``pixel_values`` [N, 3, 64, 64], ``input_ids`` and ``attention_mask`` [N, L], ``labels`` [N]."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, *(row["draw"] for row in rows)))
            drawings = torch.stack([row["image"] for row in rows]).float() / 255
            pixels = on_random_ground(*recolour(*move(drawings)))
            captions = [some_words(row["captions"]) for row in rows]
        labels = torch.tensor([mix_seed(caption) for caption in captions])
        batch = {"pixel_values": (pixels - self.mean) / self.std, "labels": labels}
        return batch | tokenize(self.processor, captions, MAX_TOKENS)


def some_words(words: list[str]) -> str:
    """The name, and after it some of the keywords in any order."""
    name, *keywords = words
    chosen = torch.randperm(len(keywords))[: int(torch.randint(min(MAX_WORDS, len(keywords)) + 1, ()))]
    return ", ".join([name.lower(), *(keywords[index] for index in chosen)])


def uniform(count: int, low: float, high: float) -> Tensor:
    """[count, 1, 1, 1]."""
    return torch.empty(count, 1, 1, 1).uniform_(low, high)


def move(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled, stretched, turned and shifted. Premultiplied colours [N, 3, H, W] and their cover
    [N, 1, H, W].
    """
    count = len(drawings)
    cover = drawings[:, 3:]
    premultiplied = torch.cat([drawings[:, :3] * cover, cover], 1)
    scale, stretch = torch.empty(count).uniform_(0.6, 1.15), torch.empty(count).uniform_(-0.15, 0.15).exp()
    angle = torch.empty(count).uniform_(-0.25, 0.25) * (torch.rand(count) < 0.5)
    x, y = scale * stretch, scale / stretch
    shift_x, shift_y = ((1 - side).abs() * torch.empty(count).uniform_(-1, 1) for side in (x, y))
    first = torch.stack([x * angle.cos(), -y * angle.sin(), shift_x], 1)
    second = torch.stack([x * angle.sin(), y * angle.cos(), shift_y], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(drawings.shape), align_corners=False)
    moved = F.grid_sample(premultiplied, grid, align_corners=False)
    return moved[:, :3], moved[:, 3:]


def recolour(colours: Tensor, cover: Tensor) -> tuple[Tensor, Tensor]:
    """Random saturation (one in seven grey), contrast and brightness."""
    count = len(colours)
    grey = (colours * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    saturation = uniform(count, 0.5, 1.5) * (torch.rand(count, 1, 1, 1) > 1 / 7)
    contrast, brightness = uniform(count, 0.7, 1.3), uniform(count, -0.1, 0.1)
    changed = (grey + (colours - grey) * saturation) * contrast + cover * ((1 - contrast) / 2 + brightness)
    return torch.minimum(changed.clamp(min=0), cover), cover


def on_random_ground(colours: Tensor, cover: Tensor) -> Tensor:
    """Half of them on white, a quarter on a colour, a quarter on a blur of colours."""
    count = len(colours)
    kind = torch.rand(count, 1, 1, 1)
    blur = F.interpolate(torch.rand(count, 3, 4, 4), size=SIZE, mode="bilinear")
    ground = torch.where(kind < 0.5, torch.ones(()), torch.where(kind < 0.75, torch.rand(count, 3, 1, 1), blur))
    return colours + (1 - cover) * ground


# ---- model ----


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's own kind: lower case, byte-level BPE, ``</w>`` at the end of a word."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    bpe.normalizer = normalizers.Sequence(steps)
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    merges, vocabulary = [tuple(merge) for merge in state["merges"]], state["vocab"]
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=cast(Any, merges), model_max_length=77)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """2.8 million parameters, 11 MB."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = CLIPConfig(
        text_config=text | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=vision | {"image_size": SIZE, "patch_size": PATCH},
        projection_dim=192,
        logit_scale_init_value=math.log(1 / 0.07),
    )
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if "patch_embedding" in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.ndim == 2:  # residual branches start small, as in GPT-2
            nn.init.normal_(parameter, std=0.007 if name.endswith(("out_proj.weight", "fc2.weight")) else 0.02)
    return model


# ---- run ----


def main() -> None:
    """Train, print what the model knows, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    parser.add_argument("--epochs", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for source in (CLIPART / "png", CLIPART / "svg", FASHION):
        if not source.exists():
            raise SystemExit(f"{source} is missing: apt install openclipart-png openclipart-svg dataset-fashion-mnist")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    console, started = Console(), time.monotonic()
    emoji, clipart, fashion = read_emoji(), read_clipart(), read_fashion()
    pairs = [*emoji * EMOJI_REPEATS, *clipart, *fashion]
    console.print(f"{len(emoji)} emoji, {len(clipart)} drawings, {len(fashion)} product pictures")

    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(
        [text for _, name, keywords in [*emoji, *clipart, *fashion] for text in (name, *keywords)]
    )
    square = {"height": SIZE, "width": SIZE}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square), tokenizer)
    model = build_model(tokenizer)
    trainer = CLIPTrainer(
        model,
        training_arguments(options.output, options.epochs, options.seed),
        train_dataset=Drawings(pairs),
        processing_class=processor,
        data_collator=DrawingCollator(processor, options.seed),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressReport(console, "pre-training"))
    trainer.train()
    save_model(unfuse(model), processor, options.output)
    scores = evaluate_retrieval(model, processor, noto())
    console.print({name: round(value, 3) for name, value in scores.items()})
    console.print(f"{options.output} in {(time.monotonic() - started) / 60:.0f} min")


def training_arguments(output: Path, epochs: float, seed: int) -> CLIPTrainingArguments:
    """The recipe: a high rate, for weights that start at random."""
    return CLIPTrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        warmup_steps=200,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        seed=seed,
        dataloader_drop_last=True,
        save_strategy="no",
        logging_steps=20,
        disable_tqdm=True,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )


if __name__ == "__main__":
    main()
