"""What is not normal in a picture, and where, by normal pictures: how far its patches are from theirs.

After PatchCore (arXiv:2106.08265): what two layers of the image tower give for each patch, the nearest of a coreset of
normal patches. Features are measured by how much they vary among normal patches, and distances by those of normal
pictures that were left out. A picture is looked at through windows of two sizes, for a ViT sees all in few patches;
they overlap, and so do what PatchCore's means over neighbours do. By words: ``detector``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from clipft.errors import line_of
from clipft.files import check_file, writing
from clipft.inference.encode import encoder_of
from clipft.inference.patches import PatchTower, to_map, windows_of

__all__ = ["PROJECTED", "Anomaly", "Level", "PatchMemory", "coreset_of", "zooms_of"]

Array = NDArray[np.float32]
PROJECTED = 128  # dimensions in which a coreset is chosen
_KEY = "clipft_memory"  # of a file's metadata
_MOST_SEEN = 100_000  # patches of normal pictures that are held while a memory is made, at each zoom
_MOST_KEPT = 5_000  # of them in the memory, at each zoom
_LEFT_OUT = 50  # normal pictures that are held against the others
_FEWEST = 2  # normal pictures
_RARE = 0.95  # share of normal pictures, left out, whose score is below 0.5
_PATCHES = 18  # along a picture's shorter side
_MOST_ZOOM = 4.0  # unless somebody asks for more
_ZOOM_LIMIT = 16.0  # of a file's
_LARGEST = 1e9  # number in a file
_TENSORS = ("patches", "mean", "std")  # of a level, in a file


@dataclass(frozen=True)
class Anomaly:
    """What was found in a picture.

    Attributes:
        score: of the whole picture, in [0, 1]; higher is less normal.
        map: [H, W] float32 in [0, 1], of each of its pixels, in its own coordinates.
    """

    score: float
    map: Array


@dataclass(frozen=True)
class Level:
    """Patches of normal pictures, seen through windows of one size.

    Attributes:
        zoom: how many times smaller than the picture the windows are.
        patches: [M, F], each feature less its ``mean`` [F], over its ``std`` [F], among normal patches.
        typical: distance of a normal picture's patches to those of the others, in the mean.
    """

    zoom: float
    patches: Tensor
    mean: Tensor
    std: Tensor
    typical: float

    def described(self, features: Tensor) -> Tensor:
        """[..., F], so that their distances are those of the memory."""
        return (features - self.mean) / (self.std * features.shape[-1] ** 0.5)


@dataclass(frozen=True)
class PatchMemory:
    """What normal pictures look like to a model, and how far others are from it: :meth:`fit` or :meth:`load`, then
    :meth:`score` for each picture.

    Attributes:
        levels: one for each zoom.
        layers: of the image tower, counted from 1.
        normal_scores: of normal pictures, each held against the others, before they are put between 0 and 1.
        pictures: how many normal ones were seen.
        coreset, seed: see :meth:`fit`.
        model: its name, for messages.
        identity: of its weights and preprocessing.
    """

    levels: tuple[Level, ...]
    layers: tuple[int, ...]
    normal_scores: tuple[float, ...]
    pictures: int
    coreset: float
    seed: int
    model: str
    identity: str

    # ---- making one ----

    @classmethod
    def fit(
        cls,
        model: Any,
        processor: Any,
        pictures: Iterable[Any],
        *,
        zoom: float | None = None,
        coreset: float = 0.1,
        seed: int = 0,
        name: str = "",
    ) -> PatchMemory:
        """A memory of normal pictures.

        Args:
            model, processor: as :func:`clipft.load` gives them, of a family whose image tower is a ViT.
            pictures: two or more, PIL pictures or :class:`clipft.data.pictures.EncodedPicture`; a handful is enough to
                begin with.
            zoom: how many times smaller than the picture the windows are that it is seen through, besides those of
                twice the size; default: see :func:`zooms_of`.
            coreset: share of the patches that is kept, in (0, 1]; at most 5000 at each zoom.
            seed: of the choice.
            name: of the model, for messages.

        Raises:
            ValueError: fewer than two pictures, or a model without patches.
        """
        tower = PatchTower(model, processor)
        layers, zooms = _layers_of(tower.depth), zooms_of(zoom, tower.grid)
        seen = _Seen(tower, layers, zooms, seed)
        for picture in pictures:
            seen.add(picture)
        if seen.pictures < _FEWEST:
            raise ValueError(
                f"normal: expected at least {_FEWEST} normal pictures, found {seen.pictures}: each is held against the "
                "others"
            )
        made = [_level_of(zoom, own, coreset, seed) for zoom, own in zip(zooms, seen.found, strict=True)]
        levels = tuple(level for level, _ in made)
        scores = _left_out(levels, seen.found, [owners for _, owners in made])
        identity = encoder_of(model, processor, 1).identity()
        return cls(levels, layers, scores, seen.pictures, coreset, seed, name, identity)

    def extended(self, model: Any, processor: Any, pictures: Iterable[Any]) -> PatchMemory:
        """A memory of more normal pictures, one or more: its own patches, and of the new ones those that are farthest
        from all; what features and distances are measured by stays.

        Raises:
            ValueError: no picture.
        """
        seen = _Seen(PatchTower(model, processor), self.layers, [level.zoom for level in self.levels], self.seed)
        for picture in pictures:
            seen.add(picture)
        if not seen.pictures:
            raise ValueError("normal: expected at least one normal picture, found none")
        made = [_grown(level, own, self.coreset, self.seed) for level, own in zip(self.levels, seen.found, strict=True)]
        levels = tuple(level for level, _ in made)
        scores = _left_out(levels, seen.found, [owners for _, owners in made])
        return replace(
            self,
            levels=levels,
            normal_scores=(*self.normal_scores, *scores),
            pictures=self.pictures + seen.pictures,
        )

    # ---- use ----

    def check(self, model: Any, processor: Any) -> None:
        """That the memory is one of this model.

        Raises:
            ValueError: it is of another one, which is named.
        """
        if encoder_of(model, processor, 1).identity() != self.identity:
            raise ValueError(
                f"memory: expected a memory of this model, found one of {self.model or 'another'}, whose weights or "
                "preprocessing differ: make it anew from the normal pictures"
            )
        tower = PatchTower(model, processor)
        width = len(self.layers) * int(tower.model.config.vision_config.hidden_size)
        if max(self.layers) > tower.depth or any(level.patches.shape[1] != width for level in self.levels):
            raise ValueError(f"memory: expected {width} numbers a patch of at most {tower.depth} layers: it is damaged")

    def score(self, model: Any, processor: Any, picture: Any) -> Anomaly:
        """How far a picture is from normal, where; ``model`` and ``processor`` are those of :meth:`fit`."""
        return self.look(PatchTower(model, processor), picture)

    def look(self, tower: PatchTower, picture: Any) -> Anomaly:
        """As :meth:`score`, by a tower that is there already."""
        pixels = tower.pixels(picture)
        height, width = pixels.shape[-2:]
        total, scores = torch.zeros(height, width), []
        for level in self.levels:
            windows = windows_of(height, width, level.zoom)
            features = level.described(_features(tower, pixels, level.zoom, self.layers))
            distances = _nearest(features.flatten(0, 2), level.patches).unflatten(0, features.shape[:3]) / level.typical
            total += to_map(distances, windows, (height, width))
            scores.append(float(distances.max()))
        score = float(self._share(np.float32(np.mean(scores))))
        return Anomaly(score, self._share(total.numpy() / len(self.levels)))

    def _share(self, value: Any) -> Any:
        """A distance in [0, 1): 0.5 where all but a few normal pictures, held against the others, stay below."""
        edge = np.float32(np.quantile(self.normal_scores, _RARE))
        return value / (value + edge)

    def line(self) -> str:
        """What it is, for people."""
        patches = sum(len(level.patches) for level in self.levels)
        return f"{patches} patches of {self.pictures} normal pictures"

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """As one safetensors file, which appears whole."""
        about = {
            "zooms": [level.zoom for level in self.levels],
            "typical": [level.typical for level in self.levels],
            **{name: getattr(self, name) for name in _ABOUT},
        }
        tensors = {
            f"{number}.{name}": getattr(level, name).contiguous().numpy()
            for number, level in enumerate(self.levels)
            for name in _TENSORS
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with writing(Path(path)) as staged:
            save_file(tensors, staged, metadata={_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> PatchMemory:
        """A file of :meth:`save`.

        Raises:
            FileNotFoundError: there is none. ValueError: it is something else, or damaged.
        """
        path = Path(path)
        check_file(path)
        try:
            with safe_open(path, "pt") as file:
                about = _checked(json.loads((file.metadata() or {})[_KEY]))
                zooms, typical = about.pop("zooms"), about.pop("typical")
                levels = [
                    _read_level(file, number, *own) for number, own in enumerate(zip(zooms, typical, strict=True))
                ]
            return cls(levels=tuple(levels), **about)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected a memory of normal pictures, which clipft anomaly wrote; the file is damaged or "
                f"something else ({line_of(error)})"
            ) from error


# ---- what a file holds ----


def _numbers(value: Any) -> bool:
    """A list of numbers above 0, at least one."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one < _LARGEST for one in value)


