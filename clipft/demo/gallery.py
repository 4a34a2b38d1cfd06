"""The demo's picture: captions as queries, and the drawings that each model ranks first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from matplotlib.figure import Figure

from clipft.data.rows import PairRows
from clipft.files import writing
from clipft.inference.encode import embed_images, embed_texts

HITS = 5
_RIGHT, _OTHER = "#1a9850", "#d9d9d9"


def draw_queries(
    path: Path, models: dict[str, Any], processor: Any, dataset: datasets.Dataset, names: Sequence[str]
) -> None:
    """A PNG with a row for each query and a block of columns for each model; the right drawing is framed in green."""
    queries = [dataset["name"].index(name) for name in names]
    captions = [dataset["caption"][index] for index in queries]
    rankings = {stage: _rank(model, processor, dataset, captions) for stage, model in models.items()}

    columns = len(models) * (HITS + 1) - 1
    figure = Figure(figsize=(1.0 * columns + 2.6, 1.05 * len(queries) + 0.6), dpi=110)
    grid = figure.add_gridspec(
        len(queries), columns, left=0.2, right=0.99, top=0.9, bottom=0.02, wspace=0.1, hspace=0.1
    )
    for row, index in enumerate(queries):
        for block, ranking in enumerate(rankings.values()):
            for place, hit in enumerate(ranking[row]):
                axes = figure.add_subplot(grid[row, block * (HITS + 1) + place])
                _show(axes, dataset[int(hit)]["image"], right=hit == index)
        y = grid[row, 0].get_position(figure)
        figure.text(0.19, (y.y0 + y.y1) / 2, f"“{names[row]}”", ha="right", va="center", fontsize=11, wrap=True)
    for block, stage in enumerate(rankings):
        left = grid[0, block * (HITS + 1)].get_position(figure).x0
        figure.text(left, 0.93, f"{stage}: first {HITS} of {len(dataset)}", ha="left", fontsize=12, weight="bold")
    with writing(path) as staged:
        figure.savefig(staged, format="png", facecolor="white")


def _rank(model: Any, processor: Any, dataset: datasets.Dataset, captions: Sequence[str]) -> np.ndarray:
    """[queries, HITS] rows of ``dataset``, best first."""
    images = embed_images(model, processor, PairRows(dataset), batch_size=64)
    texts = embed_texts(model, processor, captions, batch_size=64)
    return (texts @ images.t()).topk(HITS, dim=1).indices.numpy()


def _show(axes: Any, image: Any, right: bool) -> None:
    axes.imshow(image, interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_RIGHT if right else _OTHER, linewidth=4 if right else 1)
