"""What libraries and strangers' files say, for messages: a line, and not a long one."""

from __future__ import annotations

__all__ = ["line_of", "short"]

_SHOWN, _LINE = 200, 500  # characters of a value, and of what a library raised


def line_of(error: object, most: int = _LINE) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    line = " ".join(str(error)[: 2 * most].split()) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]}..."


def short(value: object, most: int = _SHOWN) -> str:
    """A value as Python writes it, up to so many characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
