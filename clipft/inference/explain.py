"""Where in a picture a model finds what texts say: the similarity of texts and patches, as a map of the picture.

A ViT sees a picture in few patches, and knows best what fills what it sees. So a picture is looked at through windows
that overlap (``clipft.inference.patches``), each as large as the things that are looked for; of each the patches
(``clipft.families.value_path``) and the whole are compared with the texts, and the maps of all windows are joined. They
lie over all of the picture, beyond what a centre crop would leave of it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from clipft.families.family import Family
from clipft.families.registry import FAMILIES, family_of
from clipft.inference.encode import embed_texts
from clipft.inference.patches import PatchTower, to_map, windows_of

__all__ = ["BACKGROUND", "ZOOM", "Box", "Explanation", "Locator", "boxes_of", "check_model"]

Maps = NDArray[np.float32]

BACKGROUND = ("", "a photo", "background", "nothing", "a plain background", "texture")
ZOOM = 4.0
_BATCH = 32  # texts at a time


@dataclass(frozen=True)
class Box:
    """A part of a picture where a text scores above the threshold: its pixels from ``left``, ``top`` to before
    ``right``, ``bottom``; ``score``: the highest in it."""

    left: int
    top: int
    right: int
    bottom: int
    score: float


@dataclass(frozen=True)
class Explanation:
    """Of one picture.

    Attributes:
        name: the picture's, for readers.
        texts: T, in the order given.
        scores: [T, H, W] float32 in [0, 1], in the picture's own pixels (upright, as viewers show it): the share of
            each text in a softmax over the texts and the background.
        boxes: of each text the parts above the threshold, the best first.
        picture: the picture itself.
    """

    name: str
    texts: tuple[str, ...]
    scores: Maps = field(repr=False)
    boxes: tuple[tuple[Box, ...], ...]
    picture: Image.Image = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Without the maps."""
        width, height = self.picture.size
        found = [
            {"text": text, "highest": float(scores.max()), "boxes": [vars(box) for box in boxes]}
            for text, scores, boxes in zip(self.texts, self.scores, self.boxes, strict=True)
        ]
        return {"image": self.name, "width": width, "height": height, "texts": found}


def check_model(model: Any) -> Family:
    """The family of a model whose image tower has patches that texts can be compared with.

    Raises:
        ValueError: it has none. TypeError: no model of a family, or ONNX encoders.
    """
    family = family_of(model)
    if family.vision.embed_patches is None:
        able = ", ".join(one.title for one in FAMILIES if one.vision.embed_patches is not None)
        raise ValueError(f"model: maps are for ViTs as of {able}; {family.title} has no patches to compare with texts")
    return family


class Locator:
    """Maps of where texts are, by one model.

    Args:
        model: of a family that :func:`check_model` takes, in float or int8, with adapters or without.
        processor: the model's.
        texts: T strings, which compete with each other and with ``background``; or their embeddings [T, D], at length
            1, where these are known.
        background: texts of what is not looked for.
        zoom: how many times smaller than the picture's shorter side the windows are, 1 or more.

    Raises:
        ValueError, TypeError: of :func:`check_model`.
    """

    of_patch = 0.5  # a patch's part of a cosine; the rest is its window's

    def __init__(
        self,
        model: Any,
        processor: Any,
        texts: Sequence[str] | Tensor,
        *,
        background: Sequence[str] = BACKGROUND,
        zoom: float = ZOOM,
    ) -> None:
        check_model(model)
        self.zoom, self.tower = zoom, PatchTower(model, processor)
        shown = texts if isinstance(texts, Tensor) else embed_texts(model, processor, texts, _BATCH)
        self.count = len(shown)
        self.embeds = torch.cat([shown, embed_texts(model, processor, background, _BATCH)])

    def __call__(self, picture: Image.Image) -> Maps:
        """[T, H, W] float32 in [0, 1]."""
        pixels = self.tower.pixels(picture)
        height, width = pixels.shape[-2:]
        windows = windows_of(height, width, self.zoom)
        patches, whole = self.tower.embeddings(pixels, windows)
        scale = self.tower.model.logit_scale.detach().float().exp().reshape(()).cpu()
        cosines = (self.of_patch * patches + (1 - self.of_patch) * whole[:, None, None]) @ self.embeds.t()
        shares = (scale * cosines).softmax(-1)[..., : self.count]
        return torch.stack([to_map(own, windows, (height, width)) for own in shares.unbind(-1)]).numpy()

    def boxes(self, scores: Maps, threshold: float) -> tuple[tuple[Box, ...], ...]:
        """Of maps [T, H, W]: those of :func:`boxes_of`, without specks, which are less than a quarter of a patch."""
        window = windows_of(scores.shape[1], scores.shape[2], self.zoom)[0]
        patch = window.height * window.width / math.prod(self.tower.grid)
        return tuple(boxes_of(one, threshold, patch / 4) for one in scores)


def boxes_of(scores: Maps, threshold: float, least: float = 0) -> tuple[Box, ...]:
    """Around each connected part of a map [H, W] above the threshold, of ``least`` pixels or more, the highest score
    first.
    """
    parts, _ = ndimage.label(scores > threshold)
    found = [
        Box(columns.start, rows.start, columns.stop, rows.stop, float(scores[rows, columns][own].max()))
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), 1)
        for own in [parts[rows, columns] == number]
        if own.sum() >= least
    ]
    return tuple(sorted(found, key=lambda box: -box.score))
