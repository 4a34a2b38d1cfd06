"""How well anomalies are found, and where, from scores of pictures and maps of them. Without torch.

Of a test set of normal pictures and of pictures with a defect, by image AUROC and the best F1; of its pixels, by AUROC
and by the per-region overlap (PRO) of Bergmann et al. 2021 (IJCV 129, section 5.2): at each threshold the mean over all
defects, which are 8-connected regions of the masks, of the share that is found; its area under the curve over the false
positive rate of normal pixels up to 30 %, over these 30 %. All are ROC curves, whose positives weigh alike for AUROC,
and for PRO so that each region weighs the same. A tie is half a pair: between two thresholds that scores tell apart a
curve is straight.

Maps are not kept: a picture's normal pixels, and those of each of its regions, become up to 4096 quantiles of their
scores. That moves no rank by more than 1/4096, AUROC by no more than 1/2048 and PRO by no more than 1/900, however the
scores are distributed, and is exact where there are fewer pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from clipft.evaluation.resampling import AUC, Array, Resampled

__all__ = ["AnomalyDetection", "PixelScores", "best_f1", "regions_of"]

PRO_LIMIT = 0.3  # of the false positive rate
PER_KIND = ("image_auroc", "pixel_auroc", "aupro@30")
_QUANTILES = 4096  # of a picture's normal pixels, and of each region's
_BINS = 2048  # of scores, for intervals
_CELLS = 1 << 23  # most bins of all pictures together
_FEWEST = 256


def best_f1(labels: Array, scores: Array) -> tuple[float, float]:
    """The best F1 of calling all from a score on an anomaly, and that score; of several the highest.

    Args:
        labels: [N], 1 for an anomaly, else 0.
        scores: [N] finite.
    """
    places, values = _places(scores)
    return _best_f1(*_by_place(places, labels, np.ones(len(labels))), values)


def _places(scores: Array) -> tuple[Array, Array]:
    """Of each score its place among the distinct ones, from the highest down, and these."""
    values, places = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    return places, -values


def _by_place(places: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Weights of normal ones and of anomalies at each distinct score."""
    normal, found = (np.bincount(places, weights * (labels == label)) for label in (0, 1))
    return normal, found


def _best_f1(normal: Array, found: Array, values: Array) -> tuple[float, float]:
    hits, alarms = np.cumsum(found), np.cumsum(normal)
    f1 = 2 * hits / (hits + alarms + hits[-1])
    best = int(f1.argmax())
    return float(f1[best]), float(values[best])


def regions_of(mask: Array) -> tuple[Array, int]:
    """Of a mask [H, W] the number of each pixel's region from 1, 0 outside of them, and how many there are; pixels that
    meet at a corner are one region."""
    return ndimage.label(mask, np.ones((3, 3)))  # type: ignore[no-any-return]


