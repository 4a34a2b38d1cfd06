"""Patches of pictures as features: what layers inside an image tower know of each place.

A picture is seen through square windows that overlap and cover all of it, each at the model's own size; a value for
each patch of each window becomes a map in the picture's own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipft.data.transforms import pixels_of, whole_transform
from clipft.families.registry import base_model, family_of
from clipft.inference.encode import evaluating

__all__ = ["PatchTower", "Window", "to_map", "windows_of"]

_LONGEST = 16  # times its shorter side: what is longer is seen squeezed


@dataclass(frozen=True)
class Window:
    """A part of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def windows_of(height: int, width: int, count: int) -> list[Window]:
    """Squares that cover a picture, ``count`` along its shorter side and as many as it takes along the longer one,
    each overlapping the next by half or more.
    """
    short = min(height, width)
    side = max(math.ceil(2 * short / (count + 1)), 1)
    down, across = max(side, math.ceil(height / _LONGEST)), max(side, math.ceil(width / _LONGEST))
    down, across = min(down, height), min(across, width)
    return [Window(top, left, down, across) for top in _starts(height, down) for left in _starts(width, across)]


def _starts(length: int, side: int) -> list[int]:
    """Of intervals of this length that cover ``range(length)``, half of them or more over the one before."""
    steps = math.ceil(2 * (length - side) / side)
    return [round(step * (length - side) / max(steps, 1)) for step in range(steps + 1)]


class PatchTower:
    """The image tower of a model, asked for its patches.

    Attributes:
        side: pixels of its pictures, height and width.
        grid: patches of a picture, down and across.
        depth: its layers.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        """Raises:
        TypeError: not a model of torch, or of none of the families.
        ValueError: a model whose image tower has no fixed grid of patches.
        """
        self.model = base_model(model)
        family = family_of(model)
        self.tower = family.vision
        if self.tower.tokens_before is None:
            raise ValueError(
                f"model: expected an image tower that is a ViT with a fixed grid of patches (CLIP, SigLIP and their "
                f"kind), {family.title} has none that is known"
            )
        config = self.model.config
        _, *self.side = family.picture(config)
        self.grid = tuple(side // int(config.vision_config.patch_size) for side in self.side)
        self.paths = self.tower.paths_of_layers(self.model)
        self.depth = len(self.paths)
        self.processor = processor.image_processor
        self.transform = whole_transform(self.processor, *self.side)

    def views(self, picture: Any, windows: int) -> tuple[tuple[int, int], list[Window], Tensor]:
        """Height and width of a picture (PIL or as :func:`clipft.data.transforms.build_transform` takes it), its
        windows, and their pixels [N, 3, h, w]."""
        pixels = pixels_of(picture, self.processor)
        height, width = pixels.shape[-2:]
        found = windows_of(height, width, windows)
        parts = (pixels[:, one.top : one.top + one.height, one.left : one.left + one.width] for one in found)
        return (height, width), found, torch.stack([self.transform(part) for part in parts])

    def features(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """What these layers (from 0) give for pixels [N, 3, h, w]: [N, rows, columns, D] float32 each, on the CPU."""
        caught: dict[int, Tensor] = {}
        with evaluating(self.model) as device, self._catching(layers, caught):
            self.tower.module_of(self.model)(pixel_values=pixels.to(device))
        patches = [caught[layer][:, self.tower.tokens_before :].float().cpu() for layer in layers]
        return [tokens.unflatten(1, self.grid) for tokens in patches]

    @contextmanager
    def _catching(self, layers: Sequence[int], caught: dict[int, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in layers:

                def hook(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                    caught[layer] = output[0] if isinstance(output, tuple) else output

                handle = self.model.get_submodule(self.paths[layer]).register_forward_hook(hook)
                stack.callback(handle.remove)
            yield


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
