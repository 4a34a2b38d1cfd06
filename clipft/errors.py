"""What libraries and strangers' files say, for messages: a line, not a long one, and no command to the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["line_of", "listed", "short", "shown"]

# C0 and C1, marks and overrides of direction, line and paragraph separators, halves of surrogate pairs
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHOWN, _LINE = 200, 500  # characters of a value, and of what a library raised
_NAMED = 4  # names in a message


def line_of(error: object, most: int = _LINE) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    line = " ".join(str(error)[: 2 * most].split()) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]}..."


def listed(names: Collection[str]) -> str:
    """The first few of them, in order, and how many more there are."""
    chosen = sorted(names)
    more = f" and {len(chosen) - _NAMED} more" if len(chosen) > _NAMED else ""
    return ", ".join(f"{name:.{_SHOWN}}" for name in chosen[:_NAMED]) + more


def short(value: object, most: int = _SHOWN) -> str:
    """A value as Python writes it, up to so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def shown(text: str, *, lines: bool = False) -> str:
    """Text with its control characters as escapes, ESC as ``\\x1b``: one line, or with ``lines`` several."""
    kept = "\n\t" if lines else ""
    return _CONTROL.sub(lambda c: c[0] if c[0] in kept else c[0].encode("unicode_escape").decode(), text)
