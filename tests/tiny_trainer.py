"""A trainer of a tiny model, and what tests ask of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_clip import tiny_clip
from transformers import TrainerCallback

import clipft


def arguments(folder: Path, **options: Any) -> clipft.CLIPTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return clipft.CLIPTrainingArguments(**(defaults | options))


def trainer_of(
    folder: Path, train: Any, test: Any = None, *, loaded: Any = None, callbacks: Any = None, **options: Any
) -> clipft.CLIPTrainer:
    """Of the tiny CLIP, or of ``loaded``, a model and its processor."""
    model, processor = loaded or tiny_clip()
    return clipft.CLIPTrainer(
        model,
        arguments(folder, **options),
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        callbacks=callbacks,
    )


def losses(trainer: clipft.CLIPTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == other_name and torch.equal(a, b) for (name, a), (other_name, b) in pairs)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True