_ABOUT: dict[str, Callable[[Any], bool]] = {
    "layers": lambda v: _numbers(v) and all(isinstance(one, int) for one in v),
    "normal_scores": _numbers,
    "pictures": lambda v: isinstance(v, int) and 0 < v < _LARGEST,
    "coreset": lambda v: isinstance(v, float) and 0 < v <= 1,
    "seed": lambda v: isinstance(v, int) and 0 <= v < 1 << 63,
    "model": lambda v: isinstance(v, str),
    "identity": lambda v: isinstance(v, str),
}


def _checked(about: Any) -> dict[str, Any]:
    """The description of a memory, of whoever wrote it."""
    checks = {
        "zooms": lambda v: _numbers(v) and all(1 <= one <= _ZOOM_LIMIT for one in v),
        "typical": _numbers,
        **_ABOUT,
    }
    if not isinstance(about, dict) or about.keys() != checks.keys():
        raise ValueError(f"expected {', '.join(checks)} in its description")
    for name, good in checks.items():
        if not good(about[name]):
            raise ValueError(f"{name} in its description")
    return about | {name: tuple(about[name]) for name in ("layers", "normal_scores")}


def _read_level(file: Any, number: int, zoom: float, typical: float) -> Level:
    slices = [file.get_slice(f"{number}.{name}") for name in _TENSORS]
    (count, width), *others = (tuple(one.get_shape()) for one in slices)
    if count < 1 or others != [(width,), (width,)] or any(one.get_dtype() != "F32" for one in slices):
        raise ValueError(f"expected float32 patches [M, F], mean [F] and std [F] at zoom {zoom:g}")
    patches, mean, std = (file.get_tensor(f"{number}.{name}") for name in _TENSORS)
    if not all(bool((one.abs() < _LARGEST).all()) for one in (patches, mean, std)) or not bool((std > 0).all()):
        raise ValueError(f"expected finite numbers, and deviations above 0, at zoom {zoom:g}")
    return Level(zoom, patches, mean, std, typical)


