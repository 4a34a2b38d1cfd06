"""Numbers of a test set with 95 % intervals: percentiles over resamples of its pictures (Efron & Tibshirani 1993,
chapter 13). Without torch.

The same seed draws the same pictures, so that the difference of two models on one data set has an interval of its own
(:func:`interval` of the difference).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["AUC", "RESAMPLES", "Array", "Resampled", "draws", "interval"]

RESAMPLES, LEVEL = 1000, 0.95
Array = np.ndarray[Any, Any]


def interval(values: Array) -> list[Any]:
    """[low, high], the middle 95 % of resampled values [resamples]; of [resamples, K] a list of K such."""
    tail = (1 - LEVEL) / 2
    return np.quantile(values, (tail, 1 - tail), axis=0).T.tolist()  # type: ignore[no-any-return]


class Resampled:
    """A result whose metrics can be computed again for any weighting of the pictures."""

    pictures: int
    strata: Array | None = None  # [pictures]: drawn within
    _drawn: tuple[tuple[int, int], dict[str, Array], dict[str, Any]] | None = None

    def weighted(self, counts: Array) -> dict[str, Any]:
        """The metrics where picture i was drawn ``counts[i]`` times."""
        raise NotImplementedError

    def resampled(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Array]:
        """Each number's value in each resample, [resamples]; computed once."""
        return dict(self._drawing(resamples, seed)[0])

    def intervals(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Each metric's 95 % interval."""
        return dict(self._drawing(resamples, seed)[1])

    def _drawing(self, resamples: int, seed: int) -> tuple[dict[str, Array], dict[str, Any]]:
        """The values of the numbers, and all intervals: values of each class are too many to be kept."""
        if self._drawn is None or self._drawn[0] != (resamples, seed):
            values: dict[str, Array] = {}
            for number, counts in enumerate(draws(self.pictures, self.strata, resamples, seed)):
                for name, value in self.weighted(counts).items():
                    values.setdefault(name, np.empty((resamples, *np.shape(value))))[number] = value
            numbers = {name: value for name, value in values.items() if value.ndim == 1}
            self._drawn = ((resamples, seed), numbers, {name: interval(value) for name, value in values.items()})
        return self._drawn[1:]


def draws(count: int, strata: Array | None, resamples: int, seed: int) -> Iterator[Array]:
    """How often each of ``count`` pictures is drawn, once per resample, with replacement and within its stratum."""
    rng = np.random.default_rng(seed)
    strata = np.zeros(count, dtype=np.int64) if strata is None else strata
    order = np.argsort(strata, kind="stable")
    _, first, sizes = np.unique(strata[order], return_index=True, return_counts=True)
    start, size = np.repeat(first, sizes), np.repeat(sizes, sizes)
    for _ in range(resamples):
        drawn = order[start + (rng.random(count) * size).astype(np.int64)]
        yield np.bincount(drawn, minlength=count)


class AUC:
    """Area under the ROC curve with weights: the share of (other, right) pairs in order; a tie is half a pair."""

    def __init__(self, labels: Array, scores: Array) -> None:
        _, self._place = np.unique(scores, return_inverse=True)
        self._labels = labels

    def __call__(self, counts: Array) -> float:
        """Where row i weighs ``counts[i]``."""
        negative, positive = (np.bincount(self._place, counts * (self._labels == label)) for label in (0, 1))
        before = np.cumsum(negative) - negative / 2
        return float(positive @ before / (positive.sum() * negative.sum()))
