"""Models saved, of whatever kind, each as one set of files in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clipft.models.bases import check_base_stays, record_base
from clipft.models.formats import model_set
from clipft.models.int8 import QuantizedModel

__all__ = ["save_model", "write_model"]


def save_model(model: Any, processor: Any, folder: Path, also: Iterable[Path] = ()) -> None:
    """A model, float, int8 or with an adapter, and its processor, in place of whatever model was in the folder;
    ``also``: files to copy beside it.

    Raises:
        ValueError: an adapter into the folder of its base.
        BlockingIOError: another process is writing there.
    """
    if config := getattr(model, "peft_config", {}).get("default"):
        check_base_stays(str(config.base_model_name_or_path), folder)
    with model_set(folder) as staging:
        write_model(model, processor, staging)
        for file in also:
            shutil.copy(file, staging)


def write_model(model: Any, processor: Any, staging: Path) -> None:
    """The files, into the empty folder that ``model_set`` gives, or into one in that."""
    if isinstance(model, QuantizedModel):
        model.write_files(staging)
    else:
        model.save_pretrained(staging)
    if hasattr(model, "peft_config"):
        record_base(model, staging, staging.parent)
    processor.save_pretrained(staging)