# ---- features ----


def _layers_of(depth: int) -> tuple[int, ...]:
    """Three quarters up and the last, counted from 1."""
    return tuple(sorted({max(3 * depth // 4, 1), depth}))


def zooms_of(zoom: float | None, grid: Sequence[int]) -> list[float]:
    """Of the windows, and of those twice as large. None: such that 18 patches lie along a picture's shorter side, as
    pays with the demo's model, or as many as the model sees."""
    zoom = min(max(_PATCHES / min(grid), 1.0), _MOST_ZOOM) if zoom is None else float(zoom)
    return sorted({max(zoom / 2, 1.0), zoom})


def _features(tower: PatchTower, pixels: Tensor, zoom: float, layers: Sequence[int]) -> Tensor:
    """[N, rows, columns, F] of the windows: each patch in each layer."""
    height, width = pixels.shape[-2:]
    return torch.cat(tower.features(pixels, windows_of(height, width, zoom), layers), dim=-1)


class _Seen:
    """Patches of normal pictures, each picture's own, in bounded memory: of very many all pictures keep a share.

    Attributes:
        found: by zoom and picture [n, F].
        pictures: how many.
    """

    def __init__(self, tower: PatchTower, layers: Sequence[int], zooms: Sequence[float], seed: int) -> None:
        self.tower, self.layers, self.zooms = tower, layers, zooms
        self.found: list[list[Tensor]] = [[] for _ in zooms]
        self.pictures = 0
        self._shares = [1.0 for _ in zooms]
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, picture: Any) -> None:
        """The patches of one more."""
        pixels = self.tower.pixels(picture)
        self.pictures += 1
        for number, (zoom, own) in enumerate(zip(self.zooms, self.found, strict=True)):
            own.append(self._some(_features(self.tower, pixels, zoom, self.layers).flatten(0, 2), self._shares[number]))
            if sum(map(len, own)) > _MOST_SEEN:
                self._shares[number] /= 2
                own[:] = [self._some(patches, 0.5) for patches in own]

    def _some(self, patches: Tensor, share: float) -> Tensor:
        if share == 1:
            return patches
        return patches[torch.randperm(len(patches), generator=self._generator)[: max(round(share * len(patches)), 1)]]


def _level_of(zoom: float, found: Sequence[Tensor], coreset: float, seed: int) -> tuple[Level, Tensor]:
    """A level of normal pictures' patches, and of each patch that it keeps the picture."""
    features = torch.cat(list(found))
    std = features.std(0, correction=0)
    level = Level(zoom, features[:0], features.mean(0), std.clamp(min=max(float(std.mean()) * 1e-3, 1e-6)), 1.0)
    points = level.described(features)
    kept = coreset_of(points, _kept(coreset, len(points)), seed)
    owners = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(own) for own in found]))[kept]
    level = replace(level, patches=points[kept])
    distances = [_without(level, own, owners != number) for number, own in _some_of(found)]
    typical = float(torch.cat(distances).mean())
    return replace(level, typical=max(typical, 1e-6)), owners


