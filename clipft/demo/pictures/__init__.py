"""The embedded picture set: Noto Color Emoji in ``pictures.parquet``, see ``NOTICE.md``."""

from __future__ import annotations

from pathlib import Path

PICTURES = Path(__file__).with_name("pictures.parquet")
