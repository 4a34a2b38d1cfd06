"""Fonts for pictures with texts of any script in them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.font_manager import fontManager

__all__ = ["all_scripts"]

# where the usual font has no such characters, and these are installed
_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
          "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
          "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji",
          "Segoe UI Emoji", "Segoe UI Symbol", "Symbola")  # fmt: skip

_logger = logging.getLogger(__name__)


@contextmanager
def all_scripts(what: str) -> Iterator[None]:
    """Around the drawing of a figure: characters come from whichever installed font has them, and a warning says for
    which there is none. ``what``: the figure, for the warning.
    """
    installed = {font.name for font in fontManager.ttflist}
    families = [*matplotlib.rcParams["font.family"], *(name for name in _FONTS if name in installed)]
    with matplotlib.rc_context({"font.family": families}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    _say_missing(what, [str(warning.message) for warning in caught])


def _say_missing(what: str, said: Sequence[str]) -> None:
    codes = sorted({int(found[1]) for found in map(re.compile(r"Glyph (\d+)").match, said) if found})
    if codes:
        names = " ".join(map(chr, codes[:10])) + (" ..." if len(codes) > 10 else "")
        _logger.warning(
            "%s has boxes for %d characters that no font here has (%s): install one, such as Noto Sans CJK or "
            "Noto Emoji",
            what,
            len(codes),
            names,
        )
