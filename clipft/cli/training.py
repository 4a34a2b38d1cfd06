"""Commands that train: ``clipft demo``, ``clipft train``."""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipft.cli.common import (
    AllowOutside,
    BadRows,
    BatchSize,
    Data,
    Model,
    OnBadRow,
    Templates,
    Workers,
    app,
    output_folder,
    prepare,
    user_errors,
)
from clipft.cli.config import Config, options_of
from clipft.cli.forgetting import L2SP, ControlData, Distillation, ReportTo, WiseFT
from clipft.cli.heads import (
    Attributes,
    ClassWeights,
    FocalGamma,
    Head,
    HeadLoss,
    attribute_weights,
    chosen_metric,
    class_weight_values,
)
from clipft.cli.panels import Grouped
from clipft.families.losses import LOSSES

if TYPE_CHECKING:
    pass


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
    console = prepare()
    from clipft.recipes.outcome import Outcome, check_report_to, control_set
    from clipft.recipes.train import (
        drawn_by_class,
        early_stopping,
        fastest_here,
        load_sets,
        resume_point,
        trainer_of,
        training_arguments,
        with_adapter,
    )

    check_report_to(report_to or [])
    from clipft.evaluation.scoring import Scorer
    from clipft.files import save_model
    from clipft.models.freezing import freeze as freeze_model
    from clipft.models.fusing import unfuse
    from clipft.models.loading import load
    from clipft.training.arguments import default_learning_rate
    from clipft.training.wise_ft import WeightLine

    chosen = Precision(fastest_here(console)) if precision is Precision.auto else precision
    arguments = training_arguments(
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
        bf16=chosen is Precision.bf16,
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
        **(early_stopping(metric) if early_stopping_patience else {}),
    )
    sets = load_sets(
        data,
        eval_data,
        validate=early_stopping_patience is not None or wise_ft,
        seed=seed,
        console=console,
        skip_bad_rows=on_bad_row is OnBadRow.skip,
        allow_outside=allow_outside,
        attribute_columns=[name for name in attributes if name != "label"],
    )
    control = control_set(control_data)
    base, processor = load(model)
    if lora_r is None:
        clip = freeze_model(base, freeze)
    else:
        clip = with_adapter(base, lora_r, lora_alpha, lora_dropout, lora_targets, seed)
    arguments.learning_rate = default_learning_rate(base, lora=lora_r is not None) if lr is None else lr
    context.params["class_balanced"] = arguments.class_balanced = drawn_by_class(
        class_balanced, sets.train, arguments, console
    )
    trainer = trainer_of(clip, processor, arguments, sets=sets, patience=early_stopping_patience, console=console)
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
    trainer.train(resume_from_checkpoint=resume_point(output, console) if resume else None)
    if early_stopping_patience:
        console.print(f"kept the model of step {trainer.state.best_global_step} of {trainer.state.global_step}")
    if line is not None:
        outcome.sweep(line, scorer(sets.validation))
    outcome.measure("after")
    if trainer.is_world_process_zero():
        save_model(unfuse(clip), processor, output)
        if lora_r is not None:
            save_model(clip.merge_and_unload(), processor, output / "merged")
        outcome.write(output, trainer.state.log_history, options_of(context), merged=lora_r is not None)
        outcome.show(console)
        what = "model" if lora_r is None else "adapter, the model with it merged in (merged)"
        console.print(f"{what}, report.html, report.json and config.yaml in {output}")
    trainer.accelerator.end_training()  # leaves the process group while the interpreter still runs
