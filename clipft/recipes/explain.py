"""``clipft.explain``: where in pictures a model finds what texts say."""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from clipft.console import bar, console_of_run, without_bars
from clipft.data.pictures import in_order, open_picture
from clipft.files import check_output, write_json, writing
from clipft.inference.explain import BACKGROUND, Explanation, Locator, Maps, check_model
from clipft.recipes.options import options_from
from clipft.recipes.options_explain import ExplainOptions
from clipft.recipes.run import loaded
from clipft.report.heat import MOST_PICTURES, draw_maps

__all__ = ["Explanations", "explain"]

_LISTED = 3  # boxes of a text in the table


class Explanations(list[Explanation]):
    """One for each picture, in the order given; in a notebook the picture that ``output`` gets."""

    @property
    def scores(self) -> Maps:
        """[N, T, H, W], where all pictures have one size.

        Raises:
            ValueError: they have not; each has its own ``scores`` [T, H, W].
        """
        sizes = {one.picture.size for one in self}
        if len(sizes) > 1:
            raise ValueError(f"scores: expected pictures of one size, got {len(sizes)}; take each one's own scores")
        return np.stack([one.scores for one in self])

    def to_json(self) -> list[dict[str, Any]]:
        """Sizes, highest scores and boxes."""
        return [one.to_json() for one in self]

    def _repr_png_(self) -> bytes:
        _needs_matplotlib()
        draw_maps(file := io.BytesIO(), self[:MOST_PICTURES])
        return file.getvalue()


@without_bars()
def explain(
    model: Any,
    images: Any,
    texts: str | Sequence[str],
    output: str | Path | None = None,
    *,
    console: Console | None = None,
    **options: Any,
) -> Explanations:
    """Maps of where pictures show what texts say, and boxes around it: the same as the command ``clipft explain``, with
    the same options.

    The score of a place is the share of the text in a softmax, at the model's own scale, over the texts given and texts
    of a background. It is looked for through windows that overlap and cover the whole picture, beyond the model's
    centre crop too; see :mod:`clipft.inference.explain` and, for what compares patches with texts,
    :mod:`clipft.families.value_path` (arXiv:2112.01071, arXiv:2304.05653). The model stays as it is.

    Args:
        model: a folder, a hub name, ``"demo"``, ``(model, processor)`` or a :class:`clipft.recipes.run.Run`: a CLIP,
            MetaCLIP 2, Chinese-CLIP or SigLIP of a fixed size, in float or int8, with an adapter or without.
        images: a picture (PIL or a path), or a sequence of them.
        texts: a text, or several, which compete with each other for every place.
        output: a PNG for the maps; a ``.json`` of the same name with the boxes goes beside it.
        console: where progress and the table go; default: standard output.
        options: fields of :class:`clipft.recipes.options_explain.ExplainOptions`: ``threshold``, ``zoom``,
            ``background``.

    Returns:
        A list with an :class:`clipft.inference.explain.Explanation` for each picture: ``scores`` [T, H, W] float32 in
        [0, 1], in the picture's own pixels, ``boxes``, ``picture``. Its ``scores`` are [N, T, H, W] where all pictures
        have one size.

    Raises:
        TypeError: no such option. ValueError: no texts, an empty one, a picture that cannot be read, a model whose
            patches cannot be compared with texts, an option outside of its range; the message names it.
        OSError: ``output`` cannot be written. ImportError: ``output`` needs matplotlib.
    """
    settings = options_from(ExplainOptions, options)
    console = console or console_of_run()
    pictures, texts = _several(images), _strings("texts", texts)
    background = _strings("background", BACKGROUND if settings.background is None else settings.background)
    _check(pictures, texts, settings.threshold, output)
    clip, processor = loaded(model)
    check_model(clip)
    opened = [(_name(image, number), open_picture(image)) for number, image in enumerate(pictures)]
    with bar(console) as progress:
        track = functools.partial(progress.track, description="looking")
        locate = Locator(clip, processor, texts, background=background, zoom=settings.zoom)
        found = Explanations()
        for name, picture in track(opened):
            scores = locate(picture)
            boxes = locate.boxes(scores, settings.threshold)
            found.append(Explanation(name, tuple(texts), scores, boxes, picture))
    if output is not None:
        _write(Path(output), found, settings.threshold)
    _show(found, settings.threshold, console)
    return found


def _several(images: Any) -> list[Any]:
    """One picture or a sequence of them."""
    if isinstance(images, (str, Path, Image.Image)):
        return [images]
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a picture, a path or several, got {type(images).__name__}")
    return list(in_order(images))


def _name(image: Any, number: int) -> str:
    return str(image) if isinstance(image, (str, Path)) else str(getattr(image, "filename", "")) or f"picture {number}"


def _strings(name: str, given: Any) -> list[str]:
    """One or more."""
    texts = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not texts:
        raise ValueError(f"{name}: expected at least one text, got none")
    if wrong := [one for one in texts if not isinstance(one, str)]:
        raise TypeError(f"{name}: expected strings, got {type(wrong[0]).__name__}")
    return texts


def _check(pictures: list[Any], texts: list[str], threshold: float, output: str | Path | None) -> None:
    """What can be told before the work."""
    if not pictures:
        raise ValueError("images: expected at least one picture, got none")
    if not all(text.strip() for text in texts):
        raise ValueError("texts: expected what is to be found in words, got an empty text")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a score between 0 and 1, got {threshold}")
    if output is not None:
        _check_output(Path(output), len(pictures))


def _check_output(path: Path, count: int) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"output: expected the name of a .png, the boxes go beside it as .json, got {path}")
    if count > MOST_PICTURES:
        raise ValueError(f"output: expected at most {MOST_PICTURES} pictures in one .png, got {count}")
    _needs_matplotlib()
    check_output(path)
    check_output(path.with_suffix(".json"))


def _needs_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("output: a picture of the maps needs matplotlib: pip install 'clipft[search]'")


def _write(path: Path, found: Explanations, threshold: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as staged:
        draw_maps(staged, found)
    write_json(path.with_suffix(".json"), {"threshold": threshold, "images": found.to_json()})


def _show(found: Explanations, threshold: float, console: Console) -> None:
    """The highest score of each text, and its boxes."""
    table = Table("picture", "text", "highest", f"boxes above {threshold:g} (left, top, right, bottom)")
    for one in found:
        for text, scores, boxes in zip(one.texts, one.scores, one.boxes, strict=True):
            named = [f"{box.left}, {box.top}, {box.right}, {box.bottom}" for box in boxes[:_LISTED]]
            more = [f"and {len(boxes) - _LISTED} more"] if len(boxes) > _LISTED else []
            table.add_row(one.name, text, f"{scores.max():.3f}", "; ".join([*named, *more]) or "none")
    console.print(table)
