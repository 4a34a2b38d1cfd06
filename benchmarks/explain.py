"""Is what clipft.explain finds where it is? On scenes put together from the package's drawings, with the demo's model.

    python benchmarks/explain.py        # writes benchmarks/results/explain-<cpu>.json

A scene has drawings of known names at known places on some ground. For each drawing the map of its name is held against
its pixels: the area under the ROC curve over the scene's pixels, and the pointing game, whether the highest score is on
it. Priors, which know nothing of texts: the nearness to the middle, and the blurred edges of the picture. Maps of a
model with random weights should have nothing in common with the trained one's (Adebayo et al., arXiv:1810.03292): the
rank correlation over the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from torch.nn import functional as F

from clipft.data.drawings import decode, read_pictures
from clipft.demo import random_weights
from clipft.inference.explain import Locator, boxes_of
from clipft.models.loading import load

Maps = NDArray[np.float32]
SIZES = {"small": (4, 0.12, 0.2), "medium": (4, 0.22, 0.42), "large": (2, 0.42, 0.55)}  # drawings, shares of a side
SCENES, VARIANT_SCENES = 60, 20
STEP = 4  # pixels between those that are scored


# ---- scenes ----


@dataclass(frozen=True)
class Scene:
    """``masks``: [T, H, W] bool, the pixels of each of the drawings ``names``."""

    picture: Image.Image
    names: list[str]
    masks: NDArray[np.bool_]


def scenes(count: int, size: str = "medium", seed: int = 0, shape: tuple[int, int] = (192, 192)) -> list[Scene]:
    """Of height and width ``shape``."""
    rng, rows = np.random.default_rng(seed), read_pictures()
    return [_scene(rng, rows, shape, *SIZES[size]) for _ in range(count)]


def _scene(
    rng: Any, rows: list[dict[str, Any]], shape: tuple[int, int], count: int, least: float, most: float
) -> Scene:
    height, width = shape
    chosen, corners = [rows[i] for i in rng.choice(len(rows), count, replace=False)], []
    while len(corners) < count:
        side = int(rng.uniform(least, most) * min(shape))
        x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if all(x + side <= a or a + s <= x or y + side <= b or b + s <= y for a, b, s in corners):
            corners.append((x, y, side))
        elif rng.random() < 0.01:  # no room is left
            corners = []
    picture, masks = _ground(rng, height, width), []
    for row, (x, y, side) in zip(chosen, corners, strict=True):
        layer = Image.new("RGBA", (width, height))
        layer.paste(decode(row).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        picture = Image.alpha_composite(picture, layer)
        masks.append(np.asarray(layer)[..., 3] > 127)
    return Scene(picture.convert("RGB"), [row["name"] for row in chosen], np.stack(masks))


def _ground(rng: Any, height: int, width: int) -> Image.Image:
    """One colour, or blurs of several."""
    kind = rng.integers(3)
    cells = (1, 4, 12)[kind]
    colours = rng.integers((150, 90, 90)[kind], 256, (cells, cells, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")


# ---- what is measured ----


def auroc(scores: Maps, mask: NDArray[np.bool_]) -> float:
    """Share of the pairs of a pixel inside and one outside in which the one inside scores higher."""
    ranks, inside = rankdata(scores.ravel()), int(mask.sum())
    return float((ranks[mask.ravel()].sum() - inside * (inside + 1) / 2) / (inside * (mask.size - inside)))


def score(maps: Sequence[Maps], found: Sequence[Scene]) -> dict[str, float]:
    """``auroc`` and ``pointing``, means over the drawings."""
    pairs = [(m, mask) for own, one in zip(maps, found, strict=True) for m, mask in zip(own, one.masks, strict=True)]
    areas = [
        auroc(m[STEP // 2 :: STEP, STEP // 2 :: STEP], mask[STEP // 2 :: STEP, STEP // 2 :: STEP]) for m, mask in pairs
    ]
    hits = [bool(mask.ravel()[m.argmax()]) for m, mask in pairs]
    return {"auroc": float(np.mean(areas)), "pointing": float(np.mean(hits))}


def priors(found: Sequence[Scene]) -> dict[str, dict[str, float]]:
    """The same of maps that look at no text; the blur is the best of several."""
    centres, edges = [], {blur: [] for blur in (4, 8, 12, 20)}
    for one in found:
        height, width = one.masks.shape[1:]
        y, x = np.mgrid[:height, :width]
        distance = np.hypot((y + 0.5) / height - 0.5, (x + 0.5) / width - 0.5)
        centres.append(np.broadcast_to(-distance, one.masks.shape))
        steps = np.hypot(*np.gradient(np.asarray(one.picture.convert("L"), float)))
        for blur, maps in edges.items():
            maps.append(np.broadcast_to(gaussian_filter(steps, blur), one.masks.shape))
    scored = [score(maps, found) for maps in edges.values()]
    best = {name: max(one[name] for one in scored) for name in ("auroc", "pointing")}
    return {"centre": score(centres, found), "edges": best}


def correlation(maps: Sequence[Maps], others: Sequence[Maps]) -> dict[str, float]:
    """Rank correlations over a scene's pixels, a map each: their mean, and that of their sizes."""
    pairs = [pair for own, other in zip(maps, others, strict=True) for pair in zip(own, other, strict=True)]
    found = [spearmanr(*(m[STEP // 2 :: STEP, STEP // 2 :: STEP].ravel() for m in pair)).statistic for pair in pairs]
    return {"mean": float(np.mean(found)), "mean_of_sizes": float(np.mean(np.abs(found)))}


def boxes(maps: Sequence[Maps], found: Sequence[Scene], threshold: float = 0.5) -> dict[str, float]:
    """Share of the drawings with a box, and with one whose best overlaps theirs by half or more (IoU)."""
    pairs = [(m, mask) for own, one in zip(maps, found, strict=True) for m, mask in zip(own, one.masks, strict=True)]
    best = [(next(iter(boxes_of(m, threshold)), None), mask) for m, mask in pairs]
    right = [box is not None and _overlap(box, mask) >= 0.5 for box, mask in best]
    return {"found": float(np.mean([box is not None for box, _ in best])), "right": float(np.mean(right))}


def _overlap(box: Any, mask: NDArray[np.bool_]) -> float:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    own, other = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    other[box.top : box.bottom, box.left : box.right] = True
    return float((own & other).sum() / (own | other).sum())


def maps_of(
    model: Any, processor: Any, found: Sequence[Scene], *, alone: bool = False, kind: Any = Locator, **options: Any
) -> list[Maps]:
    """[T, H, W] for each scene: its names together, or each ``alone`` against the background."""
    maps = []
    for one in found:
        groups = [[name] for name in one.names] if alone else [one.names]
        maps.append(np.concatenate([kind(model, processor, names, **options)(one.picture) for names in groups]))
    return maps


# ---- other ways to look ----


class Variant(Locator):
    """With another way from a layer's states to the embeddings of patches, or another part of theirs."""

    def __init__(
        self, *args: Any, way: Callable[..., Any] | None = None, of_patch: float = 0.5, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.of_patch = of_patch
        if way is not None:
            self.tower.vision = replace(self.tower.vision, embed_patches=way)


def way(asks: str, first: int, *, residual: bool = False, mlp: bool = False) -> Callable[..., Any]:
    """From layer ``first`` of the demo's four on; ``asks``: what attends to what, or the values alone."""

    def embed(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = model.get_image_features(pixel_values=pixels, output_hidden_states=True)
        states, tower = output.hidden_states, model.vision_model
        total = states[first] if residual else torch.zeros(())
        for i in range(first, 4):
            layer = tower.encoder.layers[i]
            total = total + _attended(layer.self_attn, layer.layer_norm1(states[i]), asks)
            total = total + layer.mlp(layer.layer_norm2(total)) if mlp else total
        return model.visual_projection(tower.post_layernorm(total[:, 1:])), output.pooler_output

    return embed


def _attended(attention: Any, states: Tensor, asks: str) -> Tensor:
    if asks == "values":
        return attention.out_proj(attention.v_proj(states))
    parts = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    query, key, value = (
        parts[name](states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for name in (*asks, "v")
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return attention.out_proj(mixed.transpose(1, 2).reshape(states.shape))


VARIANTS: dict[str, dict[str, Any]] = {
    "as clipft does": {},
    "zoom 1": {"zoom": 1.0},
    "zoom 2": {"zoom": 2.0},
    "zoom 3": {"zoom": 3.0},
    "zoom 6": {"zoom": 6.0},
    "windows alone": {"of_patch": 0.0},
    "patches alone": {"of_patch": 1.0},
    "last values alone (MaskCLIP)": {"way": way("values", 3)},
    "the same with residual and MLP": {"way": way("values", 3, residual=True, mlp=True)},
    "keys to keys, last layer": {"way": way("kk", 3)},
    "keys to keys, last 3": {"way": way("kk", 1)},
    "keys to keys, with residual": {"way": way("kk", 2, residual=True)},
    "values to values (CLIP Surgery)": {"way": way("vv", 2)},
    "queries to queries": {"way": way("qq", 2)},
    "queries to keys, as ever": {"way": way("qk", 2)},
    "background: the empty text": {"background": [""]},
    "background: a photo, background": {"background": ["a photo", "background"]},
    "background: 12 kinds of things": {
        "background": ["a person", "an animal", "a plant", "food", "a building", "a vehicle", "a tool", "clothes",
                       "sky", "a symbol", "a face", "a machine"]
    },
}  # fmt: skip


def main() -> None:
    model, processor = load("demo")
    random = random_weights(model.config).eval()
    sizes, variants = {}, {}
    for size, (drawings, least, most) in SIZES.items():
        found = scenes(SCENES, size)
        maps, others = maps_of(model, processor, found), maps_of(random, processor, found)
        sizes[size] = {
            "drawings": drawings,
            "shares": [least, most],
            "clipft": score(maps, found),
            "alone": score(maps_of(model, processor, found, alone=True), found),
            "boxes": boxes(maps, found),
            **priors(found),
            "random weights": score(others, found),
            "correlation": correlation(maps, others),
            "correlation by chance": correlation(maps, [*others[1:], *others[:1]]),  # with another scene's
        }
        print(size, sizes[size], flush=True)
    found = scenes(VARIANT_SCENES, "medium", seed=1)
    for name, options in VARIANTS.items():
        maps, others = (maps_of(m, processor, found, kind=Variant, **options) for m in (model, random))
        variants[name] = score(maps, found) | {"correlation": correlation(maps, others)}
        print(name, variants[name], flush=True)
    about = {"machine": machine(), "scenes": SCENES, "variant_scenes": VARIANT_SCENES}
    print(f"written to {save('explain', about | {'sizes': sizes, 'variants': variants})}")


if __name__ == "__main__":
    from common import machine, save

    main()
