"""Pictures a second that one core decodes and prepares: clipft's collator, Hugging Face's processor, torchvision.

    [CLIPFT_DATA=FOLDER] python benchmarks/loader.py [--pictures 24] [--repeats 5]

One process, one thread, JPEG files (quality 90) of several sizes to 224 px, in turn. "As in use" is resize and centre
crop, where clipft and the processor give the same pixels, bit for bit. "Random crop" is a crop of at least half of the
area and a mirror image, where the peer is torchvision's transforms as transformers' contrastive-image-text example has
them, on the decoded picture; clipft decodes a JPEG at the scale that the crop needs. All read the same rows of a
``datasets.Dataset``. With CLIPFT_DATA pictures of each folder there are read too.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import interleave, machine, ratio, save, summary
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision.transforms import v2
from transformers import CLIPImageProcessor

from clipft.data.rows import PairRows
from clipft.data.transforms import Augmentation, build_transform

SIDE = 224
SIZES = ((256, 256), (640, 480), (1280, 960), (2560, 1920))
SMALLEST, MIRROR = 0.5, 0.5
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Competitors = dict[str, Callable[[], object]]


def drawn(folder: Path, width: int, height: int, count: int) -> list[str]:
    """Smooth pictures with grain, about as costly to decode as photographs."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = generator.integers(-12, 13, picture.shape, dtype=np.int16)
        paths.append(str(folder / f"{width}x{height}-{number}.jpg"))
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def sets(folder: Path, count: int) -> dict[str, list[str]]:
    """Files by the name of their set."""
    found = {f"{width} x {height}": drawn(folder, width, height, count) for width, height in SIZES}
    if data := os.environ.get("CLIPFT_DATA"):
        for real in sorted(path for path in Path(data).iterdir() if path.is_dir()):
            files = sorted(real.rglob("*.jpg"))
            found[real.name] = [str(path) for path in files[:: max(len(files) // count, 1)][:count]]
    return found


def competitors(paths: list[str]) -> dict[str, Competitors]:
    """By task. Each returns the pixels of all pictures."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": paths, "caption": ["a picture"] * len(paths)}, features=features)
    rows, processor = PairRows(data, encoded=True), CLIPImageProcessor()
    augmentation = Augmentation(random_resized_crop=SMALLEST, horizontal_flip=MIRROR)
    bicubic = v2.InterpolationMode.BICUBIC
    finish = (v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
    plain = v2.Compose([v2.PILToTensor(), v2.Resize(SIDE, bicubic), v2.CenterCrop(SIDE), *finish])
    crop = v2.RandomResizedCrop(SIDE, (SMALLEST, 1.0), interpolation=bicubic)
    augmented = v2.Compose([v2.PILToTensor(), crop, v2.RandomHorizontalFlip(MIRROR), *finish])

    def ours(transform: Any) -> Callable[[], object]:
        return lambda: [transform(rows[index]["image"]) for index in range(len(rows))]

    def theirs(transform: Any) -> Callable[[], object]:
        return lambda: [transform(data[index]["image"].convert("RGB")) for index in range(len(data))]

    def one(picture: Image.Image) -> torch.Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    return {
        "as in use": {
            "clipft": ours(build_transform(processor)),
            "processor": theirs(one),
            "torchvision": theirs(plain),
        },
        "random crop": {"clipft": ours(build_transform(processor, augmentation)), "torchvision": theirs(augmented)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine(), "pictures": options.pictures, "sets": {}}
    table = Table("JPEG files", "task", "clipft", "processor", "torchvision", "over processor", "over torchvision")
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in sets(Path(folder), options.pictures).items():
            results["sets"][name] = {}
            for task, runs in competitors(paths).items():
                if task == "as in use":
                    pairs = zip(runs["clipft"](), runs["processor"](), strict=True)  # type: ignore[call-overload]
                    assert all(torch.equal(one, other) for one, other in pairs), name
                seconds = interleave(runs, options.repeats)
                over = {peer: ratio(seconds[peer], seconds["clipft"]) for peer in runs if peer != "clipft"}
                results["sets"][name][task] = {
                    "seconds": {run: summary(times) for run, times in seconds.items()},
                    "pictures_per_second": {run: len(paths) / min(times) for run, times in seconds.items()},
                    "times_as_fast_as": over,
                }
                rates = results["sets"][name][task]["pictures_per_second"]
                shown = [f"{rates[run]:.0f}" if run in rates else "" for run in ("clipft", "processor", "torchvision")]
                ratios = [f"{over[p]['median']:.2f}" if p in over else "" for p in ("processor", "torchvision")]
                table.add_row(name, task, *shown, *ratios)
    Console(width=110).print(table)
    print(save("loader", results))


if __name__ == "__main__":
    main()
