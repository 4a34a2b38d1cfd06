"""Patches of pictures as features: what layers inside an image tower know of each place.

A picture is seen through square windows that overlap and cover all of it, each at the model's own size; a value for
each patch of each window becomes a map in the picture's own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipft.data.transforms import pixels_of, whole_transform
from clipft.families.forward import normalised
from clipft.families.registry import FAMILIES, base_model, family_of
from clipft.inference.encode import evaluating

__all__ = ["PatchTower", "Window", "to_map", "windows_of"]

_LONGEST = 16  # times its shorter side: what is longer is seen squeezed
_BATCH = 32  # windows at a time


@dataclass(frozen=True)
class Window:
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def windows_of(height: int, width: int, zoom: float) -> list[Window]:
    """Squares that cover a picture, ``zoom`` times smaller than its shorter side, each over half of the one before."""
    side = max(math.ceil(min(height, width) / zoom), 1)
    down, across = (min(max(side, math.ceil(length / (_LONGEST * zoom))), length) for length in (height, width))
    return [Window(top, left, down, across) for top in _starts(height, down) for left in _starts(width, across)]


def _starts(length: int, side: int) -> list[int]:
    """Of intervals of this length that cover ``range(length)``, half of them or more over the one before."""
    steps = math.ceil(2 * (length - side) / side)
    return [round(step * (length - side) / max(steps, 1)) for step in range(steps + 1)]


class PatchTower:
    """The image tower of a model, asked for its patches.

    Args:
        model: of a family whose image tower is a ViT with a fixed grid of patches, in float or int8.
        processor: the model's.

    Raises:
        TypeError: a model of none of the families. ValueError: one that has no such tower.

    Attributes:
        side: pixels of what it sees, height and width.
        grid: patches of that, down and across.
        vision: the tower, as its family describes it.
        depth: its layers.
        processor, transform: the image processor, and what it makes of pixels [3, h, w] uint8 of a window.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        family = family_of(model)
        if family.vision.tokens_before is None:
            able = ", ".join(one.title for one in FAMILIES if one.vision.tokens_before is not None)
            raise ValueError(
                f"model: expected one whose image tower has a fixed grid of patches ({able}), {family.title} has none "
                "that is known"
            )
        self.model, self.vision, self._before = base_model(model), family.vision, family.vision.tokens_before
        config = self.model.config
        _, *self.side = family.picture(config)
        self.grid = tuple(side // int(config.vision_config.patch_size) for side in self.side)
        self.depth = len(self.vision.paths_of_layers(self.model))
        self.processor = processor.image_processor
        self.transform = whole_transform(self.processor, *self.side)

    def pixels(self, picture: Any) -> Tensor:
        """Of a PIL picture, an array or an ``EncodedPicture``: [3, H, W] uint8."""
        return pixels_of(picture, self.processor)

    def features(self, pixels: Tensor, windows: Sequence[Window], layers: Sequence[int]) -> list[Tensor]:
        """What layers (counted from 1) give for N windows: of each layer [N, rows, columns, D] float32, on the CPU."""
        modules = self.vision.layers_of(self.model)
        found: list[list[Tensor]] = [[] for _ in layers]

        def keep(own: list[Tensor], module: Any, given: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            own.append(tokens[:, self._before :].float().cpu().unflatten(1, self.grid))

        with evaluating(self.model) as device, ExitStack() as hooks:
            for layer, own in zip(layers, found, strict=True):
                hooks.callback(modules[layer - 1].register_forward_hook(partial(keep, own)).remove)
            for batch in self._batches(pixels, windows):
                self.vision.module_of(self.model)(pixel_values=batch.to(device))
        return [torch.cat(own) for own in found]

    def embeddings(self, pixels: Tensor, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Of N windows at length 1, on the CPU: of their patches [N, rows, columns, D], and of themselves [N, D].

        Raises:
            ValueError: patches of this model's tower cannot be compared with texts.
        """
        if self.vision.embed_patches is None:
            raise ValueError("model: expected one whose patches can be compared with texts")
        found = []
        for batch in self._batches(pixels, windows):
            with evaluating(self.model) as device:
                parts = self.vision.embed_patches(self.model, batch.to(device))
            found.append([normalised(part).cpu() for part in parts])
        patches, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        return patches.unflatten(1, self.grid), whole

    def _batches(self, pixels: Tensor, windows: Sequence[Window]) -> Iterator[Tensor]:
        """[N, 3, h, w] as the model takes them."""
        for start in range(0, len(windows), _BATCH):
            parts = [
                pixels[:, one.top : one.top + one.height, one.left : one.left + one.width]
                for one in windows[start : start + _BATCH]
            ]
            yield torch.stack([self.transform(part) for part in parts])


def to_map(values: Tensor, windows: Sequence[Window], size: tuple[int, int]) -> Tensor:
    """Values of patches [N, rows, columns] of N windows as a map [H, W] of the picture: between the patches' centres
    linear, where windows overlap the mean, in which a window counts less towards its edge.
    """
    total, weight = torch.zeros(size), torch.zeros(size)
    for own, window in zip(values, windows, strict=True):
        shape = (window.height, window.width)
        grown = F.interpolate(own[None, None], shape, mode="bilinear", align_corners=False)[0, 0]
        down, across = (1 - torch.linspace(-1, 1, side + 2)[1:-1].abs() for side in shape)
        tent = down[:, None] * across
        place = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        total[place] += grown * tent
        weight[place] += tent
    return total / weight
