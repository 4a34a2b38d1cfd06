"""Grey surfaces, some with a hole: what is normal, and what is not."""

from __future__ import annotations

import numpy as np
from PIL import Image


def surface(seed: int, hole: tuple[int, int] | None = None) -> Image.Image:
    """A grey surface of noise, 60 pixels high and 90 wide, with a dark square of 20 pixels from this row and column,
    if any."""
    pixels = np.random.default_rng(seed).integers(110, 150, (60, 90), dtype=np.uint8)
    if hole is not None:
        pixels[hole[0] : hole[0] + 20, hole[1] : hole[1] + 20] = 10
    return Image.fromarray(pixels)
