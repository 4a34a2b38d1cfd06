"""Models saved, of whatever kind, each as one set of files in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipft.files import write_json
from clipft.models.bases import check_base_stays, record_base
from clipft.models.calibrated import model_calibrations, record_calibrations
from clipft.models.convert import to_open_clip
from clipft.models.formats import CALIBRATION_KEY, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, model_set
from clipft.models.frozen import check_float_base
from clipft.models.int8 import QuantizedModel
from clipft.models.open_clip_processors import is_clips_own, preprocess_cfg_of
from clipft.models.sentence_transformers import write_modules

__all__ = ["save_model", "save_open_clip", "write_model"]


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
    """The files, into the empty folder that ``model_set`` gives, or into one in that.

    Raises:
        ValueError: a model whose frozen layers are int8, of which ``model.save_pretrained`` saves the adapter.
    """
    check_float_base(model)
    if isinstance(model, QuantizedModel):
        model.write_files(staging)
    else:
        model.save_pretrained(staging)
    if hasattr(model, "peft_config"):
        record_base(model, staging, staging.parent)
        record_calibrations(model, staging)
    elif not isinstance(model, QuantizedModel):
        write_modules(model, processor, staging)
    processor.save_pretrained(staging)


def save_open_clip(model: Any, processor: Any, folder: Path) -> None:
    """A float model and its processor as open_clip writes them, in place of whatever model was in the folder:
    ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads them.

    Raises:
        TypeError, ValueError: open_clip has no model, or no preprocessing, that is the same.
        BlockingIOError: another process is writing there.
    """
    model_cfg, state = to_open_clip(model)
    preprocess_cfg = preprocess_cfg_of(processor.image_processor, model.config.vision_config.image_size)
    if not is_clips_own(processor.tokenizer):  # without a name open_clip takes CLIP's own
        model_cfg["text_cfg"]["hf_tokenizer_name"] = folder.absolute().name
    with model_set(folder) as staging:
        # which open_clip reads no more of
        known = {CALIBRATION_KEY: {name: own.to_json() for name, own in model_calibrations(model).items()}}
        described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        write_json(staging / OPEN_CLIP_CONFIG, described | (known if known[CALIBRATION_KEY] else {}))
        save_file(state, staging / OPEN_CLIP_WEIGHTS[0], metadata={"format": "pt"})
        processor.tokenizer.save_pretrained(staging)