def _grown(level: Level, found: Sequence[Tensor], coreset: float, seed: int) -> tuple[Level, Tensor]:
    """A level with the patches of more pictures; of each patch the picture, -1 for those of before."""
    points = level.described(torch.cat(list(found)))
    kept = coreset_of(points, _kept(coreset, len(points)), seed, known=level.patches)
    owners = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(own) for own in found]))[kept]
    before = torch.full((len(level.patches),), -1)
    return replace(level, patches=torch.cat([level.patches, points[kept]])), torch.cat([before, owners])


def _kept(coreset: float, count: int) -> int:
    return min(max(round(coreset * count), 1), _MOST_KEPT)


def _some_of(found: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """At most ``_LEFT_OUT`` pictures, evenly spread, with their numbers."""
    step = max(len(found) / _LEFT_OUT, 1.0)
    numbers = [int(place * step) for place in range(min(len(found), _LEFT_OUT))]
    return [(number, found[number]) for number in numbers]


def _without(level: Level, features: Tensor, others: Tensor) -> Tensor:
    """Distances of a picture's patches to those of the memory that are of others; of all where there are none."""
    return _nearest(level.described(features), level.patches[others] if bool(others.any()) else level.patches)


def _left_out(
    levels: Sequence[Level], found: Sequence[Sequence[Tensor]], owners: Sequence[Tensor]
) -> tuple[float, ...]:
    """The scores of normal pictures, each held against the others."""
    scores = [
        [float(_without(level, features, own != number).max()) / level.typical for number, features in _some_of(seen)]
        for level, seen, own in zip(levels, found, owners, strict=True)
    ]
    return tuple(max(float(score), 1e-6) for score in np.mean(scores, axis=0))


# ---- distances ----


def _nearest(points: Tensor, memory: Tensor) -> Tensor:
    """[N]: the distance of each of N points to the nearest of the memory."""
    return torch.cat([torch.cdist(part, memory).amin(1) for part in points.split(4096)])


def coreset_of(
    points: Tensor, count: int, seed: int = 0, *, dims: int = PROJECTED, known: Tensor | None = None
) -> Tensor:
    """Points such that none of the others is far from all of them: always the next is the farthest from those chosen so
    far (greedy k-centre), in a random projection, which keeps distances (Johnson and Lindenstrauss).

    Args:
        points: [N, F].
        count: how many, at most N.
        seed: of the projection, and of the first one.
        dims: of the projection.
        known: [K, F], chosen before.

    Returns:
        [count] their numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    every = points if known is None else torch.cat([points, known])
    if every.shape[1] > dims:
        every = every @ (torch.randn(every.shape[1], dims, generator=generator) / dims**0.5)
    points, squares = every[: len(points)], every[: len(points)].square().sum(1)
    nearest = torch.full((len(points),), torch.inf)
    chosen = [] if known is not None else [int(torch.randint(len(points), (), generator=generator))]
    if known is not None:
        nearest = _nearest(points, every[len(points) :]).square()
        chosen.append(int(nearest.argmax()))
    while len(chosen) < min(count, len(points)):
        centre = points[chosen[-1]]
        distances = torch.addmv(squares, points, centre, alpha=-2).add_(centre.square().sum())
        torch.minimum(nearest, distances, out=nearest)
        nearest[chosen[-1]] = -1  # which rounding may leave above others
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