class PixelScores:
    """Maps and masks of a test set's pictures, one after the other, as quantiles."""

    def __init__(self) -> None:
        # of each picture [4, n]: values, how many normal pixels one stands for, how many of a defect, what share of it
        self._kept: list[Array] = []
        self._regions: list[int] = []

    @property
    def pictures(self) -> int:
        """How many were taken in."""
        return len(self._kept)

    @property
    def regions(self) -> int:
        """Defects in all of them."""
        return sum(self._regions)

    def add(self, scores: Array, mask: Array | None) -> float | None:
        """Take a picture in.

        Args:
            scores: [H, W] finite, higher is less normal.
            mask: [H, W] bool, true in a defect; None for a picture without one.

        Returns:
            The AUROC of this picture's pixels; None where they are of one sort.

        Raises:
            ValueError: a mask of another size, or scores that are NaN or infinite.
        """
        if mask is not None and mask.shape != scores.shape:
            raise ValueError(f"mask: expected {_size(scores)} pixels as the map has, got {_size(mask)}")
        if not np.isfinite(scores).all():
            raise ValueError("scores: expected finite numbers, got NaN or Inf; has the training diverged?")
        numbers, count = (np.zeros(scores.shape, np.int8), 0) if mask is None else regions_of(mask)
        parts = [_quantiles(scores[numbers == 0], defect=False)]
        for number, place in enumerate(ndimage.find_objects(numbers) if count else (), start=1):
            parts.append(_quantiles(scores[place][numbers[place] == number], defect=True))
        own = np.concatenate(parts, axis=1)
        self._kept.append(own)
        self._regions.append(count)
        return _area(*_curve(own[0], own[1], own[2])) if own[1].any() and own[2].any() else None

    def metrics(self) -> dict[str, float]:
        """``pixel_auroc`` and ``aupro@30``."""
        values, normal, found, overlap = np.concatenate(self._kept, axis=1)
        return {
            "pixel_auroc": _area(*_curve(values, normal, found)),
            "aupro@30": _area(*_curve(values, normal, overlap), PRO_LIMIT),
        }

    def of(self, pictures: Array) -> PixelScores:
        """Of some pictures alone, [n] integers."""
        part = PixelScores()
        part._kept, part._regions = [self._kept[i] for i in pictures], [self._regions[i] for i in pictures]
        return part

    def binned(self) -> Array:
        """[pictures, 3, bins] float32: normal pixels, those in defects and shares of defects, by bins from the highest
        scores down that hold about as many values each.
        """
        values, *weights = np.concatenate(self._kept, axis=1)
        owner = np.repeat(np.arange(self.pictures), [own.shape[1] for own in self._kept])
        bins = min(max(_CELLS // self.pictures, _FEWEST), _BINS)
        ordered = np.sort(values)
        edges = np.unique(ordered[np.linspace(0, len(ordered) - 1, bins + 1).round().astype(np.int64)])
        cells = owner * len(edges) + len(edges) - np.searchsorted(edges, values, side="right")
        size = self.pictures * len(edges)
        parts = [np.bincount(cells, part, minlength=size).reshape(self.pictures, -1) for part in weights]
        return np.stack(parts, axis=1).astype(np.float32)


def _size(pixels: Array) -> str:
    return " x ".join(map(str, pixels.shape[::-1]))


def _quantiles(scores: Array, *, defect: bool) -> Array:
    """As :class:`PixelScores` keeps them: up to 4096 scores, each in the middle of a run of all in order."""
    edges = np.linspace(0, scores.size, min(scores.size, _QUANTILES) + 1).round().astype(np.int64)
    middles, pixels = (edges[:-1] + edges[1:] - 1) // 2, np.diff(edges)
    none = np.zeros(len(pixels))
    weights = (none, pixels, pixels / scores.size) if defect else (pixels, none, none)
    return np.stack([np.sort(scores, axis=None)[middles], *weights]).astype(np.float32)


def _curve(values: Array, normal: Array, found: Array) -> tuple[Array, Array]:
    """Shares of normal and of found weights above each distinct value, from 0 to 1."""
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    return _shares(normal[order])[last], _shares(found[order])[last]


def _shares(weights: Array) -> Array:
    upto = np.cumsum(weights, axis=-1, dtype=np.float64)
    return upto / upto[..., -1:]


def _area(across: Array, up: Array, limit: float = 1.0) -> float:
    """Under a curve from (0, 0) over [0, limit], over the limit."""
    x, y = np.append(0.0, across), np.append(0.0, up)
    last = int(np.searchsorted(x, limit, side="right"))
    if last < len(x):  # the rest of a straight piece
        share = (limit - x[last - 1]) / (x[last] - x[last - 1])
        y = np.append(y[:last], y[last - 1] + share * (y[last] - y[last - 1]))
        x = np.append(x[:last], limit)
    return float(np.trapezoid(y, x) / limit)


class AnomalyDetection(Resampled):
    """Scores of a test set's pictures, of which some are anomalies.

    Args:
        scores: [N] finite, higher is less normal.
        kinds: [N], of each picture the kind of its defect; None for a normal one.
        pixels: the same pictures' maps and masks, in this order; None where there are no masks.

    Raises:
        ValueError: scores that are NaN or infinite, or pictures of one sort only.
    """

    def __init__(self, scores: Array, kinds: Sequence[str | None], pixels: PixelScores | None = None) -> None:
        self.scores, self.kinds, self.pixels = np.asarray(scores, dtype=np.float64), list(kinds), pixels
        if not np.isfinite(self.scores).all():
            raise ValueError("scores: expected finite numbers, got NaN or Inf; has the training diverged?")
        self.names = sorted({kind for kind in self.kinds if kind is not None})
        self.pictures = len(self.scores)
        self.labels = np.array([kind is not None for kind in self.kinds], dtype=np.int64)
        if len(np.unique(self.labels)) < 2:
            raise ValueError("kinds: expected normal pictures and anomalies, got one sort only")
        self.strata = np.array([0 if kind is None else 1 + self.names.index(kind) for kind in self.kinds])
        self._auc = AUC(self.labels, self.scores)
        self._places, self._distinct = _places(self.scores)
        self._bins: Array | None = None

    def metrics(self) -> dict[str, Any]:
        """``image_auroc``, ``best_f1``, ``threshold`` (from which on a score is called an anomaly at the best F1; of
        these very pictures, so both are on the bright side); with masks ``pixel_auroc`` and ``aupro@30``;
        ``normal``, ``anomalies`` and ``regions``, how many.
        """
        f1, threshold = best_f1(self.labels, self.scores)
        regions = {} if self.pixels is None else {"regions": self.pixels.regions}
        return {
            "image_auroc": self._auc(np.ones(self.pictures)),
            "best_f1": f1,
            **({} if self.pixels is None else self.pixels.metrics()),
            "threshold": threshold,
            "normal": int((self.labels == 0).sum()),
            "anomalies": int(self.labels.sum()),
            **regions,
        }

    def weighted(self, counts: Array) -> dict[str, float]:
        """``image_auroc``, ``best_f1`` and of the pixels, these by up to 2048 bins of scores."""
        f1, _ = _best_f1(*_by_place(self._places, self.labels, counts), self._distinct)
        return {"image_auroc": self._auc(counts), "best_f1": f1, **self._of_pixels(counts)}

    def _of_pixels(self, counts: Array) -> dict[str, float]:
        if self.pixels is None:
            return {}
        if self._bins is None:
            self._bins = self.pixels.binned()
        normal, found, overlap = _shares(np.tensordot(counts.astype(np.float32), self._bins, 1))
        return {"pixel_auroc": _area(normal, found), "aupro@30": _area(normal, overlap, PRO_LIMIT)}

    def per_kind(self) -> list[dict[str, Any]]:
        """A row for each ``kind`` of defect, against all normal pictures: ``image_auroc``, with masks ``pixel_auroc``
        and ``aupro@30``; ``intervals`` of these, and ``support``, its pictures.
        """
        return [self._row(name) for name in self.names]

    def _row(self, name: str) -> dict[str, Any]:
        chosen = np.flatnonzero([kind in (None, name) for kind in self.kinds])
        pixels = None if self.pixels is None else self.pixels.of(chosen)
        own = AnomalyDetection(self.scores[chosen], [self.kinds[i] for i in chosen], pixels)
        found, intervals = own.metrics(), own.intervals()
        names = [measure for measure in PER_KIND if measure in found]
        return {
            "kind": name,
            **{measure: found[measure] for measure in names},
            "support": found["anomalies"],
            "intervals": {measure: intervals[measure] for measure in names},
        }
