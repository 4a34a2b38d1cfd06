"""What the base model is shown: Noto's emoji, openclipart's drawings and Fashion-MNIST with their names, photographs
without.

Needs the Debian packages openclipart-png, openclipart-svg and dataset-fashion-mnist; the photographs (of the public
domain or CC0, and two CC BY) come with scikit-image and scikit-learn.
"""

from __future__ import annotations

import gzip
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipft.data.drawings import decode, read_pictures

SIZE = 96  # pixels of a drawing's side, and of what the model sees
FASHION_COUNT = 6000

CLIPART = Path("/usr/share/openclipart")
FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
NAMESPACES = {"dc": "http://purl.org/dc/elements/1.1/", "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#"}


class Drawing(NamedTuple):
    """A picture with its transparency and what it shows."""

    pixels: Tensor  # [4, SIZE, SIZE] uint8
    name: str
    keywords: list[str]


def check() -> None:
    """Say what to install, if something is missing."""
    for source in (CLIPART / "png", CLIPART / "svg", FASHION):
        if not source.exists():
            raise SystemExit(f"{source} is missing: apt install openclipart-png openclipart-svg dataset-fashion-mnist")


def read_emoji() -> list[Drawing]:
    """The drawings inside the package."""
    return [Drawing(_square(decode(row)), row["name"], row["keywords"]) for row in read_pictures()]


def read_clipart() -> list[Drawing]:
    """Openclipart's public-domain drawings, with their title and tags; without the stars and gradients by the dozen."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
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
    drawings = []
    for relative, title, tags in found:
        name = _words(relative.stem if uses[title] > 3 or " - " in title else title)
        try:
            picture = Image.open((CLIPART / "png" / relative).with_suffix(".png"))
        except Image.DecompressionBombError:  # the few of a hundred million pixels
            continue
        if name:
            drawings.append(Drawing(_square(picture), name, tags))
    return drawings


def _is_public_domain(work: ElementTree.Element) -> bool:
    licences = [value for e in work if e.tag.endswith("}license") for value in e.attrib.values()]
    return any("ublic" in value for value in licences)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^a-z]+", " ", text.lower()).split())


def read_fashion() -> list[Drawing]:
    """The first product pictures of Fashion-MNIST, black turned to transparent."""
    pixels = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    classes = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    drawings = []
    for index, grey in enumerate(np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[:FASHION_COUNT]):
        image = Image.fromarray(grey).convert("RGBA")
        image.putalpha(Image.fromarray(np.minimum(grey.astype(np.int32) * 8, 255).astype(np.uint8)))
        drawings.append(Drawing(_square(image), FASHION_CLASSES[classes[index]], ["clothing", "fashion"]))
    return drawings


def read_photographs() -> list[Tensor]:
    """[3, H, W] uint8 each."""
    import skimage
    import sklearn.datasets

    files = [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
    files += sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    return [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]


def _square(picture: Image.Image) -> Tensor:
    """The picture in the middle of a transparent square."""
    picture = picture.convert("RGBA")
    scale = SIZE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    square = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    square.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
