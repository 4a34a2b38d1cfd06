"""From the options of a verb to ``CLIPTrainingArguments``."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from clipft.models.safe_yaml import read_yaml
from clipft.recipes.options import TrainOptions, own_names
from clipft.training.arguments import CLIPTrainingArguments
from clipft.training.precision import bf16_speedup, fastest_precision

__all__ = ["Heads", "arguments_of", "heads_asked_for"]

RETRIEVAL = tuple(f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
CLASSIFICATION = ("balanced_accuracy", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Heads:
    """Which heads a run trains, and what early stopping looks at.

    Attributes:
        weights: of the attributes' losses, by column.
        trained: whether there is any head.
        columns: data columns beside image, caption and label.
        metric: the name without ``eval_``.
    """

    weights: dict[str, float]
    trained: bool
    columns: list[str]
    metric: str


def heads_asked_for(options: TrainOptions) -> Heads:
    """By ``head``, ``attribute`` and ``metric``.

    Raises:
        ValueError: one of these does not fit.
    """
    weights = _attribute_weights(options.attribute or ())
    columns = [name for name in weights if name != "label"]
    own = RETRIEVAL if options.head == "none" else CLASSIFICATION
    known = ("loss", *own, *(f"{name}_{kind}" for name in columns for kind in CLASSIFICATION))
    if options.metric is not None and options.metric not in known:
        raise ValueError(f"metric: expected one of {', '.join(known)}, got {options.metric!r}")
    return Heads(weights, options.head != "none" or bool(weights), columns, options.metric or own[0])


def _attribute_weights(given: Iterable[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for entry in given:
        name, equals, number = entry.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"attribute: expected NAME or NAME=WEIGHT, got {entry!r}") from error
        if not 0.0 < weight < math.inf:
            raise ValueError(f"attribute: expected a weight above 0, got {entry!r}")
        if not name or name in weights:
            raise ValueError(f"attribute: expected each column once, as NAME or NAME=WEIGHT, got {entry!r}")
        weights[name] = weight
    return weights


def arguments_of(options: TrainOptions, folder: Path, heads: Heads, console: Console) -> CLIPTrainingArguments:
    """The arguments of a run that leaves its files in ``folder``."""
    accelerated = torch.accelerator.is_available()
    precision = _fastest_here(console) if options.precision == "auto" else options.precision
    named = {
        field.metadata["argument"]: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if "argument" in field.metadata
    }
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "feature_cache": str(folder / "features"),
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 5,
        "disable_tqdm": True,
        "dataloader_pin_memory": accelerated,
        "use_cpu": not accelerated,
        "log_level": "error",
        **named,
        "per_device_eval_batch_size": options.batch_size,
        "attributes": heads.weights,
        "class_weights": _class_weights(options.class_weights),
        "class_balanced": bool(options.class_balanced),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "report_to": list(options.report_to or []) or "none",
    }
    if options.epochs is not None:
        values["num_train_epochs"] = options.epochs
    if options.template:
        values["caption_templates"] = list(options.template)
    if options.gradient_checkpointing:  # transformers warns of False too
        values["gradient_checkpointing"] = True
    if options.early_stopping_patience:
        best = {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{heads.metric}"}
        values |= {"eval_strategy": "epoch", **best}
    return CLIPTrainingArguments(**(values | _further(_parsed(options.set or ()))))


def _parsed(given: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE each, the value as in YAML."""
    values = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"set: expected NAME=VALUE, got {entry!r}")
        try:
            values[name.replace("-", "_")] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"set: {name}: {error}") from error
    return values


def _further(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of transformers' arguments that no option is for."""
    known = {field.name for field in dataclasses.fields(CLIPTrainingArguments) if field.init}
    options = own_names()
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"set: {name!r} is no field of TrainingArguments" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if name in options:
            raise ValueError(f"set: {name!r} has an option of its own, {options[name]}")
    return dict(values)


def _class_weights(given: str | None) -> str | list[float] | None:
    if given is None or given == "balanced":
        return given
    try:
        return [float(number) for number in given.split(",")]
    except ValueError as error:
        raise ValueError(f"class_weights: expected balanced, or numbers as 1,2.5, got {given!r}") from error


def _fastest_here(console: Console) -> str:
    """ "bf16" or "fp32", as measured on this machine."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    chosen = fastest_precision(device)
    console.print(f"--precision auto: {chosen}; bfloat16 takes {1 / bf16_speedup(device):.2f} of float32's time here")
    return chosen
