"""The embedded picture set: Noto Color Emoji in ``pictures.parquet``, see ``NOTICE.md``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from PIL import Image

__all__ = ["PICTURES", "control_drawings", "decode", "on_white", "read_pictures"]


PICTURES = Path(__file__).with_name("pictures.parquet")


def read_pictures() -> list[dict[str, Any]]:
    """The rows of the embedded file: ``emoji``, ``name``, ``keywords``, ``image`` (WebP with transparency)."""
    return pq.read_table(PICTURES).to_pylist()


def decode(row: dict[str, Any]) -> Image.Image:
    """The drawing with its transparency."""
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")


def on_white(drawing: Image.Image) -> Image.Image:
    """What a viewer sees: transparency over white."""
    white = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(white, drawing).convert("RGB")


def control_drawings() -> Any:
    """Every sixth of the package's drawings with its caption: 310 pictures that few models are tuned on."""
    rows = read_pictures()[::6]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    columns = {
        "image": [on_white(decode(row)) for row in rows],
        "caption": [", ".join([row["name"], *row["keywords"]]) for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)
