"""The parts of a training run: its rows, arguments, adapter, Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from clipft.data.columns import checked_attributes
from clipft.data.reading import Reading
from clipft.data.rows import class_names_of, class_targets
from clipft.data.sampling import classes_are_uneven
from clipft.data.sources import load_reading
from clipft.models.lora import add_lora
from clipft.training.arguments import CLIPTrainingArguments
from clipft.training.checkpoints import last_checkpoint
from clipft.training.precision import bf16_speedup, fastest_precision
from clipft.training.progress import ProgressReport
from clipft.training.trainer import CLIPTrainer

__all__ = [
    "Sets",
    "drawn_by_class",
    "early_stopping",
    "fastest_here",
    "load_sets",
    "resume_point",
    "trainer_of",
    "training_arguments",
    "with_adapter",
]

HELD_OUT = 0.2  # share of the data tested on where no test data is given
VALIDATION = 0.1  # share of the training data that early stopping looks at


@dataclass(frozen=True)
class Sets:
    """The rows of a run. ``validation`` chooses the epoch, if early stopping is on, and is no part of ``test``."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    test_name: str
    skipped: dict[str, list[str]]  # by source, why each row was left out


def load_sets(
    data: str,
    eval_data: str | None,
    *,
    validate: bool,
    seed: int,
    console: Console,
    skip_bad_rows: bool,
    allow_outside: bool,
    attribute_columns: list[str],
) -> Sets:
    """Training, test and, with ``validate``, validation rows: what is not given is held out of training."""
    skipped: dict[str, list[str]] = {}

    def load(source: str) -> datasets.Dataset:
        how = Reading(
            skip=skip_bad_rows,
            allow_outside=allow_outside,
            attributes=checked_attributes(attribute_columns),
        )
        rows, skipped[source] = load_reading(source, how), how.skipped
        return rows

    train, validation = load(data), None
    if eval_data is None:
        train, test = _hold_out(train, HELD_OUT, seed)
        test_name = f"{len(test)} pictures of {data}, held out of training (seed {seed})"
    else:
        test = load(eval_data)
        test_name = f"{len(test)} pictures of {eval_data}"
    if validate:
        train, validation = _hold_out(train, VALIDATION, seed)
    console.print(f"training on {len(train)} pictures of {data}; testing on {test_name}")
    if validation is not None:
        console.print(f"{len(validation)} more pictures, held out of training, choose the epoch or the weights")
    return Sets(train, validation, test, test_name, skipped if skip_bad_rows else {})


def _hold_out(dataset: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A split that depends on the data and the seed alone, with each class's share where there are classes."""
    by = "label" if class_names_of(dataset) else None
    try:
        parts = dataset.train_test_split(test_size=share, seed=seed, stratify_by_column=by)
    except ValueError as error:
        raise ValueError(
            f"--data: {len(dataset)} rows are too few to hold some out ({error}); give --eval-data"
        ) from error
    return parts["train"], parts["test"]


def with_adapter(
    base: Any, rank: int, alpha: float | None, dropout: float, targets: list[str] | None, seed: int
) -> Any:
    """The model with a fresh adapter; ``alpha``: twice the rank where nobody names one."""
    set_seed(seed)  # the adapter starts from random numbers
    return add_lora(base, rank, 2 * rank if alpha is None else alpha, dropout, targets or ("vision", "text"))


def training_arguments(output: Path, **options: Any) -> Any:
    """Of a run that leaves its files in ``output``; ``options`` are those of ``CLIPTrainingArguments``."""
    defaults: dict[str, Any] = {
        "output_dir": str(output / "checkpoints"),
        "feature_cache": str(output / "features"),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 5,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "log_level": "error",
    }
    return CLIPTrainingArguments(**(defaults | options))


def drawn_by_class(asked: bool | None, rows: datasets.Dataset, arguments: Any, console: Console) -> bool:
    """Where nobody asked, uneven classes are drawn evenly, unless the loss sees to rare ones or batches are mined."""
    others = arguments.class_weights is not None or arguments.head_loss != "cross_entropy" or arguments.hard_negatives
    if asked is not None:
        return asked
    if others or not classes_are_uneven(rows, arguments.train_batch_size):
        return False
    console.print("classes are uneven: batches have equally many pictures of each (--no-class-balanced: as they come)")
    return True


def fastest_here(console: Console) -> str:
    """ "bf16" or "fp32", as measured on this machine."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    chosen = fastest_precision(device)
    console.print(f"--precision auto: {chosen}; bfloat16 takes {1 / bf16_speedup(device):.2f} of float32's time here")
    return chosen


def early_stopping(metric: str) -> dict[str, Any]:
    """The arguments that keep the best of the epochs."""
    return {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{metric}",
    }


def trainer_of(clip: Any, processor: Any, arguments: Any, *, sets: Sets, patience: int | None, console: Console) -> Any:
    """The Trainer of a run, with a bar for its progress; ``patience``: of early stopping, if any."""
    trainer = CLIPTrainer(
        clip,
        arguments,
        train_dataset=sets.train,
        eval_dataset=sets.validation,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    _check_test_set(trainer, sets.test)
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        report = ProgressReport(console)
        trainer.add_callback(report)
        trainer.progress = report.track
    return trainer


def resume_point(output: Path, console: Console) -> str | None:
    """The last whole checkpoint of the run in ``output``, None where it has none yet."""
    if not any((output / "checkpoints").glob("checkpoint-*")):
        console.print(f"--resume: no checkpoint in {output} yet, starting from the beginning")
        return None
    checkpoint = last_checkpoint(output / "checkpoints")
    console.print(f"resuming from {checkpoint}")
    return str(checkpoint)


def _check_test_set(trainer: Any, test: Any) -> None:
    """That the run's heads know the classes of the test set, before an hour of training."""
    for name, classes in trainer.head_classes.items():
        class_targets(test, name, classes)
