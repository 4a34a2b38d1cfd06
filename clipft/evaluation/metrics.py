"""Metrics of retrieval and classification from embeddings and scores, with bootstrap intervals.

Retrieval needs no N x N matrix: a block of queries meets all candidates, what is kept of it are the ranks of the right
ones, and every metric follows from these. A tie counts against the model: a right candidate stands behind all that
score the same, as in scikit-learn's ``label_ranking_average_precision_score``, so that a collapsed model gains nothing.

Intervals are by :mod:`clipft.evaluation.resampling`. What is ranked among stays fixed, since a picture drawn twice
would be its own competitor; a caption weighs as often as its pictures were drawn, on average. Classification draws
within each class: held-out rows keep the classes' shares, and no resample may lose a class that balanced accuracy and
macro F1 average over. The difference of two models has a narrower interval than the two models' intervals suggest,
because they meet the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
)
from torch import Tensor

from clipft.evaluation.resampling import AUC, RESAMPLES, Array, Resampled, interval

__all__ = ["Blockwise", "Classification", "Retrieval", "interval", "retrieval_metrics"]

KS = (1, 5, 10)
_PER_CLASS = ("precision", "recall", "f1")
LARGEST_MATRIX = 200  # classes: the square of more is no use to anyone
_CONFUSIONS = 50
_TILE = 1 << 22  # similarities at a time: 16 MB, and some copies


# ---- retrieval ----


class Retrieval(Resampled):
    """Ranks of texts by image and of images by text.

    Args:
        image_embeds: [images, D] float32, L2-normalised.
        text_embeds: [distinct texts, D], the same.
        texts_of: for each image the indices of its texts.
    """

    def __init__(self, image_embeds: Tensor, text_embeds: Tensor, texts_of: Sequence[Sequence[int]]) -> None:
        if not (torch.isfinite(image_embeds).all() and torch.isfinite(text_embeds).all()):
            raise ValueError("embeddings: expected finite numbers, got NaN or Inf; has the training diverged?")
        self.pictures = len(image_embeds)
        self._text_of_pair = np.concatenate([np.asarray(own, dtype=np.int64) for own in texts_of])
        self._image_of_pair = np.repeat(np.arange(self.pictures), [len(own) for own in texts_of])
        images_of = np.split(
            self._image_of_pair[np.argsort(self._text_of_pair, kind="stable")],
            np.cumsum(np.bincount(self._text_of_pair, minlength=len(text_embeds)))[:-1],
        )
        self.ways = {
            "image_to_text": _Ranks(image_embeds, text_embeds, texts_of),
            "text_to_image": _Ranks(text_embeds, image_embeds, images_of),
        }

    def metrics(self) -> dict[str, float]:
        """``image_to_text_R@1``, ``R@5``, ``R@10``, ``median_rank`` (of the best right text), ``mAP``; the same of
        ``text_to_image_...``.
        """
        return self.weighted(np.ones(self.pictures))

    def weighted(self, counts: Array) -> dict[str, float]:
        """As ``metrics``."""
        per_text = np.bincount(self._text_of_pair, counts[self._image_of_pair])
        weights = {"image_to_text": counts, "text_to_image": per_text / np.bincount(self._text_of_pair)}
        return {
            f"{way}_{name}": value
            for way, ranks in self.ways.items()
            for name, value in ranks.metrics(weights[way]).items()
        }


class _Ranks:
    """Of each query [Q]: ``first``, the rank from 1 of its best right candidate, and its average ``precision``."""

    def __init__(self, queries: Tensor, candidates: Tensor, right: Sequence[Any]) -> None:
        size = max(1, _TILE // len(candidates))
        blocks = [
            _rank(queries[start : start + size] @ candidates.t(), right[start : start + size])
            for start in range(0, len(queries), size)
        ]
        self.first, self.precision = (torch.cat(part).numpy() for part in zip(*blocks, strict=True))
        self._order = np.argsort(self.first, kind="stable")

    def metrics(self, weights: Array) -> dict[str, float]:
        """Means over the queries, and the median."""
        hits = {f"R@{k}": float(np.average(self.first <= k, weights=weights)) for k in KS}
        upto = np.cumsum(weights[self._order])
        middle = [np.searchsorted(upto, upto[-1] / 2, side=side) for side in ("left", "right")]
        median = float(self.first[self._order[middle]].mean())
        return {**hits, "median_rank": median, "mAP": float(np.average(self.precision, weights=weights))}


def _rank(scores: Tensor, right: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """First rank [Q] and average precision [Q] from scores [Q, C]: how many candidates score as much as each right one
    or more is counted with one binary search of every candidate among the right ones.
    """
    count = torch.tensor([len(own) for own in right])[:, None]
    width = int(count.max())
    index = torch.tensor([[*own, *([0] * (width - len(own)))] for own in map(list, right)])
    present = torch.arange(width) < count
    own_scores = scores.gather(1, index).masked_fill(~present, torch.inf).sort(1).values  # [Q, width], ascending
    below = torch.searchsorted(own_scores, scores, right=True)  # [Q, C]: right ones that score no more
    bins = below + torch.arange(len(scores))[:, None] * (width + 1)
    counts = torch.bincount(bins.flatten(), minlength=len(scores) * (width + 1)).view(len(scores), -1)
    ranks = counts.flip(1).cumsum(1).flip(1)[:, 1:].clamp(min=1)  # [Q, width]: descending; padding is last
    found = count - torch.searchsorted(own_scores, own_scores.contiguous())
    precision = (found / ranks.double() * present).sum(1) / count[:, 0]
    return ranks.gather(1, count - 1)[:, 0], precision


def retrieval_metrics(image_embeds: Tensor, text_embeds: Tensor, texts_of: Sequence[Sequence[int]]) -> dict[str, float]:
    """:meth:`Retrieval.metrics` of embeddings [images, D] and [distinct texts, D], L2-normalised."""
    return Retrieval(image_embeds, text_embeds, texts_of).metrics()


# ---- classification ----


@dataclass(frozen=True)
class Blockwise:
    """Scores [N, classes] of rows [N, ...] that are made where a block of them is wanted: all may be too many."""

    rows: Any
    score: Callable[[Any], Array]

    def __getitem__(self, block: slice) -> Array:
        return self.score(self.rows[block])


class Classification(Resampled):
    """Predictions of single-label classes.

    Args:
        labels: [N] integers, indices into ``class_names``.
        scores: [N, classes], the larger the likelier; an array, or :class:`Blockwise`.
        class_names: in the order of the labels.
        votes: whether a score of 0 says that nothing speaks for a class, which is then never among the best five.
    """

    def __init__(
        self, labels: Array, scores: Array | Blockwise, class_names: Sequence[str], *, votes: bool = False
    ) -> None:
        self.labels, self.scores, self.class_names = labels, scores, list(class_names)
        self.pictures, self.strata = len(labels), labels
        size = max(1, _TILE // len(self.class_names))
        blocks = [
            _judge(labels[start : start + size], scores[start : start + size], votes)
            for start in range(0, len(labels), size)
        ]
        self.predicted, self._among_five, self._margin = (np.concatenate(part) for part in zip(*blocks, strict=True))
        self._auc = AUC(labels, self._margin) if self.has_auc else None

    @property
    def has_auc(self) -> bool:
        """Two classes, and pictures of both."""
        return len(self.class_names) == 2 and len(np.unique(self.labels)) == 2

    def metrics(self) -> dict[str, Any]:
        """``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``top5``, with two classes ``auc``, and ``per_class``, by
        scikit-learn; ``classes`` and ``classes_with_pictures``, how many; ``confusions``, the most frequent, and up to
        200 classes all in ``confusion_matrix``.
        """
        labels, predicted, every = self.labels, self.predicted, list(range(len(self.class_names)))
        columns = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0.0)
        rows = [
            {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(self.class_names, *columns, strict=True)
        ]
        balanced = recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0.0)
        auc = {"auc": float(roc_auc_score(labels, self._margin))} if self.has_auc else {}
        matrix = confusion_matrix(labels, predicted, labels=every).tolist() if len(every) <= LARGEST_MATRIX else None
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "balanced_accuracy": float(balanced),
            "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
            "top5": float(np.mean(self._among_five)) if len(every) > 5 else 1.0,
            **auc,
            "classes": len(every),
            "classes_with_pictures": len(np.unique(labels)),
            "per_class": rows,
            "confusions": self._confusions(),
            **({} if matrix is None else {"confusion_matrix": matrix}),
        }

    def _confusions(self) -> list[dict[str, Any]]:
        """The most frequent: ``class``, what it was taken for as ``predicted``, and ``count``."""
        wrong = self.predicted != self.labels
        pairs, counts = np.unique(
            np.stack([self.labels[wrong], self.predicted[wrong]]).astype(np.int64), axis=1, return_counts=True
        )
        order = np.argsort(-counts, kind="stable")[:_CONFUSIONS]
        names = self.class_names
        return [
            {"class": names[pairs[0, place]], "predicted": names[pairs[1, place]], "count": int(counts[place])}
            for place in order
        ]

    def intervals(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Of the numbers, and ``per_class``: a row for each class with those of ``precision``, ``recall``, ``f1``."""
        found = super().intervals(resamples, seed)
        columns = {name: found.pop(name) for name in _PER_CLASS}
        rows = zip(self.class_names, *columns.values(), strict=True)
        return {**found, "per_class": [dict(zip(("class", *columns), row, strict=True)) for row in rows]}

    def weighted(self, counts: Array) -> dict[str, Any]:
        """The numbers of ``metrics``, a hundred times as fast; ``precision``, ``recall`` and ``f1`` [classes]."""
        classes = len(self.class_names)
        right = self.predicted == self.labels
        hits, support, predicted = (
            np.bincount(which, weights, minlength=classes)
            for which, weights in (
                (self.labels, counts * right),
                (self.labels, counts),
                (self.predicted, counts),
            )
        )
        recall, f1 = hits / np.maximum(support, 1), 2 * hits / np.maximum(support + predicted, 1)
        values = {
            "accuracy": hits.sum() / counts.sum(),
            "balanced_accuracy": recall[support > 0].mean(),
            "macro_f1": f1[support + predicted > 0].mean(),
            "top5": (counts @ self._among_five) / counts.sum() if classes > 5 else 1.0,
            **({"auc": self._auc(counts)} if self._auc else {}),
        }
        per_class = dict(zip(_PER_CLASS, (hits / np.maximum(predicted, 1), recall, f1), strict=True))
        return {**{name: float(value) for name, value in values.items()}, **per_class}


def _judge(labels: Array, scores: Array, votes: bool) -> tuple[Array, Array, Array]:
    """Of a block of rows the best class, whether the right one is among the best five, and by how much the second class
    scores above the first.

    Ties are broken as in scikit-learn: the best class is the first of equals, among five are rather the last.
    """
    if not np.isfinite(scores).all():
        raise ValueError("embeddings: expected finite numbers, got NaN or Inf; has the training diverged?")
    own = scores[np.arange(len(labels)), labels][:, None]
    later = np.arange(scores.shape[1]) > labels[:, None]
    among_five = ((scores > own) | (later & (scores == own))).sum(1) < 5
    if votes:
        among_five &= own[:, 0] > 0
    return scores.argmax(1), among_five, scores[:, min(1, scores.shape[1] - 1)] - scores[:, 0]
