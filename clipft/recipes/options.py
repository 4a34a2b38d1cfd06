"""The options of each verb, one dataclass a verb: command line, ``config.yaml`` and function are made from it.

A field's metadata: ``help``; ``group``, its heading in ``--help``; ``argument``, the field of ``CLIPTrainingArguments``
that it sets, whose default it has; ``choices``, ``least``, ``most``; ``flag``, its name on the command line where that
is not its own; ``text``: on the command line a string, in Python also rows. Imports nothing heavy: ``clipft --help``
reads it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from clipft.families.losses import LOSSES

__all__ = [
    "DATA",
    "GROUPS",
    "LEAST_STEPS",
    "MODEL",
    "RUN",
    "ClassOptions",
    "DataOptions",
    "DetectorOptions",
    "DoctorOptions",
    "EvaluateOptions",
    "ScoringOptions",
    "TrainOptions",
    "nearest",
    "option",
    "options_from",
    "own_names",
]

Options = TypeVar("Options")

DATA = "Data"
MODEL = "Model and what trains"
SCHEDULE = "Schedule"
BATCHES = "Batches, memory and speed"
LOSS = "Loss"
HEADS = "Heads"
AUGMENTATION = "Augmentation"
FORGETTING = "Against forgetting"
RUN = "The run"
LEAST_STEPS = 100  # of a run whose --epochs nobody gave: docs/notes/2026-11-29-small-sets.md
GROUPS = (DATA, MODEL, SCHEDULE, BATCHES, LOSS, HEADS, AUGMENTATION, FORGETTING, RUN)  # as --help has them


def option(default: Any, help: str, group: str = "", **more: Any) -> Any:  # noqa: A002  (click's word)
    """A field of an options class; ``more``: the rest of its metadata."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **more})


