"""Of a test set of anomalies the part of a page: numbers by kind of defect, and the pictures that went worst, each with
its map and its mask side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipft.console import number
from clipft.evaluation.anomaly import PER_KIND
from clipft.report.examples import data_uri
from clipft.report.heat import reduced

__all__ = ["Worst", "section"]

_MISSED, _ALARMS, _PLACES = (
    "Defects with the lowest scores",
    "Normal pictures with the highest scores",
    "Defects whose place is found worst",
)
_SHOWN = 4  # pictures of each
_SIDE = 176  # pixels of the longer side


@dataclass
class Worst:
    """The worst of the pictures that were taken in, as small pictures.

    Attributes:
        draw: a picture under its map [H, W] at so many pixels of its longer side.
    """

    draw: Callable[[Image.Image, NDArray[np.float32], int], Image.Image]
    _groups: dict[str, list[tuple[float, str, dict[str, Any]]]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        kind: str | None,
        picture: Image.Image,
        scores: tuple[float, float | None],
        found: NDArray[np.float32],
        mask: NDArray[np.bool_] | None,
    ) -> None:
        """A picture of this name, with the ``kind`` of its defect (None: it is normal), its score, the AUROC of its own
        pixels where it has both sorts, its map [H, W] and its mask [H, W].
        """
        score, own = scores
        badness = {_ALARMS: score} if kind is None else {_MISSED: -score}
        if own is not None:
            badness[_PLACES] = -own
        for title, bad in badness.items():
            group = self._groups.setdefault(title, [])
            if len(group) == _SHOWN and bad <= group[-1][0]:
                continue
            shown = {
                "name": name,
                "kind": kind or "normal",
                "score": number("score", score),
                "auroc": None if own is None else number("auroc", own),
                "picture": data_uri(reduced(picture, _SIDE)),
                "map": data_uri(self.draw(picture, found, _SIDE)),
                "mask": None if mask is None else _small_mask(mask),
            }
            group.append((bad, name, shown))
            group.sort(key=lambda entry: (-entry[0], entry[1]))
            del group[_SHOWN:]

    def groups(self) -> list[dict[str, Any]]:
        """Each with ``title`` and ``pictures``, the worst first."""
        titles = [title for title in (_MISSED, _ALARMS, _PLACES) if title in self._groups]
        return [{"title": title, "pictures": [one for *_, one in self._groups[title]]} for title in titles]


def _small_mask(mask: NDArray[np.bool_]) -> str:
    """White where a pixel of it is marked, be it one."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    height, width = mask.shape
    scale = min(_SIDE / max(height, width), 1.0)
    small = grey.resize((max(round(width * scale), 1), max(round(height * scale), 1)), Image.Resampling.BOX)
    return data_uri(small.point(lambda value: 255 if value else 0))


def section(result: dict[str, Any], worst: Worst) -> dict[str, Any]:
    """What the template shows of a result of :meth:`clipft.evaluation.anomaly.AnomalyDetection.metrics` with
    ``per_kind``.
    """
    names = [name for name in PER_KIND if name in result]
    return {
        "names": [name.replace("_", " ") for name in names],
        "rows": [
            {
                "kind": row["kind"],
                "support": row["support"],
                "cells": [
                    {
                        "value": number(name, row[name]),
                        "interval": " to ".join(number(name, edge) for edge in row["intervals"][name]),
                    }
                    for name in names
                ],
            }
            for row in result["per_kind"]
        ],
        "threshold": number("threshold", result["threshold"]),
        "normal": result["normal"],
        "anomalies": result["anomalies"],
        "regions": result.get("regions"),
        "groups": worst.groups(),
    }
