"""How well ``clipft anomaly`` tells defects on grey surfaces, with the demo's model, from normal pictures alone.

    [CLIPFT_DATA=FOLDER] python benchmarks/anomaly.py [--normal 30,4] [--seed 1]

Surfaces are generated, of 96 to 200 pixels a side: ground metal under uneven light, brushed metal, a weave, concrete;
with CLIPFT_DATA also parts of the radiographs in ``chest_xray/normal``. Each set has normal pictures to learn from, 20
others, and 4 with each of five kinds of defects, whose masks are known. AUROC of pictures and of pixels.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, save
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage, stats

import clipft
from clipft.inference.anomaly import PatchMemory
from clipft.inference.patches import PatchTower

Plane = NDArray[np.float64]
Generator = np.random.Generator
GOOD, EACH = 20, 4


def noise(rng: Generator, shape: tuple[int, int], scale: Any) -> Plane:
    """Gaussian noise of this correlation length, of deviation 1."""
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), scale, mode="wrap")
    return np.asarray(smooth / smooth.std(), np.float64)


# ---- surfaces ----


def ground(rng: Generator, shape: tuple[int, int]) -> Plane:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / max(shape) - 0.5
    light = rng.uniform(-40, 40) * y + rng.uniform(-40, 40) * x - rng.uniform(0, 60) * (x**2 + y**2)
    grain = rng.uniform(2, 6) * noise(rng, shape, 0.7) + rng.uniform(1, 5) * noise(rng, shape, (12, 0.8))
    return np.asarray(rng.uniform(60, 150) + light + grain + 3 * noise(rng, shape, 15))


def brushed(rng: Generator, shape: tuple[int, int]) -> Plane:
    strokes = 10 * noise(rng, shape, (0.5, 20)) + 4 * noise(rng, shape, 0.5)
    return rng.uniform(110, 160) + strokes + rng.uniform(4, 12) * noise(rng, shape, 40)


def weave(rng: Generator, shape: tuple[int, int]) -> Plane:
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 1.5 * noise(rng, shape, 20)
    period, (a, b) = 2 * np.pi / rng.uniform(7, 9), rng.uniform(0, 2 * np.pi, 2)
    threads = 25 * np.sin(period * x + a) * np.sin(period * y + b)
    return np.asarray(rng.uniform(100, 140) + threads + 6 * noise(rng, shape, 0.6))


def concrete(rng: Generator, shape: tuple[int, int]) -> Plane:
    pores = ndimage.gaussian_filter((noise(rng, shape, 1.5) > 2.9).astype(float), 0.8)
    grain = sum(8 * noise(rng, shape, scale) for scale in (1, 4, 16))
    return np.asarray(rng.uniform(120, 170) + grain - 50 * pores)


def radiograph(rng: Generator, shape: tuple[int, int]) -> Plane:
    files = sorted((Path(os.environ["CLIPFT_DATA"]) / "chest_xray" / "normal").iterdir())
    picture = Image.open(files[rng.integers(len(files))]).convert("L")
    scale = 512 / min(picture.size)
    pixels = np.asarray(picture.resize([int(side * scale) + 1 for side in picture.size]), np.float64)
    top, left = (rng.integers(0, whole - part) for whole, part in zip(pixels.shape, shape, strict=True))
    return pixels[top : top + shape[0], left : left + shape[1]].copy()


# ---- defects ----


def drawn(shape: tuple[int, int], draw: Callable[[Any], object]) -> Plane:
    """A mask in [0, 1], drawn at four times its size."""
    canvas = Image.new("L", (shape[1] * 4, shape[0] * 4))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.resize((shape[1], shape[0]), Image.Resampling.BOX), np.float64) / 255


def line(rng: Generator, shape: tuple[int, int], wild: float) -> Plane:
    angle, width = rng.uniform(0, 2 * np.pi), int(4 * rng.uniform(1, 2.5))
    points = [4 * rng.uniform(0.15, 0.85, 2) * shape[::-1]]
    for _ in range(rng.integers(8, 20)):
        angle += rng.normal(0, wild)
        points.append(points[-1] + 24 * np.array([np.cos(angle), np.sin(angle)]))
    return drawn(shape, lambda pen: pen.line([tuple(point) for point in points], fill=255, width=width))


def spot(rng: Generator, shape: tuple[int, int], low: float, high: float) -> Plane:
    turn = np.arange(24) / 24 * 2 * np.pi
    reach = 4 * rng.uniform(low, high) * min(shape) * (1 + 0.2 * np.sin(3 * turn + rng.uniform(0, 6)))
    middle = 4 * rng.uniform(0.15, 0.85, 2) * shape[::-1]
    outline = middle + reach[:, None] * np.stack([np.cos(turn), rng.uniform(0.5, 1) * np.sin(turn)], 1)
    return drawn(shape, lambda pen: pen.polygon([tuple(point) for point in outline], fill=255))


def crack(rng: Generator, pixels: Plane) -> tuple[Plane, Plane]:
    mask = line(rng, pixels.shape, 0.5)
    return pixels - mask * rng.uniform(25, 60), mask


def scratch(rng: Generator, pixels: Plane) -> tuple[Plane, Plane]:
    mask = line(rng, pixels.shape, 0.06)
    return pixels + mask * rng.uniform(30, 70), mask


def hole(rng: Generator, pixels: Plane) -> tuple[Plane, Plane]:
    mask = spot(rng, pixels.shape, 0.03, 0.12)
    return pixels * (1 - mask) + mask * (rng.uniform(15, 45) + 4 * rng.standard_normal(pixels.shape)), mask


def stain(rng: Generator, pixels: Plane) -> tuple[Plane, Plane]:
    mask = spot(rng, pixels.shape, 0.1, 0.25)
    return pixels + ndimage.gaussian_filter(mask, 3) * rng.choice([-1, 1]) * rng.uniform(12, 30), mask


def smear(rng: Generator, pixels: Plane) -> tuple[Plane, Plane]:
    mask = spot(rng, pixels.shape, 0.12, 0.25)
    return pixels * (1 - mask) + mask * ndimage.gaussian_filter(pixels, rng.uniform(2, 4)), mask


SURFACES = {"ground metal": ground, "brushed metal": brushed, "weave": weave, "concrete": concrete}
DEFECTS = (crack, scratch, hole, stain, smear)


# ---- scores ----


def auroc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    ranks, found = stats.rankdata(scores), int(labels.sum())
    return float((ranks[labels].sum() - found * (found + 1) / 2) / (found * (len(labels) - found)))


def measured(surface: Callable[..., Plane], counts: list[int], seed: int, model: Any, processor: Any) -> dict[str, Any]:
    """AUROC of pictures and of pixels, by the number of normal pictures."""
    rng = np.random.default_rng(seed)

    def picture(pixels: Plane) -> Image.Image:
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    def plain() -> Plane:
        return surface(rng, tuple(int(side) for side in rng.integers(96, 200, 2)))

    normal = [picture(plain()) for _ in range(max(counts))]
    shown = [(one, np.zeros(one.shape)) for one in (plain() for _ in range(GOOD))]
    shown += [defect(rng, plain()) for defect in DEFECTS for _ in range(EACH)]
    labels, masks = np.array([mask.any() for _, mask in shown]), [mask > 0.4 for _, mask in shown]
    tower, found = PatchTower(model, processor), {}
    for count in counts:
        memory = PatchMemory.fit(model, processor, normal[:count])
        each = [memory.look(tower, picture(pixels)) for pixels, _ in shown]
        pixels = auroc(np.concatenate([one.map.ravel() for one in each]), np.concatenate([m.ravel() for m in masks]))
        scores = np.array([one.score for one in each])
        above = {"normal": float((scores[~labels] > 0.5).mean()), "defects": float((scores[labels] > 0.5).mean())}
        found[str(count)] = {"image_auroc": auroc(scores, labels), "pixel_auroc": pixels, "above_half": above}
    return found


def main() -> None:
    """Runs and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", default="30,4")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.normal.split(",")]
    model, processor = clipft.load("demo")
    surfaces = SURFACES | ({"radiograph": radiograph} if "CLIPFT_DATA" in os.environ else {})
    sets = {}
    for name, surface in surfaces.items():
        sets[name] = measured(surface, counts, arguments.seed, model, processor)
        print(name, sets[name], flush=True)
    names = ("image_auroc", "pixel_auroc")
    mean = {c: {n: float(np.mean([own[c][n] for own in sets.values()])) for n in names} for c in map(str, counts)}
    print(mean)
    save("anomaly", {"machine": machine(), "arguments": vars(arguments), "sets": sets, "mean": mean})


if __name__ == "__main__":
    main()