def options_from(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """The options of a call.

    Raises:
        TypeError: there is no such option; the message has the nearest one.
        ValueError: a value is outside of what the option takes.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            near = nearest(name, [*fields, "output"])
            hint = f"; did you mean {near!r}?" if near else f"; there are {', '.join(fields)}"
            raise TypeError(f"{name}: no such option{hint}")
    for name, value in values.items():
        _check(name, value, fields[name].metadata)
    several = {name: [value] for name, value in values.items() if _is_list(fields[name]) and isinstance(value, str)}
    return kind(**{**values, **several})


def own_names() -> dict[str, str]:
    """The options of training that are fields of transformers' ``TrainingArguments``, by the field's name."""
    fields = {f.metadata["argument"]: f.name for f in dataclasses.fields(TrainOptions) if "argument" in f.metadata}
    return fields | {"learning_rate": "lr", "num_train_epochs": "epochs", "output_dir": "output"}


def nearest(name: str, known: Collection[str]) -> str | None:
    """Of the known names the one that was meant: transformers' name of it was given, or one that is spelt alike."""
    own = own_names().get(name)
    return own if own in known else next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _is_list(field: dataclasses.Field[Any]) -> bool:
    return str(field.type).startswith("Sequence")


def _check(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    choices, least, most = (metadata.get(key) for key in ("choices", "least", "most"))
    if choices is not None and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint}")
    if value is None or (least is None and most is None):
        return
    below, above = least is not None and not value >= least, most is not None and not value <= most
    if below or above:
        limits = " and ".join([f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None))
        raise ValueError(f"{name}: expected {limits}, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data is read, the same in every verb."""

    split: str | None = option(
        None, "Split of --data, if it has several; of any data also as NAME:SPLIT. Default: by what it is for.", DATA
    )
    image_column: str | None = option(None, "Column of pictures, if it has no usual name.", DATA)
    caption_column: str | None = option(None, "Column of captions, if it has no usual name.", DATA)
    label_column: str | None = option(None, "Column of labels, if it has no usual name.", DATA)
    encoding: str | None = option(None, "Of text tables that are not UTF-8, for instance latin-1.", DATA)

    max_pixels: int | None = option(
        None, "Most of a picture; one with more is a bad row. Default: 89 million.", DATA, least=1
    )
    on_bad_row: str = option(
        "error", "A row without caption or readable picture: an error, or left out.", DATA, choices=("error", "skip")
    )
    allow_outside: bool = option(
        False, "Let the paths in a data file leave its folder.", DATA, flag="--allow-outside-paths"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassOptions(DataOptions):
    """How data with classes is read."""

    class_names: Any = option(
        None, "File that gives classes other names: a line has a class, a tab and its name in words.", DATA, text=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions(ClassOptions):
    """What ``clipft.doctor`` and ``clipft doctor`` take besides data, model and output."""

    image_size: int | None = option(None, "As of train: look at the pictures as a model of this size does.", least=1)
    max_tokens: int | None = option(None, "As of train: look at the captions as a model of this many does.", least=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringOptions(ClassOptions):
    """What pictures of a test set are told apart by, and how sure an answer has to be."""

    classes: Sequence[str] | None = option(
        None,
        "Classes that the test set is scored against: a,b or a file with a line each; or repeat. Default: its own and "
        "those of training.",
        DATA,
    )
    precision_at: float | None = option(
        None,
        "Choose the least probability of an answer: the share of the answers that is to be right, as 0.95.",
        HEADS,
        least=0.01,
        most=1.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(ScoringOptions):
    """What ``clipft.train`` and ``clipft train`` take besides model, data and output."""

    eval_data: Any = option(None, "Data tested on before and after; default: a fifth of --data.", DATA, text=True)
    freeze: str = option(
        "none",
        "text or vision: that tower stays; text:N or vision:N: it stays but for its last N layers; towers: both stay "
        "but for their projections. The other tower trains whole unless a comma adds it (text,vision:2), the logit "
        "scale always.",
        MODEL,
    )
    image_size: int | None = option(
        None, "Pixels a side of pictures, if not the model's own: its positions are resized.", MODEL, least=1
    )
    max_tokens: int | None = option(
        None, "Most tokens of a caption: 248 stretches a CLIP's positions, as Long-CLIP does.", MODEL, least=2
    )
    epochs: float | None = option(
        None,
        f"Passes over the data; default: 5, or so many that there are {LEAST_STEPS} steps.",
        SCHEDULE,
        least=0.0,
    )
    batch_size: int = option(
        32, "Pairs a step; all are negatives of each other.", BATCHES, argument="per_device_train_batch_size", least=1
    )
    grad_cache_chunk_size: int | None = option(
        None,
        "Pairs that the towers see at once: a large --batch-size at this one's memory.",
        BATCHES,
        argument="grad_cache_chunk_size",
        least=1,
    )
    auto_batch: bool = option(
        False, "Choose --grad-cache-chunk-size: what fits into memory.", BATCHES, argument="auto_batch"
    )
    gradient_checkpointing: bool = option(False, "Keep less of the forward pass and compute it again.", BATCHES)
    lora_r: int | None = option(
        None, "Train a LoRA adapter of this rank, and nothing else; 16 is usual.", MODEL, least=1
    )
    lora_alpha: float | None = option(
        None, "The adapter's output is multiplied by alpha / r; default: twice the rank.", MODEL
    )
    lora_dropout: float = option(0.1, "Dropout of the adapter's input.", MODEL, least=0.0, most=0.99)
    lora_targets: Sequence[str] | None = option(
        None, "Adapted layers: text, vision.8-11, vision.last2:q_proj,v_proj, q_proj, ...; repeat for several.", MODEL
    )
    frozen: str = option(
        "float",
        "int8: linear layers that do not train, beneath an adapter or by --freeze, compute in int8; what is scored, "
        "merged and saved is float.",
        BATCHES,
        choices=("float", "int8"),
    )
    lr: float | None = option(
        None, "Peak learning rate; default by the model's size: ViT-B 1e-5, with LoRA 2e-4.", SCHEDULE, least=0.0
    )
    warmup_ratio: float = option(
        0.1, "Share of the steps with a rising rate.", SCHEDULE, argument="warmup_steps", least=0.0, most=0.99
    )
    weight_decay: float = option(
        0.1, "Of matrices; biases, norms and the scale have none.", SCHEDULE, argument="weight_decay", least=0.0
    )
    max_grad_norm: float = option(
        1.0, "Gradient clipping; 0 turns it off.", SCHEDULE, argument="max_grad_norm", least=0.0
    )
    loss: str = option(
        "auto",
        "auto is the model's own: contrastive for CLIP, sigmoid for SigLIP, which takes either.",
        LOSS,
        argument="loss",
        choices=("auto", *LOSSES),
    )
    label_smoothing: float = option(
        0.0, "Smoothing of the loss's targets.", LOSS, argument="label_smoothing_factor", least=0.0, most=0.99
    )
    head: str = option(
        "none",
        "text: train a classifier of the labels, started as zero-shot, in place of the pairs.",
        HEADS,
        argument="head",
        choices=("none", "text"),
    )
    attribute: Sequence[str] | None = option(
        None, "NAME or NAME=WEIGHT: a column of classes, whose own head's loss is added; repeat for several.", HEADS
    )
    head_loss: str = option(
        "cross_entropy",
        "Loss of --head and --attribute.",
        HEADS,
        argument="head_loss",
        choices=("cross_entropy", "focal", "dice"),
    )
    focal_gamma: float = option(2.0, "Of the focal loss: 0 is cross-entropy.", HEADS, argument="focal_gamma", least=0.0)
    class_weights: str | None = option(
        None, "In the heads' loss: balanced (rare classes weigh more), or numbers, as 1,2.5, by class name.", HEADS
    )
    precision: str = option(
        "fp32",
        "Mixed precision: auto takes bf16 where it measures faster; fp16 needs a GPU. int8, on a CPU: linear layers "
        "that train compute forward and their input's gradient in int8; weights and what is scored are float32.",
        BATCHES,
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
    )
    class_balanced: bool | None = option(
        None,
        "Equally many pictures of each class in a batch; default: where captions are made of classes, the largest has "
        "more than 1.5 times the pictures of the smallest, and nothing else is done about it.",
        BATCHES,
    )
    hard_negatives: int = option(
        0,
        "Batches of pairs that are hard to tell apart, mined each epoch: most meet so many of their hardest negatives.",
        BATCHES,
        argument="hard_negatives",
        least=0,
    )
    gradual_unfreezing: float = option(
        0.0,
        "Epochs after which one more layer trains, from the top down; 0: all at once.",
        MODEL,
        argument="gradual_unfreezing",
        least=0.0,
    )
    layer_decay: float = option(
        1.0,
        "Learning rate of a layer over that of the layer above; 0.75 is usual.",
        SCHEDULE,
        argument="layer_decay",
    )
    ema_decay: float = option(
        0.0,
        "Keep an average of the weights over the steps; 0.999 is usual, 0 turns it off.",
        SCHEDULE,
        argument="ema_decay",
    )
    workers: int = option(
        0, "Processes that load and augment pictures.", DATA, argument="dataloader_num_workers", least=0
    )
    augmentation: str = option(
        "auto",
        "Random changes to training pictures: auto is crop in runs of more than 5 epochs that train the image tower, "
        "else none; the six options below override.",
        AUGMENTATION,
        argument="augmentation",
        choices=("auto", "none", "crop", "light", "strong", "industrial", "medical"),
    )
    random_resized_crop: float | None = option(
        None,
        "Random crops that keep at least this share of the area, as 0.8; 0: none.",
        AUGMENTATION,
        argument="random_resized_crop",
    )
    horizontal_flip: float | None = option(
        None,
        "Probability of a mirror image. Not for text in pictures, nor radiographs.",
        AUGMENTATION,
        argument="horizontal_flip",
    )
    color_jitter: float | None = option(
        None, "Strength of random colour, to 0.5. Not where colour matters.", AUGMENTATION, argument="color_jitter"
    )
    rotation: float | None = option(None, "Largest random rotation, in degrees.", AUGMENTATION, argument="rotation")
    noise: float | None = option(
        None, "Largest random noise, as a share of the brightness.", AUGMENTATION, argument="noise"
    )
    blur: float | None = option(
        None, "Largest random blur, in pixels of the model's input.", AUGMENTATION, argument="blur"
    )
    template: Sequence[str] | None = option(None, "Caption of a class, with one {}; repeat for several.", DATA)
    seed: int = option(42, "Of the order, the augmentation and the held-out split.", DATA, argument="seed")
    control_data: Any = option(
        "drawings",
        "What must not be forgotten, scored before and after: drawings (in the package), none, or data.",
        FORGETTING,
        text=True,
    )
    l2_sp: float = option(
        0.0, "Pull to the starting weights, for instance 0.01.", FORGETTING, argument="l2_sp", least=0.0
    )
    distillation: float = option(
        0.0,
        "Pull to the starting model's embeddings of the batch, for instance 1.",
        FORGETTING,
        argument="distillation",
        least=0.0,
    )
    wise_ft: bool = option(
        False, "Choose among weights between start and end by rows held out of training.", FORGETTING
    )
    report_to: Sequence[str] | None = option(
        None, "tensorboard, wandb or whatever else transformers reports to; repeat for several.", RUN
    )
    set: Sequence[str] | None = option(
        None, "NAME=VALUE: any other field of transformers' TrainingArguments; repeat for several.", RUN
    )
    resume: bool = option(False, "Go on from the last whole checkpoint in --output, if it is of this same run.", RUN)
    force: bool = option(False, "Go on from another run's checkpoint too: other data, seed or settings.", RUN)
    early_stopping_patience: int | None = option(
        None, "Stop after so many epochs without a better --metric; keep the best.", RUN, least=1
    )
    metric: str | None = option(
        None,
        "For early stopping: loss, image_to_text_R@1 (the default), text_to_image_R@5, ...; with --head "
        "balanced_accuracy (the default), accuracy, macro_f1.",
        RUN,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorOptions(DataOptions):
    """What anomalies are told by."""

    normal: Any = option(None, "Normal pictures, two or more: a folder, table, or data set's name.", text=True)
    memory: str | None = option(
        None, "File of what normal pictures look like: written with --normal where it is not there yet, else read."
    )
    normal_text: Sequence[str] | None = option(
        None, 'What is normal in words, for instance "a good tile"; repeat for several.'
    )
    anomaly_text: Sequence[str] | None = option(None, 'What is not, for instance "a cracked tile"; repeat for several.')
    zoom: float | None = option(
        None,
        "How many times smaller than the picture the windows are that it is seen through, besides those of twice the "
        "size; 1: as a whole. Default: what lays 18 patches along its shorter side.",
        least=1.0,
        most=16.0,
    )
    coreset: float = option(
        0.1,
        "Share of the normal patches that the memory keeps; 5000 of each size of windows at the most.",
        least=0.001,
        most=1.0,
    )
    seed: int = option(0, "Of the choice of these patches.", least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ScoringOptions, DetectorOptions):
    """What ``clipft.evaluate`` and ``clipft evaluate`` take besides model, data and output."""

    batch_size: int = option(64, "Pictures at a time.", least=1)
    workers: int = option(0, "Processes that load pictures.", least=0)
    template: Sequence[str] | None = option(None, "Caption of a class, with one {}; repeat for several.")
    probe_data: Any = option(None, "Labelled pictures of the same classes that fit a linear probe and kNN.", text=True)
    attribute: Sequence[str] | None = option(None, "A column that the model has a head for; repeat for several.")
    knn_k: int = option(20, "Neighbours of kNN.", least=1)
    anomaly: bool = option(
        False,
        "How well defects are found: --data has train/good, test/good, test/KIND and ground_truth/KIND (MVTec AD).",
    )
