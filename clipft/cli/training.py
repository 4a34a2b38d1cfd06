"""Commands that train and score: ``clipft demo``, ``clipft train``, ``clipft evaluate``."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from clipft.cli.common import (
    AllowOutside,
    BadRows,
    BatchSize,
    Data,
    Model,
    OnBadRow,
    Workers,
    app,
    output_folder,
    prepare,
    user_errors,
)
from clipft.cli.config import Config
from clipft.cli.heads import (
    AttributeNames,
    Attributes,
    ClassWeights,
    FocalGamma,
    Head,
    HeadLoss,
    attribute_weights,
    check_attributes,
    check_test_set,
    chosen_metric,
    class_weight_values,
)
from clipft.cli.outcome import (
    L2SP,
    ControlData,
    Distillation,
    Outcome,
    ReportTo,
    WiseFT,
    check_report_to,
    control_set,
)
from clipft.cli.panels import Grouped
from clipft.families.losses import LOSSES

if TYPE_CHECKING:
    import datasets

HELD_OUT = 0.2  # share of the data tested on where no test data is given
VALIDATION = 0.1  # share of the training data that early stopping looks at


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


if TYPE_CHECKING:
    Loss = str
else:
    Loss = StrEnum("Loss", ["auto", *LOSSES])


class AugmentationSet(StrEnum):
    """Sets of random changes, ``clipft.data.transforms.AUGMENTATIONS``, which says when each harms."""

    auto = "auto"
    none = "none"
    crop = "crop"
    light = "light"
    strong = "strong"
    industrial = "industrial"
    medical = "medical"


Templates = Annotated[
    list[str] | None, typer.Option("--template", help="Caption of a class, with one {}; repeat for several.")
]


@app.command()
@user_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, report.json and queries.png.")] = Path(
        "clipft-demo"
    ),
) -> None:
    """Fine-tune an embedded model on embedded pictures, offline, and show what it gained."""
    console = prepare()
    from clipft.demo import run

    run(output, console)


@app.command(cls=Grouped)
@user_errors
def train(
    context: typer.Context,
    *,
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder for the model, report.json and checkpoints.")],
    eval_data: Annotated[
        str | None, typer.Option(help="Data tested on before and after; default: a fifth of --data.")
    ] = None,
    freeze: Annotated[
        str, typer.Option(help="none, text, vision, towers, vision:N or text:N (last N layers train).")
    ] = "none",
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the data.")] = 5.0,
    batch_size: BatchSize = 32,
    grad_cache_chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs that the towers see at once: a large --batch-size at this one's memory."),
    ] = None,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Choose --grad-cache-chunk-size: what fits into memory.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Keep less of the forward pass and compute it again.")
    ] = False,
    lora_r: Annotated[
        int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank, and nothing else; 16 is usual.")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="The adapter's output is multiplied by alpha / r; default: twice the rank.")
    ] = None,
    lora_dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="Dropout of the adapter's input.")] = 0.1,
    lora_targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapted layers: text, vision.8-11, vision.last2:q_proj,v_proj, q_proj, ...; repeat for several."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0.0, help="Peak learning rate; default by the model's size: ViT-B 1e-5, with LoRA 2e-4."),
    ] = None,
    warmup_ratio: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the steps with a rising rate.")
    ] = 0.1,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Of matrices; biases, norms and the scale have none.")
    ] = 0.1,
    max_grad_norm: Annotated[float, typer.Option(min=0.0, help="Gradient clipping; 0 turns it off.")] = 1.0,
    loss: Annotated[
        Loss,
        typer.Option(help="auto is the model's own: contrastive for CLIP, sigmoid for SigLIP, which takes either."),
    ] = Loss("auto"),  # noqa: B008  (an enum member)
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=0.99, help="Smoothing of the loss's targets.")] = 0.0,
    head: Annotated[
        Head, typer.Option(help="text: train a classifier of the labels, started as zero-shot, in place of the pairs.")
    ] = Head.none,
    attribute: Attributes = None,
    head_loss: Annotated[HeadLoss, typer.Option(help="Loss of --head and --attribute.")] = HeadLoss.cross_entropy,
    focal_gamma: FocalGamma = 2.0,
    class_weights: ClassWeights = None,
    precision: Annotated[
        Precision, typer.Option(help="Mixed precision: auto takes bf16 where it measures faster; fp16 needs a GPU.")
    ] = Precision.fp32,
    class_balanced: Annotated[
        bool | None,
        typer.Option(
            help="Equally many pictures of each class in a batch; default: where captions are made of classes, the "
            "largest has more than 1.5 times the pictures of the smallest, and nothing else is done about it."
        ),
    ] = None,
    hard_negatives: Annotated[
        int,
        typer.Option(min=0, help="Put each pair into a batch with so many of its hardest negatives, mined each epoch."),
    ] = 0,
    gradual_unfreezing: Annotated[
        float,
        typer.Option(min=0.0, help="Epochs after which one more layer trains, from the top down; 0: all at once."),
    ] = 0.0,
    layer_decay: Annotated[
        float, typer.Option(help="Learning rate of a layer over that of the layer above; 0.75 is usual.")
    ] = 1.0,
    ema_decay: Annotated[
        float, typer.Option(help="Keep an average of the weights over the steps; 0.999 is usual, 0 turns it off.")
    ] = 0.0,
    workers: Workers = 0,
    on_bad_row: BadRows = OnBadRow.error,
    allow_outside: AllowOutside = False,
    augmentation: Annotated[
        AugmentationSet,
        typer.Option(
            help="Random changes to training pictures: auto is crop in runs of more than 5 epochs that train the image "
            "tower, else none; the six options below override."
        ),
    ] = AugmentationSet.auto,
    random_resized_crop: Annotated[
        float | None, typer.Option(help="Random crops that keep at least this share of the area, as 0.8; 0: none.")
    ] = None,
    horizontal_flip: Annotated[
        float | None, typer.Option(help="Probability of a mirror image. Not for text in pictures, nor radiographs.")
    ] = None,
    color_jitter: Annotated[
        float | None, typer.Option(help="Strength of random colour, to 0.5. Not where colour matters.")
    ] = None,
    rotation: Annotated[float | None, typer.Option(help="Largest random rotation, in degrees.")] = None,
    noise: Annotated[float | None, typer.Option(help="Largest random noise, as a share of the brightness.")] = None,
    blur: Annotated[float | None, typer.Option(help="Largest random blur, in pixels of the model's input.")] = None,
    template: Templates = None,
    seed: Annotated[int, typer.Option(help="Of the order, the augmentation and the held-out split.")] = 42,
    control_data: ControlData = "drawings",
    l2_sp: L2SP = 0.0,
    distillation: Distillation = 0.0,
    wise_ft: WiseFT = False,
    report_to: ReportTo = None,
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint in --output.")] = False,
    early_stopping_patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many epochs without a better --metric; keep the best."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="For early stopping: loss, image_to_text_R@1 (the default), text_to_image_R@5, ...; with --head "
            "balanced_accuracy (the default), accuracy, macro_f1."
        ),
    ] = None,
) -> None:
    """Fine-tune a model and report what it gained."""
    output_folder(output)
    attributes = attribute_weights(attribute or ())
    metric = chosen_metric(metric, head, attributes)
    if lora_r is not None and (head is not Head.none or attributes):
        raise ValueError("--head, --attribute: not with --lora-r, whose adapter is saved without heads")
    if lora_r is not None and freeze != "none":
        raise ValueError(f"--freeze: expected none with --lora-r, which freezes all but the adapter, got {freeze!r}")
    check_report_to(report_to or [])
    console = prepare()
    from clipft.evaluation.scoring import Scorer
    from clipft.files import save_model
    from clipft.models.freezing import freeze as freeze_model
    from clipft.models.fusing import unfuse
    from clipft.models.loading import load
    from clipft.training.arguments import default_learning_rate
    from clipft.training.wise_ft import WeightLine

    arguments = _training_arguments(
        output,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        warmup_steps=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        loss=str(loss),
        label_smoothing_factor=label_smoothing,
        head=head.value,
        attributes=attributes,
        head_loss=head_loss.value,
        focal_gamma=focal_gamma,
        class_weights=class_weight_values(class_weights),
        class_balanced=bool(class_balanced),
        hard_negatives=hard_negatives,
        gradual_unfreezing=gradual_unfreezing,
        layer_decay=layer_decay,
        ema_decay=ema_decay,
        grad_cache_chunk_size=grad_cache_chunk_size,
        auto_batch=auto_batch,
        bf16=_chosen(precision, console) is Precision.bf16,
        fp16=precision is Precision.fp16,
        dataloader_num_workers=workers,
        augmentation=augmentation.value,
        random_resized_crop=random_resized_crop,
        horizontal_flip=horizontal_flip,
        color_jitter=color_jitter,
        rotation=rotation,
        noise=noise,
        blur=blur,
        seed=seed,
        l2_sp=l2_sp,
        distillation=distillation,
        report_to=report_to or "none",
        **({"caption_templates": template} if template else {}),
        **({"gradient_checkpointing": True} if gradient_checkpointing else {}),  # transformers warns of False too
        **(_early_stopping(metric) if early_stopping_patience else {}),
    )
    validate = early_stopping_patience is not None or wise_ft
    sets = _load_sets(
        data,
        eval_data,
        validate=validate,
        seed=seed,
        console=console,
        on_bad_row=on_bad_row,
        allow_outside=allow_outside,
        attribute_columns=[name for name in attributes if name != "label"],
    )
    control = control_set(control_data)
    base, processor = load(model)
    if lora_r is None:
        clip = freeze_model(base, freeze)
    else:
        clip = _with_adapter(base, lora_r, lora_alpha, lora_dropout, lora_targets, seed)
    arguments.learning_rate = default_learning_rate(base, lora=lora_r is not None) if lr is None else lr
    context.params["class_balanced"] = arguments.class_balanced = _balanced(
        class_balanced, sets.train, arguments, console
    )
    trainer = _trainer(clip, processor, arguments, sets=sets, patience=early_stopping_patience, console=console)
    scorer = functools.partial(
        Scorer,
        clip,
        processor,
        templates=arguments.caption_templates,
        batch_size=batch_size,
        workers=workers,
        console=console,
    )
    outcome = Outcome(
        scorer(sets.test),
        sets.test_name,
        control=control and scorer(control[0]),
        control_name=control[1] if control else "",
        skipped=sets.skipped,
    )
    outcome.measure("before")
    line = WeightLine(clip) if wise_ft else None
    trainer.train(resume_from_checkpoint=_resume_point(output, console) if resume else None)
    if early_stopping_patience:
        console.print(f"kept the model of step {trainer.state.best_global_step} of {trainer.state.global_step}")
    if line is not None:
        outcome.sweep(line, scorer(sets.validation))
    outcome.measure("after")
    if trainer.is_world_process_zero():
        save_model(unfuse(clip), processor, output)
        if lora_r is not None:
            save_model(clip.merge_and_unload(), processor, output / "merged")
        outcome.write(output, trainer.state.log_history, context, merged=lora_r is not None)
        outcome.show(console)
        what = "model" if lora_r is None else "adapter, the model with it merged in (merged)"
        console.print(f"{what}, report.html, report.json and config.yaml in {output}")
    trainer.accelerator.end_training()  # leaves the process group while the interpreter still runs


@app.command()
@user_errors
def evaluate(
    *,
    model: Model,
    data: Data,
    on_bad_row: BadRows = OnBadRow.error,
    allow_outside: AllowOutside = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    template: Templates = None,
    probe_data: Annotated[
        str | None,
        typer.Option(help="Labelled pictures of the same classes that fit a linear probe and kNN."),
    ] = None,
    attribute: AttributeNames = None,
    knn_k: Annotated[int, typer.Option("--knn-k", min=1, help="Neighbours of kNN.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="File for the numbers, as JSON; a page of the same name, .html, goes beside it.")
    ] = None,
) -> None:
    """Zero-shot classification where the data has classes, retrieval where it has captions; the model's heads."""
    console = prepare()
    from clipft import load_pairs
    from clipft.console import show
    from clipft.data.rows import DEFAULT_TEMPLATES
    from clipft.evaluation.scoring import Scorer
    from clipft.evaluation.tasks import evaluate_knn, evaluate_linear_probe
    from clipft.files import write_json
    from clipft.models.loading import load

    if probe_data == data:
        raise ValueError("--probe-data: expected other pictures than --data, which would be scored on themselves")
    if output is not None and output.suffix == ".html":
        raise ValueError(f"--output: expected the name of the JSON file, the page goes beside it, got {output}")
    dataset = load_pairs(
        data, on_bad_row=on_bad_row.value, allow_outside=allow_outside, attribute_columns=attribute or ()
    )
    clip, processor = load(model)
    check_attributes(clip, attribute or (), console)
    score = Scorer(clip, processor, dataset, template or list(DEFAULT_TEMPLATES), batch_size, workers, console)
    found = score("evaluating")
    result = found.to_json()
    if probe_data is not None:
        probes: dict[str, Any] = {
            "linear_probe": evaluate_linear_probe,
            "knn": functools.partial(evaluate_knn, k=knn_k),
        }
        neighbours = load_pairs(probe_data)
        for name, probe in probes.items():
            result[name] = probe(clip, processor, neighbours, dataset, batch_size=batch_size, num_workers=workers)
    title = f"{model} on {len(dataset)} pictures of {data}"
    show({"score": result}, title, console)
    if output is not None:
        from clipft.environment import environment
        from clipft.report.examples import examples
        from clipft.report.html import write_html

        output.parent.mkdir(parents=True, exist_ok=True)
        page = output.with_suffix(".html")
        write_json(output, result)
        versions = {"score": result, "environment": environment()}
        write_html(page, versions, title=title, examples=examples(found, dataset))
        console.print(f"{output}, and {page} to look at")


