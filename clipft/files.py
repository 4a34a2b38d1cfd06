"""Files and folders that appear whole."""

from __future__ import annotations

import json
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["check_file", "read_json", "save_model", "write_json", "write_text"]

_MOST_JSON = 64 << 20  # bytes; a description of this length is none

# ---- files ----


def check_file(path: Path) -> None:
    """That it is a file: who opens a pipe waits for ever.

    Raises:
        FileNotFoundError: there is nothing. ValueError: something else.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, found {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, whoever wrote it.

    Raises:
        FileNotFoundError: there is none. ValueError: no file, or no JSON object in it.
    """
    check_file(path)
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(
            f"{path}: expected JSON of at most {_MOST_JSON >> 20} MB, found {path.stat().st_size >> 20} MB"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path}: expected a JSON object, found one nested too deep to read") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object; the file is damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


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
