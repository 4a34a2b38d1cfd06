"""``clipft.train``: a whole training run, from data and a model's name to a model, a report and what was gained."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from clipft.console import console_of_run, without_bars
from clipft.data.rows import class_targets
from clipft.data.sampling import classes_are_uneven
from clipft.evaluation.scoring import Scorer
from clipft.files import check_folder, expanded, locked
from clipft.inference.encode import encoder_of
from clipft.models.bases import check_base_stays
from clipft.models.float_base import check_place
from clipft.models.formats import MERGED, folder_of
from clipft.models.freezing import freeze, what_trains
from clipft.models.fusing import fuse, unfuse
from clipft.models.lora import add_lora, import_peft, merged_base
from clipft.models.resize import resize
from clipft.recipes.arguments import Heads, arguments_of, heads_asked_for
from clipft.recipes.checkpoint_owner import claim, identity_of_run, resume_point
from clipft.recipes.frozen import check_frozen, check_layers, frozen_in_int8
from clipft.recipes.hold_out import Seen
from clipft.recipes.length import FewRounds, Length, length_of_run
from clipft.recipes.options import TrainOptions, options_from
from clipft.recipes.outcome import Outcome, check_places_of_run, check_report_to, control_set, save_run
from clipft.recipes.run import Run, loaded, model_name
from clipft.recipes.sets import HELD_OUT, Sets, sets_of_run
from clipft.recipes.sources import Sources, name_of
from clipft.recipes.switchback import check_precision, check_trained_layers, trained_in_int8
from clipft.training.arguments import default_learning_rate
from clipft.training.progress import ProgressReport
from clipft.training.row_loading import rows_of_epoch
from clipft.training.trainer import CLIPTrainer
from clipft.training.wise_ft import WeightLine

__all__ = ["HELD_OUT", "Run", "train"]


@without_bars()
def train(
    model: Any,
    data: Any,
    output: str | Path | None = None,
    *,
    training_args: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    peft_config: Any = None,
    loss: str | Callable[..., Any] = "auto",
    console: Console | None = None,
    **options: Any,
) -> Run:
    """Fine-tune a model and measure what it gained: the same as the command ``clipft train``, with the same options.

    Args:
        model: a folder, a hub name, ``"demo"``, ``(model, processor)``, or a :class:`Run` to go on from.
        data: a source that :func:`clipft.load_pairs` takes.
        output: folder for the model, the report and checkpoints; default: one that goes with the result.
        training_args: any other field of ``transformers.TrainingArguments``.
        callbacks: more ``transformers.TrainerCallback``s.
        peft_config: of an adapter that ``lora_r`` and its like cannot say (DoRA, rsLoRA, ``modules_to_save``).
        loss: as the option, or a function: (image_embeds [N, D], text_embeds [N, D], batch) -> 0-d tensor, the rows at
            length 1; ``batch`` has what the collator gave, such as ``labels`` [N] where rows have classes, and the
            model's ``logit_scale`` (a factor) and, of a SigLIP, ``logit_bias``. The default for a CLIP is ``lambda
            images, texts, batch: clipft.contrastive_loss(images, texts, batch["logit_scale"],
            labels=batch.get("labels"))``.
        console: where progress and tables go; default: standard output.
        options: fields of :class:`clipft.recipes.options.TrainOptions`: ``epochs``, ``lr``, ``freeze``, ...

    Raises:
        TypeError: no such option.
        ValueError: an option or data that does not fit; the message names it.
        BlockingIOError: another run is writing into ``output``.
        OSError: ``output`` cannot be written into.
    """
    further = [f"{name}={json.dumps(value)}" for name, value in (training_args or {}).items()]
    own_loss = loss if callable(loss) else None
    options = options | ({} if own_loss else {"loss": loss})
    settings = options_from(TrainOptions, options | ({"set": [*options.get("set", ()), *further]} if further else {}))
    console = console or console_of_run()
    heads = heads_asked_for(settings)
    _check_adapter(settings, heads, peft_config)
    if settings.force and not settings.resume:
        raise ValueError("force: insists on resume, expected both")
    check_report_to(settings.report_to or [])
    temporary = tempfile.TemporaryDirectory(prefix="clipft-run-") if output is None else None
    folder = expanded(temporary.name if output is None and temporary else str(output))
    with _lock_of_run(folder):
        arguments = arguments_of(settings, folder, heads, console)
        adapted = settings.lora_r is not None or peft_config is not None
        check_frozen(settings, arguments, adapted=adapted)
        check_precision(settings, arguments, adapted=adapted)
        training = _Training(settings, folder, heads, arguments, console, own_loss)
        return training.run(model, data, callbacks, peft_config, temporary)


def _lock_of_run(folder: Path) -> AbstractContextManager[None]:
    """One run at a time into a folder. Of several processes of one run the first has the lock."""
    return locked(folder) if os.environ.get("RANK", "0") == "0" else nullcontext()


def _check_adapter(options: TrainOptions, heads: Heads, peft_config: Any) -> None:
    if options.lora_r is not None and peft_config is not None:
        raise ValueError("lora_r, peft_config: expected one of the two, which both describe the adapter")
    if options.lora_r is None and peft_config is None:
        return
    if heads.trained:
        raise ValueError("head, attribute: not with lora_r, whose adapter is saved without heads")
    if options.freeze != "none":
        raise ValueError(
            f"freeze: expected none with lora_r, which freezes all but the adapter, got {options.freeze!r}"
        )


@dataclass
class _Training:
    """One run, as it goes."""

    options: TrainOptions
    folder: Path
    heads: Heads
    arguments: Any
    console: Console
    own_loss: Callable[..., Any] | None

    def run(self, model: Any, data: Any, callbacks: Sequence[Any], peft_config: Any, temporary: Any) -> Run:
        options, console = self.options, self.console
        adapted = options.lora_r is not None or peft_config is not None
        check_places_of_run(self.folder, merged=adapted)
        if adapted:
            check_base_stays(model_name(model), self.folder)
        sets = self._sets(model, data)
        control = control_set(options.control_data, sets.sources)
        base, processor = loaded(model)
        if options.frozen == "int8":
            check_place(base, compare=not isinstance(model, (str, Path)))
        check_folder(self.folder, size=sum(tensor.nbytes for tensor in base.state_dict().values()))
        start = encoder_of(base, processor, options.batch_size).identity()
        resize(base, processor, image_size=options.image_size, max_tokens=options.max_tokens)
        clip = self._what_trains(base, peft_config)
        check_layers(options, clip, peft_config)
        check_trained_layers(options, clip)
        usual = default_learning_rate(base, lora=adapted)
        self.arguments.learning_rate = usual if options.lr is None else options.lr
        self.arguments.class_balanced = self._drawn_by_class(sets.train)
        length = self._length(clip, len(sets.train))
        trainer = self._trainer(clip, processor, sets, length, callbacks)
        console.print(f"what trains: {what_trains(clip)}", highlight=False)
        settings = self._settings(model, data)
        adapter, processes = peft_config and peft_config.to_dict(), self.arguments.world_size
        planned = settings | {"epochs": self.arguments.num_train_epochs}
        own = identity_of_run(planned, start, sets.identity, adapter=adapter, processes=processes)
        point = self._begin(trainer, own, sets.seen)
        scorer = functools.partial(
            Scorer,
            clip,
            processor,
            templates=self.arguments.caption_templates,
            batch_size=options.batch_size,
            workers=options.workers,
            console=console,
        )
        outcome = Outcome(
            scorer(sets.test, class_names=sets.classes),
            sets.test_name,
            control=control and scorer(control[0]),
            control_name=control[1] if control else "",
            sources=sets.sources,
            length=length,
        )
        held_out = functools.partial(scorer, sets.validation, class_names=sets.classes)
        self._train(trainer, point, outcome, clip, held_out)
        trainer.accelerator.wait_for_everyone()  # who still reads the base, which may lie where the model is saved
        if trainer.is_world_process_zero():
            save_run(self.folder, clip, processor, outcome, trainer.state.log_history, settings, sets.seen)
            outcome.show(console)
            what = "adapter, the model with it merged in (merged)" if adapted else "model"
            console.print(f"{what}, report.html, report.json and config.yaml in {self.folder}")
        trainer.accelerator.end_training()  # leaves the process group while the interpreter still runs
        tuned = merged_base(clip) if adapted and hasattr(clip, "merge_and_unload") else clip
        tuned.name_or_path = str(self.folder / MERGED if adapted else self.folder)  # not the base's: other weights
        scores = outcome.to_json(trainer.state.log_history, {})
        return Run(
            unfuse(tuned).eval(),
            processor,
            scores["before"],
            scores["after"],
            scores["gain"],
            self.folder,
            trainer.state.log_history,
            temporary,
        )

    def _train(self, trainer: Any, point: str | None, outcome: Outcome, clip: Any, held_out: Any) -> None:
        options, console = self.options, self.console
        outcome.measure("before")
        line = WeightLine(clip) if options.wise_ft else None
        frozen = frozen_in_int8(trainer, console) if options.frozen == "int8" else nullcontext()
        trained = trained_in_int8(trainer, console) if options.precision == "int8" else nullcontext()
        with frozen as outcome.frozen, trained as outcome.precision:
            trainer.train(resume_from_checkpoint=point)
        if options.early_stopping_patience:
            console.print(f"kept the model of step {trainer.state.best_global_step} of {trainer.state.global_step}")
        if line is not None:
            outcome.sweep(line, held_out())
        outcome.measure("after")
        outcome.calibrate(clip, options.precision_at)

    def _sets(self, model: Any, data: Any) -> Sets:
        options = self.options
        sources = Sources(options, self.console, self.heads.columns)
        seen = Seen.of_model(folder_of(model_name(model)))
        chooses = options.early_stopping_patience is not None or options.wise_ft
        sets = sets_of_run(sources, data, options.eval_data, seen, chooses=chooses, seed=options.seed)
        if options.precision_at is not None and sets.classes is None and not self.heads.columns:
            raise ValueError("precision_at: expected data with classes, whose answers are right or wrong; found none")
        return sets

    def _begin(self, trainer: Any, own: dict[str, Any], seen: Seen) -> str | None:
        """The checkpoint to go on from; the folder of checkpoints is this run's from here on."""
        folder, options = self.folder / "checkpoints", self.options
        point = resume_point(folder, own, self.console, force=options.force) if options.resume else None
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            claim(folder, own, self.console, resumed=point is not None)
            seen.save(folder)
        trainer.accelerator.wait_for_everyone()
        return point

    def _what_trains(self, base: Any, peft_config: Any) -> Any:
        """The model with its frozen parts, or with a fresh adapter."""
        options = self.options
        rank = options.lora_r
        if rank is None and peft_config is None:
            return freeze(base, options.freeze)
        set_seed(options.seed)  # the adapter starts from random numbers
        if rank is None:
            return fuse(import_peft().get_peft_model(base, peft_config))
        alpha = 2 * rank if options.lora_alpha is None else options.lora_alpha
        return add_lora(base, rank, alpha, options.lora_dropout, options.lora_targets or ("vision", "text"))

    def _drawn_by_class(self, rows: datasets.Dataset) -> bool:
        """Where nobody asked, uneven classes are drawn evenly, unless the loss sees to rare ones or batches are
        mined.
        """
        arguments, asked = self.arguments, self.options.class_balanced
        others = (
            arguments.class_weights is not None or arguments.head_loss != "cross_entropy" or arguments.hard_negatives
        )
        if asked is not None:
            return asked
        if others or not classes_are_uneven(rows, arguments.train_batch_size):
            return False
        self.console.print(
            "classes are uneven: batches have equally many pictures of each (--no-class-balanced: as they come)"
        )
        return True

    def _length(self, clip: Any, pictures: int) -> Length:
        """Of the run; where nobody asked, few pictures come round more often."""
        each_epoch = rows_of_epoch(self.arguments, clip, pictures, own_loss=self.own_loss is not None)
        asked = self.options.epochs is not None
        length = length_of_run(self.arguments, pictures, asked=asked, each_epoch=each_epoch)
        if length.note:
            self.arguments.num_train_epochs = length.epochs
            self.console.print(length.note, highlight=False)
        return length

    def _trainer(self, clip: Any, processor: Any, sets: Sets, length: Length, callbacks: Sequence[Any]) -> Any:
        patience = self.options.early_stopping_patience
        own = [*([EarlyStoppingCallback(patience)] if patience else []), *([FewRounds(length)] if length.note else [])]
        trainer = CLIPTrainer(
            clip,
            self.arguments,
            train_dataset=sets.train,
            eval_dataset=sets.validation,
            processing_class=processor,
            loss=self.own_loss,
            callbacks=[*own, *callbacks],
        )
        _check_test_set(trainer, sets.test)
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            report = ProgressReport(self.console)
            trainer.add_callback(report)
            trainer.progress = report.track
        return trainer

    def _settings(self, model: Any, data: Any) -> dict[str, Any]:
        """What ``config.yaml`` holds: every option as it was used."""
        names = {"model": model_name(model), "data": name_of(data), "output": str(self.folder)}
        options = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        options["class_balanced"] = self.arguments.class_balanced
        options["control_data"] = name_of(self.options.control_data)
        options["eval_data"] = None if self.options.eval_data is None else name_of(self.options.eval_data)
        if self.own_loss is not None:  # a file cannot repeat it: --config refuses the name
            options["loss"] = getattr(self.own_loss, "__qualname__", type(self.own_loss).__name__)
        return names | {name: value for name, value in options.items() if name not in ("resume", "force")}


# ---- parts ----


def _check_test_set(trainer: Any, test: Any) -> None:
    """That the run's heads know the classes of the test set, before an hour of training."""
    for name, classes in trainer.head_classes.items():
        class_targets(test, name, classes)