# ---- parts of train ----


@dataclass(frozen=True)
class Sets:
    """The rows of a run. ``validation`` chooses the epoch, if early stopping is on, and is no part of ``test``."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset
    test_name: str
    skipped: dict[str, list[str]]  # by source, why each row was left out


def _load_sets(
    data: str,
    eval_data: str | None,
    *,
    validate: bool,
    seed: int,
    console: Console,
    on_bad_row: OnBadRow,
    allow_outside: bool,
    attribute_columns: list[str],
) -> Sets:
    from clipft.data.columns import checked_attributes
    from clipft.data.reading import Reading
    from clipft.data.sources import load_reading

    skipped: dict[str, list[str]] = {}

    def load(source: str) -> datasets.Dataset:
        how = Reading(
            skip=on_bad_row is OnBadRow.skip,
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
    return Sets(train, validation, test, test_name, skipped if on_bad_row is OnBadRow.skip else {})


def _hold_out(dataset: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A split that depends on the data and the seed alone, with each class's share where there are classes."""
    from clipft.data.rows import class_names_of

    by = "label" if class_names_of(dataset) else None
    try:
        parts = dataset.train_test_split(test_size=share, seed=seed, stratify_by_column=by)
    except ValueError as error:
        raise ValueError(
            f"--data: {len(dataset)} rows are too few to hold some out ({error}); give --eval-data"
        ) from error
    return parts["train"], parts["test"]


