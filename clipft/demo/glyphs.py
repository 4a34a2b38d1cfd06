"""Emoji sequences to glyphs of a font.

A font draws most emoji from one code point, the rest (flags, families, gendered activities) from a ligature in its GSUB
table. Both fonts of the demo are read the same way here, so that neither needs a text-shaping library. CLDR writes
sequences without the variation selector U+FE0F, so it is left out of the ligatures, too.
"""

from __future__ import annotations

from fontTools.ttLib import TTFont

VARIATION_SELECTOR = 0xFE0F
LIGATURE_LOOKUP, EXTENSION_LOOKUP = 4, 7


def sequence_glyphs(font: TTFont) -> dict[str, str]:
    """Glyph name of every emoji sequence (without U+FE0F) that `font` draws with a single glyph."""
    cmap: dict[int, str] = font.getBestCmap()
    selector = cmap.get(VARIATION_SELECTOR)
    characters = {glyph: chr(code) for code, glyph in cmap.items()}
    found = {chr(code): glyph for code, glyph in cmap.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for entry in lookup.SubTable:
            subtable = entry.ExtSubTable if lookup.LookupType == EXTENSION_LOOKUP else entry
            for first, ligatures in getattr(subtable, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = [glyph for glyph in (first, *ligature.Component) if glyph != selector]
                    if all(part in characters for part in parts):
                        found["".join(characters[part] for part in parts)] = ligature.LigGlyph
    return found
