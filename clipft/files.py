"""Files and folders that appear whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["save_model", "write_json", "write_text"]

# ---- files ----


def write_json(path: Path, value: Any) -> None:
    """As :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """``save_pretrained`` of both into a temporary folder, then file by file into place."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=folder))
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        for file in staging.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging)
