"""Builds the embedded picture set: `python -m clipft.demo.build_pictures`.

Noto Color Emoji's bitmaps (Debian package fonts-noto-color-emoji), shrunk to 64 px with their transparency kept, beside
the English names and keywords of Unicode CLDR (Debian package unicode-cldr-core). Skin tones are left out: they repeat
a drawing. The result is one Parquet file of the columns `emoji` (the sequence, without U+FE0F), `name`, `keywords` and
`image` (WebP, as `datasets.Image` reads it).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
from fontTools.ttLib import TTFont
from PIL import Image

from clipft.data.drawings import PICTURES
from clipft.demo.glyphs import sequence_glyphs
from clipft.files import writing

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
SKIN_TONES = frozenset("🏻🏼🏽🏾🏿")
SIZE = 64
SCHEMA = pa.schema(
    {
        "emoji": pa.string(),
        "name": pa.string(),
        "keywords": pa.list_(pa.string()),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    }
)


def read_annotations() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names and keywords of every annotated sequence in CLDR's English files."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ("annotations", "annotationsDerived"):
        for entry in ElementTree.parse(CLDR / folder / "en.xml").iter("annotation"):
            sequence, text = entry.attrib["cp"], entry.text or ""
            if entry.get("type") == "tts":
                names[sequence] = text
            else:
                keywords[sequence] = [word.strip() for word in text.split("|")]
    return names, keywords


def shrink(bitmap: bytes) -> bytes:
    """The bitmap (PNG) centred on a transparent square of `SIZE` pixels, as WebP."""
    picture = Image.open(io.BytesIO(bitmap)).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    buffer = io.BytesIO()
    square.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=85, alpha_quality=80, method=6)
    return buffer.getvalue()


def build_rows() -> list[dict[str, Any]]:
    """A row for each named sequence that the font draws."""
    names, keywords = read_annotations()
    with TTFont(FONT) as font:
        glyphs = sequence_glyphs(font)
        (bitmaps,) = font["CBDT"].strikeData
        return [
            {
                "emoji": sequence,
                "name": names[sequence],
                "keywords": [word for word in keywords.get(sequence, []) if word != names[sequence]],
                "image": {"bytes": shrink(bitmaps[glyphs[sequence]].imageData), "path": None},
            }
            for sequence in sorted(names)
            if glyphs.get(sequence) in bitmaps and not SKIN_TONES & set(sequence)
        ]


def main() -> None:
    """Write the Parquet file."""
    for source in (FONT, CLDR):
        if not source.exists():
            raise SystemExit(f"{source} is missing: apt install fonts-noto-color-emoji unicode-cldr-core")
    rows = build_rows()
    with writing(PICTURES) as staged:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), staged, compression="zstd")
    print(f"{len(rows)} pictures, {PICTURES.stat().st_size / 1e6:.1f} MB: {PICTURES}")


if __name__ == "__main__":
    main()
