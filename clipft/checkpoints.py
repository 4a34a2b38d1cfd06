"""Checkpoints that have their name only when whole: staged, then renamed; and the last of them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

__all__ = ["StagedCheckpoints", "last_checkpoint"]

_logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class StagedCheckpoints(Trainer):
    """A ``Trainer`` that writes a checkpoint under a temporary name, then renames it: whatever is called
    ``checkpoint-N`` is whole.
    """

    _staging: Path | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        staging = folder / "tmp-checkpoint"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            self._write_checkpoint(staging / name, model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        self._publish(staging / name, folder / name)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        """All its files."""
        super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else from _publish, under the final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            shutil.rmtree(final, ignore_errors=True)  # of an earlier run in this folder
            staged.rename(final)
            staged.parent.rmdir()
            rotate_checkpoints(
                str(final.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))


def last_checkpoint(folder: str | Path) -> Path:
    """The whole checkpoint with the highest step; unfinished ones are passed over with a warning.

    Raises:
        ValueError: there is none.
    """
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        missing = _missing_from(path)
        if not missing:
            return path
        _logger.warning("%s is not a whole checkpoint (%s): resuming from an earlier one", path, missing)
    raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint-N in {folder}, found none")


def _missing_from(checkpoint: Path) -> str:
    """What a checkpoint lacks for an exact resume, or an empty string."""
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    if not any((checkpoint / name).is_file() for name in weights):
        return "no weights"
    for pattern in ("optimizer.*", "scheduler.pt", "rng_state*.pth"):  # FSDP's optimizer.bin
        if not any(checkpoint.glob(pattern)):
            return f"no {pattern}"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    return ""
