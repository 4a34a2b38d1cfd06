"""What is not normal in a picture: how far its patches are from those of normal pictures (PatchCore,
arXiv:2106.08265).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional as F

from clipft.errors import line_of, short
from clipft.files import check_file, writing
from clipft.inference.encode import encoder_of
from clipft.inference.patches import PatchTower, to_map

__all__ = ["Anomaly", "PatchMemory"]

Array = NDArray[np.float32]
_KEY = "clipft_memory"


@dataclass(frozen=True)
class Anomaly:
    """What was found in a picture.

    Attributes:
        score: of the whole picture; higher is less normal.
        map: [H, W] float32, of each of its pixels, in its own coordinates.
    """

    score: float
    map: Array


@dataclass(frozen=True)
class PatchMemory:
    """Patches of normal pictures, and the distance of others to them.

    Attributes:
        patches: [M, F] float32.
        model: its name, for messages.
        identity: of the model's weights and preprocessing.
        layers: which of the image tower's, from 0.
        windows: as :func:`clipft.inference.patches.windows_of` takes them.
        pictures: how many normal ones were seen.
    """

    patches: Array
    model: str
    identity: str
    layers: tuple[int, ...]
    windows: int
    pictures: int

    @classmethod
    def fit(
        cls,
        model: Any,
        processor: Any,
        pictures: Iterable[Any],
        *,
        windows: int = 1,
        coreset: float = 0.1,
        seed: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> PatchMemory:
        """A memory of normal pictures.

        Args:
            model, processor: as :func:`clipft.load` gives them, of a family whose image tower is a ViT.
            pictures: PIL pictures, or :class:`clipft.data.pictures.EncodedPicture`; a handful is enough to begin with.
            windows: windows along the shorter side of a picture, which overlap by half: 1 sees it as a whole, more see
                small things.
            coreset: share of the patches that is kept.
            seed: of the random projections that the choice is made in.
            progress: wraps the loop over pictures.

        Raises:
            ValueError: no picture, or a model without patches.
        """
        tower = PatchTower(model, processor)
        layers = _middle(tower.depth)
        found = [_described(tower, tower.views(one, windows)[2], layers).flatten(0, 2) for one in progress(pictures)]
        if not found:
            raise ValueError("normal: expected at least one normal picture, found none")
        patches = torch.cat(found)
        kept = coreset_of(patches, max(round(coreset * len(patches)), 1), seed)
        name = str(getattr(tower.model, "name_or_path", ""))
        identity = encoder_of(model, processor, 1).identity()
        return cls(patches[kept].numpy(), name, identity, layers, windows, len(found))

    def score(self, model: Any, processor: Any, picture: Any) -> Anomaly:
        """How far a picture is from normal; ``model`` and ``processor`` are those of :meth:`fit`."""
        tower = PatchTower(model, processor)
        size, windows, pixels = tower.views(picture, self.windows)
        features = _described(tower, pixels, self.layers)
        distances = _nearest(features.flatten(0, 2), torch.from_numpy(self.patches)).unflatten(0, features.shape[:3])
        return Anomaly(float(distances.max()), to_map(distances, windows, size).numpy())

    def check(self, model: Any, processor: Any) -> None:
        """That the memory is one of this model.

        Raises:
            ValueError: it is of another one, which is named.
        """
        if encoder_of(model, processor, 1).identity() != self.identity:
            raise ValueError(
                f"memory: expected a memory of this model, found one of {self.model or 'another'}, whose weights or "
                "preprocessing differ: fit it anew with the normal pictures"
            )

    def save(self, path: str | Path) -> None:
        """As one safetensors file, which appears whole."""
        about = asdict(replace(self, patches=np.empty(0, np.float32)))
        del about["patches"]
        with writing(Path(path)) as staged:
            save_file({"patches": self.patches}, staged, metadata={_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> PatchMemory:
        """A file of :meth:`save`.

        Raises:
            FileNotFoundError: there is none. ValueError: it is something else, or damaged.
        """
        path = Path(path)
        check_file(path)
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})[_KEY])
                patches = cast(Array, file.get_tensor("patches"))
            about["layers"] = tuple(about["layers"])
            return cls(patches, **about)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a memory of normal pictures ({short(line_of(error))})") from error


def _middle(depth: int) -> tuple[int, ...]:
    """The two layers in the middle of so many."""
    return tuple(sorted({max(depth // 2 - 1, 0), depth // 2}))


def _described(tower: PatchTower, pixels: Tensor, layers: Sequence[int]) -> Tensor:
    """[N, rows, columns, F]: each patch by the mean of its neighbours in each layer, at length 1."""
    parts = []
    for features in tower.features(pixels, layers):
        near = F.avg_pool2d(features.movedim(-1, 1), 3, 1, 1, count_include_pad=False)
        parts.append(F.normalize(near.movedim(1, -1), dim=-1))
    return torch.cat(parts, dim=-1) / len(layers) ** 0.5


def _nearest(points: Tensor, memory: Tensor) -> Tensor:
    """[N]: the distance of each of N points to the nearest of the memory."""
    return torch.cat([torch.cdist(part, memory).amin(1) for part in points.split(4096)])


def coreset_of(points: Tensor, count: int, seed: int = 0, dims: int = 128) -> Tensor:
    """Numbers [count] of points [N, F] such that none is far from all of these: greedily the farthest of those chosen
    so far (k-centre), in a random projection, which keeps distances (Johnson and Lindenstrauss).
    """
    generator = torch.Generator().manual_seed(seed)
    if points.shape[1] > dims:
        points = points @ (torch.randn(points.shape[1], dims, generator=generator) / dims**0.5)
    squares = points.square().sum(1)
    nearest = torch.full((len(points),), torch.inf)
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < min(count, len(points)):
        centre = chosen[-1]
        distances = torch.addmv(squares, points, points[centre], alpha=-2) + squares[centre]
        torch.minimum(nearest, distances, out=nearest)
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
