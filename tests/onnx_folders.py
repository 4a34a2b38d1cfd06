"""ONNX folders that are changed after their export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def undescribed(folder: Path, **change: Any) -> None:
    """Without digests, as a stranger's export may be, or one of 0.1."""
    info = json.loads((folder / "clipft_onnx.json").read_text())
    info.pop("files", None)
    (folder / "clipft_onnx.json").write_text(json.dumps(info | change))
