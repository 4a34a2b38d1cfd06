"""How long a run is where nobody says: five epochs, and on few pictures as many more as make enough steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from clipft.recipes.options import LEAST_STEPS
from clipft.training.arguments import CLIPTrainingArguments

__all__ = ["FewRounds", "Length", "length_of_run"]

_ROUNDS = 5


@dataclass(frozen=True)
class Length:
    """A run as planned.

    Attributes:
        pictures: that it trains on.
        steps_an_epoch: of the optimiser.
        epochs, steps: of the whole run.
        note: why it has not the usual length, in words; empty where it has, or where it was asked for.
    """

    pictures: int
    steps_an_epoch: int
    epochs: float
    steps: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {name: value for name, value in asdict(self).items() if value != ""}


def length_of_run(
    arguments: CLIPTrainingArguments, pictures: int, *, asked: bool, each_epoch: int | None = None
) -> Length:
    """As the arguments have it, or longer.

    Args:
        arguments: of the run; ``max_steps``, where it is set, decides.
        pictures: that it trains on.
        asked: whether the arguments' epochs are somebody's wish.
        each_epoch: of the pictures, where an epoch leaves one out.
    """
    each = _steps_an_epoch(arguments, pictures if each_epoch is None else each_epoch)
    usual = arguments.num_train_epochs
    if arguments.max_steps > 0:
        return Length(pictures, each, arguments.max_steps / each, arguments.max_steps)
    if asked or each * usual >= LEAST_STEPS:
        return Length(pictures, each, usual, math.ceil(each * usual))
    epochs = math.ceil(LEAST_STEPS / each)
    note = (
        f"{pictures} picture{'s' * (pictures != 1)} make{'s' * (pictures == 1)} {each} step{'s' * (each != 1)} an "
        f"epoch: {epochs} epochs instead of {usual:g}, for at least {LEAST_STEPS} steps; --epochs decides otherwise"
    )
    return Length(pictures, each, float(epochs), each * epochs, note)


def _steps_an_epoch(arguments: CLIPTrainingArguments, pictures: int) -> int:
    """As Trainer counts them."""
    if arguments.dataloader_drop_last:
        batches = pictures // arguments.train_batch_size // arguments.world_size
    else:
        batches = math.ceil(math.ceil(pictures / arguments.world_size) / arguments.train_batch_size)
    return max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)


class FewRounds(TrainerCallback):
    """Saves and evaluates a run of many short epochs at most five times, as one of the usual length, not in every
    epoch: a checkpoint may cost more than a step, and the patience of early stopping is for more than one.
    """

    def __init__(self, length: Length) -> None:
        self.every = math.ceil(length.epochs / _ROUNDS)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes after Trainer's own, which asks for both where the strategy is an epoch."""
        if round(state.epoch) % self.every and state.global_step < state.max_steps:
            control.should_evaluate = control.should_save = False
