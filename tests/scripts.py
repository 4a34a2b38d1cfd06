"""For tests that start a Python of their own."""

from __future__ import annotations

from pathlib import Path


def import_paths(test: str) -> list[str]:
    """Where a script finds the test module that it belongs to, and what the tests share."""
    return [str(Path(test).parent), str(Path(__file__).parent)]
