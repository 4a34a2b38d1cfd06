"""The best and the worst that a model finds in a data set, with small pictures, for a report."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clipft.data.rows import read_row, stored_pictures
from clipft.errors import line_of
from clipft.evaluation.metrics import Retrieval
from clipft.evaluation.scoring import Found
from clipft.families.registry import family_of
from clipft.inference.explain import Locator
from clipft.report.heat import overlay

__all__ = ["data_uri", "examples"]

_BEST, _WORST, _HITS = 3, 5, 3
_SIDE = 112  # pixels of a thumbnail's longer side
_ROWS = 1024  # queries at a time
_ZOOM = 2.0  # of maps: nine windows a square picture

_logger = logging.getLogger(__name__)


def examples(found: Found, dataset: Any, model: Any = None, processor: Any = None) -> list[dict[str, Any]]:
    """Groups of queries, each with ``title`` and ``queries``: the query as ``picture`` (a data URI) or ``text``,
    ``right`` (texts) for a picture, and ``hits``: ``picture`` or ``text``, ``score`` (the cosine) and ``right``.

    Best and worst by margin: the score of the best right candidate over that of the best other. With the model and its
    processor the worst pictures have ``maps`` of where it finds a right text and what it took for it, where its family
    can say (:func:`clipft.explain`): ``text`` and ``picture``.
    """
    images = _Thumbnails(dataset)
    maps = _Maps(found, dataset, model, processor)
    by_class = not isinstance(found.main, Retrieval)
    texts = [{"text": text} for text in found.texts]
    groups = []
    for title, chosen in _extremes(found.image_embeds, found.text_embeds, found.texts_of):
        queries = [
            {
                "picture": images[row],
                "right": [found.texts[text] for text in found.texts_of[row]],
                "hits": [{**texts[hit], "score": score, "right": hit in found.texts_of[row]} for hit, score in hits],
                **({"maps": maps.of(row, hits[0][0])} if title == "worst" else {}),
            }
            for row, hits in chosen
        ]
        groups.append({"title": f"Pictures, {title} {'classes' if by_class else 'texts'} found", "queries": queries})
    if by_class and "retrieval" not in found.parts:
        return groups
    images_of: list[list[int]] = [[] for _ in found.texts]
    for image, own in enumerate(found.texts_of):
        for text in own:
            images_of[text].append(image)
    for title, chosen in _extremes(found.text_embeds, found.image_embeds, images_of):
        queries = [
            {
                "text": found.texts[row],
                "hits": [{"picture": images[hit], "score": s, "right": hit in images_of[row]} for hit, s in hits],
            }
            for row, hits in chosen
        ]
        groups.append({"title": f"Texts, {title} pictures found", "queries": queries})
    return groups


Chosen = list[tuple[int, list[tuple[int, float]]]]


def _extremes(queries: Tensor, candidates: Tensor, right: Sequence[Sequence[int]]) -> list[tuple[str, Chosen]]:
    """(best or worst, (query, its hits as (candidate, score))): those right by the largest margin, then those wrong by
    the largest.
    """
    margins, hits = [], []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.t()
        own = torch.zeros_like(scores, dtype=torch.bool)
        for row, places in enumerate(right[start : start + _ROWS]):
            own[row, list(places)] = True
        margins.append(scores.masked_fill(~own, -2).amax(1) - scores.masked_fill(own, -2).amax(1))
        best = scores.topk(min(_HITS, scores.shape[1]), dim=1)
        hits += [
            list(zip(*both, strict=True)) for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    margin = torch.cat(margins)
    order = margin.argsort(descending=True, stable=True).tolist()
    good = [row for row in order if margin[row] > 0][:_BEST]
    bad = [row for row in reversed(order) if margin[row] <= 0][:_WORST]
    groups = (("best", good), ("worst", bad))
    return [(title, [(row, hits[row]) for row in rows]) for title, rows in groups if rows]


class _Maps:
    """Where a model finds texts in pictures of a data set; nothing, where it cannot say."""

    def __init__(self, found: Found, dataset: Any, model: Any, processor: Any) -> None:
        self.found, self.dataset = found, stored_pictures(dataset) or dataset
        self.model, self.processor = model, processor
        if model is not None and family_of(model).vision.embed_patches is None:
            self.model = None

    def of(self, row: int, taken: int) -> list[dict[str, str]]:
        """A right text and the one that it was taken for: ``text``, ``picture`` (a data URI)."""
        if self.model is None or not self.found.texts_of[row]:
            return []
        pair = list(dict.fromkeys([self.found.texts_of[row][0], taken]))
        try:
            locate = Locator(self.model, self.processor, self.found.text_embeds[pair], zoom=_ZOOM)
            picture = read_row(self.dataset, row)["image"]
            scores = locate(picture)
            scores = scores / max(float(scores.max()), 1e-9)  # of a mistake both may be low beside the background
        except Exception as error:  # a report without maps is worth more than none
            _logger.warning("the report is without maps of where things are: %s", line_of(error))
            self.model = None
            return []
        texts = [self.found.texts[text] for text in pair]
        return [
            {"text": text, "picture": data_uri(overlay(picture, own, _SIDE))}
            for text, own in zip(texts, scores, strict=True)
        ]


class _Thumbnails:
    """Data URIs by row."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = stored_pictures(dataset) or dataset
        self.made: dict[int, str] = {}

    def __getitem__(self, row: int) -> str:
        if row not in self.made:
            picture = read_row(self.dataset, row)["image"].convert("RGB")
            picture.thumbnail((_SIDE, _SIDE))
            self.made[row] = data_uri(picture)
        return self.made[row]


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG within a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
