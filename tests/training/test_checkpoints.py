"""Checkpoints of clipft.CLIPTrainer: exact resume, whole or not there, and what a damaged one is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import captioned
from tiny_trainer import StopAfter, losses, same, trainer_of
from transformers import CLIPModel, EarlyStoppingCallback

import clipft
from clipft.training.checkpoints import last_checkpoint

EXACT: dict[str, Any] = {
    "num_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "random_resized_crop": 0.5,
    "horizontal_flip": 0.5,
    "color_jitter": 0.3,
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 4])  # within the second epoch, and at its end
def test_resume_gives_the_result_of_an_unbroken_run(tmp_path: Path, workers: int, stop: int) -> None:
    train = captioned(27, captions=2)
    options = EXACT | {"dataloader_num_workers": workers, "save_steps": stop}
    whole = trainer_of(tmp_path / "whole", train, **options)
    whole.train()
    broken = trainer_of(tmp_path / "broken", train, callbacks=[StopAfter(stop)], **options)
    broken.train()
    resumed = trainer_of(tmp_path / "broken", train, **options)
    torch.manual_seed(12345)  # of no influence
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert losses(resumed) == losses(whole)
    assert same(resumed.model, whole.model)
    assert not same(broken.model, whole.model)


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_runs_curve_is_that_of_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    """Saved between two points of it."""
    options: dict[str, Any] = {"logging_steps": 3, "save_strategy": "steps", "save_steps": stop, "num_train_epochs": 4}
    data = captioned(16)
    whole = trainer_of(tmp_path / "whole", data, **options)
    whole.train()
    trainer_of(tmp_path / "broken", data, callbacks=[StopAfter(stop)], **options).train()
    resumed = trainer_of(tmp_path / "broken", data, **options)
    own = resumed.train(resume_from_checkpoint=True).training_loss
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 2
    each = trainer_of(tmp_path / "each", data, **options | {"logging_steps": 1})
    each.train()
    assert own == pytest.approx(sum(losses(each)[stop:]) / (8 - stop), rel=1e-5)


def test_a_scaler_of_another_precision_is_passed_over(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, captioned(8), callbacks=[StopAfter(1)], **options).train()
    torch.save({"scale": 65536.0}, tmp_path / "checkpoint-1" / "scaler.pt")
    resumed = trainer_of(tmp_path, captioned(8), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_resume_keeps_the_patience_left(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_train_epochs": 9,
        "learning_rate": 0.0,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_text_to_image_R@1",
    }
    data = captioned(8)
    trainer_of(tmp_path, data, data, callbacks=[EarlyStoppingCallback(3), StopAfter(3)], **options).train()
    resumed = trainer_of(tmp_path, data, data, callbacks=[EarlyStoppingCallback(3)], **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.epoch == 4


def test_unfinished_checkpoints_are_passed_over(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, captioned(16), callbacks=[StopAfter(2)], **options).train()
    for name, missing in (
        ("checkpoint-7", "optimizer.pt"),
        ("checkpoint-8", "model.safetensors"),
        ("checkpoint-9", ""),
    ):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
        if missing:
            (tmp_path / name / missing).unlink()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "lo')
    (tmp_path / "tmp-checkpoint" / "checkpoint-10").mkdir(parents=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    resumed = trainer_of(tmp_path, captioned(16), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert not (tmp_path / "tmp-checkpoint").exists()


def test_a_wrong_byte_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    trainer_of(tmp_path, captioned(16), save_strategy="steps", save_steps=1).train()
    path = max(tmp_path.glob("checkpoint-*")) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1001] ^= 0x40
    path.write_bytes(data)
    assert last_checkpoint(tmp_path) != path.parent
    with pytest.raises(ValueError, match=r"is not a whole checkpoint .* model.safetensors not as clipft_files.json"):
        trainer_of(tmp_path, captioned(16)).train(resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_takes_the_place_of_another_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames: the new one is whole, and found."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, captioned(16), **options).train()
    before = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == tmp_path / "checkpoint-2":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        trainer_of(tmp_path, captioned(16), **options, learning_rate=0.1).train()
    assert not (tmp_path / "checkpoint-2").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes() != before


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a whole checkpoint-N in"):
        trainer_of(tmp_path, captioned(8)).train(resume_from_checkpoint=True)


def test_a_checkpoint_has_its_name_only_when_whole(tmp_path: Path) -> None:
    """Writing fails at the last file: nothing called checkpoint-2 may be left, and checkpoint-1 must still resume."""
    trainer = trainer_of(tmp_path, captioned(16), save_strategy="steps", save_steps=1)
    save = trainer._save_rng_state

    def full_disk(folder: str) -> None:
        if trainer.state.global_step == 2:
            raise OSError("No space left on device")
        save(folder)

    trainer._save_rng_state = full_disk  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()


def test_only_so_many_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(32), save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-7", "checkpoint-8"]


def test_a_checkpoint_loads_as_a_plain_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8), save_strategy="epoch")
    trainer.train()
    model, processor = clipft.load(tmp_path / "checkpoint-2")
    assert type(model) is CLIPModel
    assert same(model, trainer.model)
    assert processor.tokenizer.model_max_length == trainer.processing_class.tokenizer.model_max_length
