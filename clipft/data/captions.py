"""Captions before they become tokens; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["shortened"]

_MOST_CHARACTERS = 1 << 16  # far more than any model's positions take; a tokenizer reads all of a text before it cuts


def shortened(texts: Iterable[str]) -> list[str]:
    """The texts, without the rest of those that are megabytes long."""
    return [text[:_MOST_CHARACTERS] for text in texts]
