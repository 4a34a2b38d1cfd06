"""Maps of scores over their pictures: as thumbnails for a page, and as a sheet (``clipft explain --output``).

One scale of colours for all: a place shows the picture, in grey, where a text scores nothing, and goes by yellow and
orange to dark red where it scores 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipft.data.pictures import to_rgb
from clipft.errors import shown

if TYPE_CHECKING:
    from clipft.inference.explain import Explanation

__all__ = ["MOST_PICTURES", "draw_maps", "overlay", "reduced"]

_COLOURS = np.array([(255, 250, 190), (254, 217, 118), (253, 141, 60), (227, 26, 28), (128, 0, 38)], np.float32)
_FAINT, _STRONG = 0.0, 0.85  # cover of the picture at score 0 and 1
_LONGEST = 480  # pixels of a panel's picture
_PANEL = 2.6  # inches
_TITLE = 40  # characters of a line above a panel
MOST_PICTURES = 100  # of a sheet


def overlay(picture: Image.Image, scores: NDArray[np.float32], longest: int = _LONGEST) -> Image.Image:
    """The picture, at most ``longest`` pixels a side, under its map [H, W] of scores in [0, 1]."""
    small = reduced(picture, longest)
    resized = Image.fromarray(np.asarray(scores, np.float32)).resize(small.size, Image.Resampling.BILINEAR)
    share = np.asarray(resized).clip(0, 1)[..., None]
    grey = 115 + 0.55 * np.asarray(small.convert("L"), np.float32)[..., None]
    cover = _FAINT + (_STRONG - _FAINT) * share
    return Image.fromarray((grey * (1 - cover) + _colour(share) * cover).round().astype(np.uint8))


def _colour(share: NDArray[np.float32]) -> NDArray[np.float32]:
    """[..., 1] in [0, 1] -> [..., 3]."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.concatenate([np.interp(share, at, channel) for channel in _COLOURS.T], axis=-1).astype(np.float32)


def draw_maps(file: Any, found: Sequence[Explanation]) -> None:
    """A PNG with a row for each picture: the picture, and its map for each text with the boxes that were found. At most
    ``MOST_PICTURES``.
    """
    from matplotlib.figure import Figure

    from clipft.report.fonts import all_scripts

    columns = 1 + len(found[0].texts)
    shapes = [one.picture.height / one.picture.width for one in found]
    heights = [_PANEL * min(max(shape, 0.4), 1.6) + 0.5 for shape in shapes]
    width, height = _PANEL * columns + 0.9, sum(heights) + 0.1
    figure = Figure(figsize=(width, height), dpi=110)
    grid = figure.add_gridspec(
        len(found), columns, left=0.1 / width, right=1 - 0.9 / width, top=1 - 0.45 / height, bottom=0.05 / height,
        height_ratios=heights, hspace=0.5 * len(found) / sum(heights), wspace=0.06,
    )  # fmt: skip
    with all_scripts("the sheet of maps"):
        for line, one in enumerate(found):
            _panel(figure.add_subplot(grid[line, 0]), reduced(one.picture), _end(one.name))
            for column, text in enumerate(one.texts):
                axes = figure.add_subplot(grid[line, 1 + column])
                title = f"“{_start(text)}”\nhighest {one.scores[column].max():.2f}"
                _panel(axes, overlay(one.picture, one.scores[column]), title)
                _draw_boxes(axes, one, column)
        _scale(figure, width, height)
        figure.savefig(file, format="png", facecolor="white")


def reduced(picture: Image.Image, longest: int = _LONGEST) -> Image.Image:
    """In RGB, at most ``longest`` pixels a side."""
    small = to_rgb(picture).copy()
    small.thumbnail((longest, longest))
    return small


def _panel(axes: Any, picture: Image.Image, title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.imshow(picture, interpolation="bilinear")
    # names are no formulas, whatever dollars they hold
    axes.set_title(title, fontsize=8, pad=3, parse_math=False)


def _end(name: str) -> str:
    """Of a picture's name, which tells more than its folders."""
    name = shown(name)
    return name if len(name) <= _TITLE else "…" + name[1 - _TITLE :]


def _start(text: str) -> str:
    text = shown(text)
    return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def _draw_boxes(axes: Any, one: Explanation, text: int) -> None:
    from matplotlib.patches import Rectangle

    scale = axes.images[0].get_array().shape[1] / one.picture.width
    for box in one.boxes[text]:
        corner = box.left * scale - 0.5, box.top * scale - 0.5
        size = (box.right - box.left) * scale, (box.bottom - box.top) * scale
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=2.6))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=1.2))


def _scale(figure: Any, width: float, height: float) -> None:
    """The colours and their scores, at the right edge."""
    tall = min(height - 0.6, 2.4)
    axes = figure.add_axes((1 - 0.62 / width, 1 - (0.45 + tall) / height, 0.14 / width, tall / height))
    colours = _colour(np.linspace(1, 0, 128, dtype=np.float32)[:, None, None])
    axes.imshow(colours / 255, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(xticks=[], yticks=[0, 0.5, 1])
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=8)
    axes.set_title("score", fontsize=8, pad=3)
