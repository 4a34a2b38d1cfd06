"""Checkpoints that have their name only when whole: staged, then renamed, with digests of their weights; and the last
of them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from clipft.errors import line_of
from clipft.files import check_set, drop_link, read_json, write_json, write_manifest
from clipft.models.bases import record_sizes
from clipft.models.float_base import state_in_float
from clipft.models.formats import ADAPTER_CONFIG, MODEL_MANIFEST
from clipft.models.frozen import frozen_linears

__all__ = ["StagedCheckpoints", "check_checkpoint", "kept_checkpoints", "last_checkpoint"]

_logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STAGING, _REPLACED = "tmp-checkpoint", "replaced"
_LOSS = "loss.json"


class StagedCheckpoints(Trainer):
    """A ``Trainer`` that writes a checkpoint under a temporary name, then renames it: whatever is called
    ``checkpoint-N`` is whole. One that is resumed has the loss that was not logged yet.
    """

    _staging: Path | None = None
    _resumed: Path | None = None
    _own_steps: frozenset[int] = frozenset()  # of this run's checkpoints, others may be an earlier run's
    _unlogged: torch.Tensor | None = None  # loss as the step began

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_OnBegin(self._take_up))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer: the batches of a step."""
        self._unlogged = self._tr_loss.clone()
        return super().get_batch_samples(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed = Path(resume_from_checkpoint)

    def _take_up(self) -> None:
        """As training begins: what Trainer does not bring back."""
        self._own_steps = frozenset()
        if self._resumed is None:
            return
        steps = (int(path.name.rpartition("-")[2]) for path in _by_step(self._resumed.parent))
        self._own_steps = frozenset(step for step in steps if step <= self.state.global_step)
        self._note_best(self._resumed.parent)  # which may have been moved
        if (self._resumed / _LOSS).is_file():
            unlogged = read_json(self._resumed / _LOSS)
            self._tr_loss = self._tr_loss + unlogged["loss"]
            self._total_loss_scalar = -float(unlogged["loss"])  # the mean of this call is of its own steps
            self._globalstep_last_logged = int(unlogged["last_logged"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # of a run in float16, which this one is not
            super()._load_scaler(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        better = super()._determine_best_metric(metrics, trial)
        self._note_best(Path(self._get_output_dir(trial)))
        return better

    def _note_best(self, folder: Path) -> None:
        """Which checkpoint is that of the best evaluation: saved with it, or before it at the same step."""
        if (step := self.state.best_global_step) in self._own_steps:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{step}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        staging = folder / _STAGING
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            _finish_replacing(folder)
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _named_errors(staging, folder / name):
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
        loss = self.accelerator.gather(self._tr_loss).mean().item()
        if self.args.should_save:
            if (folder / ADAPTER_CONFIG).is_file():
                record_sizes(self.model, folder)
            write_json(folder / _LOSS, {"loss": loss, "last_logged": self._globalstep_last_logged})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As in Trainer; layers that are int8 meanwhile are saved in float."""
        if state_dict is None and not hasattr(self.model, "peft_config") and frozen_linears(self.model):
            state_dict = state_in_float(self.model)
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else from _publish, under the final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, staged: Path, final: Path) -> None:
        self._own_steps |= {self.state.global_step}
        self._note_best(final.parent)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            write_manifest(staged, MODEL_MANIFEST, "*.safetensors")
            if final.exists():  # of an earlier run in this folder
                final.rename(staged.with_name(_REPLACED))  # whoever finds it knows that the other is whole
            staged.rename(final)
            shutil.rmtree(staged.parent)
            rotate_checkpoints(
                str(final.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))


class _OnBegin(TrainerCallback):
    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


@contextmanager
def _named_errors(staging: Path, final: Path) -> Iterator[None]:
    """A full disk and the like: the unfinished files make room, and the error names what is kept."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save's zip writer, among many others of that class
        if isinstance(error, RuntimeError) and not re.search("inline_container|iostream", str(error)):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"{final}: the checkpoint cannot be written ({line_of(error)}) and is not there; "
            f"{kept_checkpoints(final.parent)}. Make room and resume"
        ) from error


def kept_checkpoints(folder: str | Path) -> str:
    """What is left of a run that ends before its time, in words."""
    whole = next((path for path in _by_step(folder) if not _fault_of_file(path)), None)
    return f"the last whole checkpoint is {whole}" if whole else f"there is no checkpoint in {folder}"


def last_checkpoint(folder: str | Path) -> Path:
    """The whole checkpoint with the highest step; unfinished and damaged ones are passed over with a warning.

    Raises:
        ValueError: there is none.
    """
    for path in _by_step(folder):
        fault = _fault_of_file(path)
        if not fault:
            return path
        _logger.warning("%s is not a whole checkpoint (%s): resuming from an earlier one", path, fault)
    raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint-N in {folder}, found none")


def check_checkpoint(path: str | Path) -> None:
    """That a run can go on from it.

    Raises:
        ValueError: it cannot.
    """
    if fault := _fault_of_file(Path(path)):
        raise ValueError(f"resume_from_checkpoint: {path} is not a whole checkpoint ({fault})")


def _finish_replacing(folder: Path) -> None:
    """A process was killed between the two renames that put a checkpoint in the place of another."""
    drop_link(folder / _STAGING)
    if (folder / _STAGING / _REPLACED).is_dir():
        for path in (folder / _STAGING).glob("checkpoint-*"):
            path.rename(folder / path.name)


def _by_step(folder: str | Path) -> list[Path]:
    """Latest first."""
    _finish_replacing(Path(folder))
    named = ((_CHECKPOINT.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*"))
    return [path for _, path in sorted(((int(match[1]), path) for match, path in named if match), reverse=True)]


def _fault_of_file(checkpoint: Path) -> str:
    """What stands in the way of an exact resume, or an empty string."""
    kinds = ("*model*.safetensors", "optimizer.*", "scheduler.pt", "rng_state*.pth", "trainer_state.json")
    found = {kind: sorted(checkpoint.glob(kind)) for kind in kinds}  # FSDP's optimizer.bin, and one random state a rank
    if absent := [kind for kind in kinds if not found[kind]]:
        return f"no {absent[0]}"
    index = sorted(checkpoint.glob("*.safetensors.index.json"))
    for path in (*index, *checkpoint.glob("*.safetensors"), *(path for paths in found.values() for path in paths)):
        try:
            _READERS[path.name.partition(".")[2]](path)
        except Exception as error:  # whatever a damaged file may lead to
            return f"{path.name} cannot be read: {line_of(error)}"
    try:
        check_set(checkpoint, MODEL_MANIFEST)
    except ValueError as error:
        return str(error)
    return ""


def _read_index(path: Path) -> None:
    for name in set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()):
        _read_safetensors(path.parent / name)


def _read_safetensors(path: Path) -> None:
    with safe_open(path, "pt"):  # the header, and that the file is as long as it says
        pass


def _read_pickle(path: Path) -> None:
    """torch's own zip file, whole by its checksums, with nothing in it but tensors and plain values."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _read_state(path: Path) -> None:
    if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
        raise ValueError("expected a JSON object")


_READERS = {
    "safetensors.index.json": _read_index,
    "safetensors": _read_safetensors,
    "pt": _read_pickle,
    "pth": _read_pickle,
    "bin": _read_pickle,
    "json": _read_state,
}