def _with_adapter(
    base: Any, rank: int, alpha: float | None, dropout: float, targets: list[str] | None, seed: int
) -> Any:
    from transformers import set_seed

    from clipft.models.lora import add_lora

    set_seed(seed)  # the adapter starts from random numbers
    return add_lora(base, rank, 2 * rank if alpha is None else alpha, dropout, targets or ("vision", "text"))


def _training_arguments(output: Path, **options: Any) -> Any:
    import torch

    from clipft.training.arguments import CLIPTrainingArguments

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


def _balanced(asked: bool | None, rows: datasets.Dataset, arguments: Any, console: Console) -> bool:
    """Where nobody asked, uneven classes are drawn evenly, unless the loss sees to rare ones or batches are mined."""
    from clipft.data.sampling import classes_are_uneven

    others = arguments.class_weights is not None or arguments.head_loss != "cross_entropy" or arguments.hard_negatives
    if asked is not None:
        return asked
    if others or not classes_are_uneven(rows, arguments.train_batch_size):
        return False
    console.print("classes are uneven: batches have equally many pictures of each (--no-class-balanced: as they come)")
    return True


def _chosen(precision: Precision, console: Console) -> Precision:
    """What ``auto`` stands for on this machine."""
    if precision is not Precision.auto:
        return precision
    import torch

    from clipft.training.precision import bf16_speedup, fastest_precision

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    chosen = Precision(fastest_precision(device))
    console.print(f"--precision auto: {chosen}; bfloat16 takes {1 / bf16_speedup(device):.2f} of float32's time here")
    return chosen


def _early_stopping(metric: str) -> dict[str, Any]:
    return {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": f"eval_{metric}",
    }


def _trainer(clip: Any, processor: Any, arguments: Any, *, sets: Sets, patience: int | None, console: Console) -> Any:
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback

    from clipft.training.progress import ProgressReport
    from clipft.training.trainer import CLIPTrainer

    trainer = CLIPTrainer(
        clip,
        arguments,
        train_dataset=sets.train,
        eval_dataset=sets.validation,
        processing_class=processor,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    check_test_set(trainer, sets.test)
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        report = ProgressReport(console)
        trainer.add_callback(report)
        trainer.progress = report.track
    return trainer


def _resume_point(output: Path, console: Console) -> str | None:
    from clipft.training.checkpoints import last_checkpoint

    if not any((output / "checkpoints").glob("checkpoint-*")):
        console.print(f"--resume: no checkpoint in {output} yet, starting from the beginning")
        return None
    checkpoint = last_checkpoint(output / "checkpoints")
    console.print(f"resuming from {checkpoint}")
    return str(checkpoint)
