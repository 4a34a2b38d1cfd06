"""``transformers.Trainer`` for CLIP and SigLIP: the fused loss, retrieval metrics, negatives across processes, exact
resume.

What it changes: the model's forward gives embeddings and no logits; the loss is ``clipft.contrastive_loss`` or
``clipft.sigmoid_loss`` on them; evaluation gathers embeddings [N, D] and ranks them; rows are drawn by (seed, epoch,
index); a checkpoint appears under its name when whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput

from clipft.data.collate import model_inputs
from clipft.data.rows import PairRows, index_texts
from clipft.evaluation.metrics import retrieval_metrics
from clipft.families.forward import loss_parameters
from clipft.families.registry import base_model, family_of
from clipft.inference.encode import embed_texts, unified
from clipft.models.calibrated import set_calibrations
from clipft.models.fusing import fuse
from clipft.models.heads import heads_of
from clipft.training.arguments import CLIPTrainingArguments, check_arguments, check_loss, loss_of, objective_of
from clipft.training.auto_batch import fitting_chunk
from clipft.training.checkpoints import check_checkpoint, kept_checkpoints, last_checkpoint
from clipft.training.faults import all_finite, non_finite_message, worker_deaths
from clipft.training.fsdp import as_saved, check_enabled, gather_for_features, make_shardable
from clipft.training.grad_cache import cached_backward, chunks
from clipft.training.head_training import HeadTraining
from clipft.training.precision import cudnn_benchmark, hold_masters, warn_of_slow_bf16, weights_kept
from clipft.training.regularizers import StartingPoint
from clipft.training.row_loading import RowLoading, given_rows, own_collator
from clipft.training.schedules import GradualUnfreezing, WeightAverage, split_by_depth

__all__ = ["CLIPTrainer"]

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value", Tensor, Tensor | float)


class CLIPTrainer(RowLoading):
    """Used as ``transformers.Trainer``: ``CLIPTrainer(model, args, train_dataset=..., eval_dataset=...,
    processing_class=processor)``.

    Data sets have columns ``image``, ``caption`` (a string or a list) and / or ``label`` (see ``clipft.load_pairs``),
    or are torchvision's, lists of (picture, text), and subsets of these. Evaluation gives ``eval_loss`` and
    ``eval_image_to_text_R@1`` and so on; ``predict`` gives embeddings, (image [N, D], text [N, D]). With ``args.head``
    these are ``eval_accuracy`` and so on, and logits [N, C]. Several processes (``torchrun``) use each other's pairs as
    negatives. Where a last batch would be one pair, whose contrastive loss is 0, an epoch leaves it out, each another.
    The model is fused (:func:`clipft.fuse`) and stays so; :func:`clipft.unfuse` undoes it.
    Weights that train become float32 if they are stored in less; ``args.bf16`` and ``args.fp16`` compute in less.

    ``loss``: a function in place of the loss that ``args`` names: (image_embeds [N, D], text_embeds [N, D], batch) ->
    0-d loss, the rows at length 1, in float32 or wider. ``batch`` has what the collator gave, such as ``labels`` [N]
    where rows have classes, and the model's ``logit_scale`` (a factor, 0-d) and, of a SigLIP, ``logit_bias``. Of
    several processes each gives it its own pairs, and the gradients' mean counts.
    """

    args: CLIPTrainingArguments
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: Any = None,
        args: CLIPTrainingArguments | None = None,
        *,
        loss: Callable[[Tensor, Tensor, dict[str, Any]], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        args = CLIPTrainingArguments(output_dir="trainer_output") if args is None else args
        check_arguments(args, kwargs, own_loss=loss is not None)
        kwargs |= {name: given_rows(kwargs[name]) for name in ("train_dataset", "eval_dataset") if name in kwargs}
        self._own_loss = loss
        if model is not None:
            hold_masters(fuse(model))
            check_loss(args, model)
            self._heads = _heads_of_run(args, model, kwargs)
        if kwargs.get("data_collator") is None:
            rows = getattr(kwargs.get("train_dataset"), "__len__", lambda: 1)()
            kwargs["data_collator"] = own_collator(model, args, kwargs.get("processing_class"), rows)
        super().__init__(model=model, args=args, **kwargs)
        check_enabled(args, self.is_fsdp_enabled)
        if self.is_fsdp_enabled and model is not None:
            make_shardable(model)
        self._losses: list[Tensor] = []  # of the step's micro-batches
        # Hugging Face's smoother is for class logits; compute_loss passes the factor to the contrastive loss.
        self.label_smoother = None
        self.add_callback(_ClampLogitScale)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            for name in ("ema_decay", "gradual_unfreezing", "hard_negatives"):
                if getattr(args, name):
                    raise ValueError(f"{name}: not with FSDP or DeepSpeed, where no process has the whole weights")
        if args.ema_decay:
            self._average = WeightAverage(lambda: self.model, args.ema_decay)
            self.add_callback(self._average)
        if args.gradual_unfreezing:  # after the average, which takes what trains as the run begins
            self._unfreezing = GradualUnfreezing(lambda: self.model, args.gradual_unfreezing)
            self.add_callback(self._unfreezing)

    _average: WeightAverage | None = None
    _collected: EvalLoopContainer | None = None  # where Trainer's loop does not give all predictions as they are
    _unfreezing: GradualUnfreezing | None = None

    @property
    def head_classes(self) -> dict[str, list[str]]:
        """The classes of the heads that the run trains, by data column."""
        return self._heads.classes if self._heads else {}

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Trainer, fused and in float32."""
        if self.args.head != "none" or self.args.attributes:
            raise ValueError("model_init: expected a model where args name heads, which belong to one")
        model = fuse(super().call_model_init(trial))
        hold_masters(model)
        check_loss(self.args, model)
        if self.args.fsdp:
            make_shardable(model)
        return cast(nn.Module, model)

    # ---- loss and optimiser ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the batch; in several processes, of the batches of all ranks together."""
        outputs = model(**model_inputs(inputs), return_logits=False)
        loss = self._loss(inputs, outputs.image_embeds, outputs.text_embeds, *loss_parameters(outputs))
        return (loss, outputs) if return_outputs else loss

    def _loss(
        self, inputs: dict[str, Tensor], image_embeds: Tensor, text_embeds: Tensor | None, *shared: Tensor
    ) -> Tensor:
        """``shared``: the model's ``loss_parameters``."""
        world_size = self.args.world_size
        group = dist.group.WORLD if world_size > 1 else None
        embeds = [embeds for embeds in (image_embeds, text_embeds) if embeds is not None]
        for own in embeds if group else ():
            _times_world_size(own, world_size)
        loss, heads = image_embeds.new_zeros(()), len(heads_of(self.model))
        weights, scalars = shared[:heads], shared[heads:]
        if self._heads:
            if group:
                weights = tuple(_times_world_size(weight, world_size) for weight in weights)
            loss = loss + self._heads.loss(weights, image_embeds, inputs["targets"], group)
        if self._heads is None or self._heads.pairs:
            loss_of_pairs = self._loss_of_pairs if self._own_loss is None else self._own_loss_of_pairs
            loss = loss + loss_of_pairs(inputs, *embeds, *scalars, group=group)
        # a mean over this rank's pairs, where the loss's gradient has been multiplied (_times_world_size)
        distance = self._start.distance(*embeds) if self._start else 0.0
        return loss + _scale_gradient(distance, 1 / world_size)

    def _loss_of_pairs(
        self,
        inputs: dict[str, Tensor],
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        *,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        row = loss_of(self.args, self.accelerator.unwrap_model(self.model))
        bias = (logit_bias,) if row.needs_bias else ()
        smoothing = {"label_smoothing": self.args.label_smoothing_factor} if row.smooths else {}
        loss = row(image_embeds, text_embeds, logit_scale, *bias, labels=inputs.get("labels"), group=group, **smoothing)
        if logit_bias is None or row.needs_bias:
            return cast(Tensor, loss)
        return cast(Tensor, loss + 0.0 * logit_bias)  # DDP waits for every parameter's gradient

    def _own_loss_of_pairs(
        self,
        inputs: dict[str, Tensor],
        image_embeds: Tensor,
        text_embeds: Tensor,
        *scalars: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        assert self._own_loss is not None
        if group:  # a mean over this rank's pairs, so the embeddings' gradient is multiplied in vain: see _loss
            scalars = tuple(_times_world_size(scalar, self.args.world_size) for scalar in scalars)
        batch = inputs | dict(zip(("logit_scale", "logit_bias"), scalars, strict=False))
        loss = self._own_loss(image_embeds, text_embeds, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss: expected the function to give a 0-d tensor, got {found}")
        if not group:
            return loss
        waited_for = 0.0 * sum(scalar.sum() for scalar in scalars)  # DDP waits for every parameter's gradient
        return _scale_gradient(loss + waited_for, 1 / self.args.world_size)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; with ``grad_cache_chunk_size`` the towers see the batch in chunks, and ``l2_sp`` and
        ``distillation`` pull towards the start.
        """
        loss = self._pulled(model, inputs, num_items_in_batch)
        self._losses.append(loss.detach())
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer: the batches of a step."""
        self._losses = []
        self._check_workers()
        return super().get_batch_samples(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As in Trainer, before each step: one whose loss or gradient is not finite is not taken."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None
        if not all_finite(self._losses, norm, scaled=scaled, ranks=self.args.world_size):
            model.zero_grad()
            kept = self._keep(model)
            raise FloatingPointError(non_finite_message(self, self._losses, norm, kept))
        return norm

    def _keep(self, model: Any) -> str:
        """Save the state of the step before, and say what is left of the run."""
        step = self.state.global_step
        if self._unlogged is not None:
            self._tr_loss = self._unlogged
        there = step == 0 or (Path(str(self.args.output_dir)) / f"checkpoint-{step}").exists()
        if (
            self.args.save_strategy != "no"
            and not there
            and (self.is_fsdp_enabled or all(bool(p.isfinite().all()) for p in model.parameters()))
        ):
            self._save_checkpoint(model, trial=None)
        return self._kept()

    def _kept(self) -> str:
        return kept_checkpoints(str(self.args.output_dir))

    def _pulled(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        if self._start is None:
            return self._backward(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        self._start.encode_start(inputs, self.compute_loss_context_manager)
        try:
            loss = self._backward(model, inputs, num_items_in_batch)
        finally:
            self._start.forget_batch()
        scaler = self.accelerator.scaler
        unscaled = 1.0 if scaler is None else float(scaler.get_scale())
        self._start.add_l2_sp_gradient(
            self.accelerator.unwrap_model(model), unscaled / self.current_gradient_accumulation_steps
        )
        return loss

    _start: StartingPoint | None = None

    def _backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        size = self.args.grad_cache_chunk_size
        if size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        steps = self.current_gradient_accumulation_steps
        return cached_backward(
            model,
            model_inputs(inputs),
            size,
            lambda *embeds_and_shared: self._loss(inputs, *embeds_and_shared) / steps,
            backward=self.accelerator.backward,
            autocast=self.compute_loss_context_manager,
            no_sync=partial(self.accelerator.no_sync, model),
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in open_clip: no decay for biases, norms, the class embedding and the logit scale, which have fewer than
        two dimensions.
        """
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in Trainer, with the rates of ``layer_decay``."""
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self.args.layer_decay < 1.0:
            split_by_depth(optimizer, cast(nn.Module, self.model if model is None else model), self.args.layer_decay)
        return optimizer

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Loss, (image_embeds, text_embeds) and labels of a batch: nothing of size B x B to gather. With heads their
        logits [N, C] come after the embeddings, or alone where there are no texts, and their targets as labels.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        predictions, labels = self._predictions(inputs, outputs)
        if self._collected is not None:
            self._collected.add(self.gather_function(predictions))
            self._collected.to_cpu_and_numpy()
        return loss, predictions, labels

    def _predictions(self, inputs: dict[str, Any], outputs: Any) -> tuple[Any, Tensor | None]:
        embeds = (outputs.image_embeds, outputs.text_embeds)
        if self._heads is None:
            return embeds, inputs.get("labels")
        logits, targets = self._heads.logits(outputs.image_embeds), inputs["targets"]
        if self._heads.pairs:
            return (*embeds, *logits), targets
        return (logits, targets) if len(logits) > 1 else (logits[0], targets[:, 0])

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, then metrics from its embeddings and logits: the towers run once."""
        args, loss_only = self.args, self.args.prediction_loss_only
        apart = args.batch_eval_metrics or not args.eval_do_concat_batches or self.preprocess_logits_for_metrics
        self._collected = EvalLoopContainer(do_nested_concat=True) if apart else None
        rounds = (args.bf16_full_eval or args.fp16_full_eval) and not (self.is_in_train or self.is_fsdp_enabled)
        try:
            with self._averaged(), weights_kept(cast(nn.Module, self.model)) if rounds else nullcontext():
                output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
                predictions = self._collected.get_arrays() if self._collected else output.predictions
                metrics = {} if loss_only else self._metrics(dataloader.dataset, predictions)
        finally:
            self._collected = None
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _metrics(self, rows: PairRows, predictions: Any) -> dict[str, float]:
        if self._heads is None:
            return self._retrieval(rows, predictions)
        if self._heads.pairs:
            found = self._heads.metrics(predictions[2:], rows.targets)
            return self._retrieval(rows, predictions[:2]) | found
        logits = predictions if isinstance(predictions, tuple) else (predictions,)
        return self._heads.metrics(logits, rows.targets)

    def _retrieval(self, rows: PairRows, predictions: Any) -> dict[str, float]:
        length = getattr(self.data_collator, "max_length", None)
        captions = unified(cast(nn.Module, self.model), self.processing_class, rows.captions(), length)
        texts_of, texts = index_texts(captions)
        image_embeds, first_embeds = (torch.from_numpy(part).float() for part in predictions)
        known = {own[0]: row for row, own in enumerate(captions)}
        rest = [text for text in texts if text not in known]
        if rest:
            model = cast(nn.Module, self.model)
            if self.is_fsdp_enabled:
                gather_for_features(model)
            rest_embeds = embed_texts(model, self.processing_class, rest, self.args.per_device_eval_batch_size, length)
            first_embeds = torch.cat([first_embeds, rest_embeds])
            known |= {text: len(captions) + place for place, text in enumerate(rest)}
        return retrieval_metrics(image_embeds, first_embeds[[known[text] for text in texts]], texts_of)

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Trainer; by default by ``metric_for_best_model``, else by the loss or, to maximise, by the metrics of
        which more is better: never by ranks and recalls together.
        """
        direction = args[1] if len(args) > 1 else kwargs.get("direction", "minimize")
        objective = compute_objective or partial(objective_of, self.args, direction)
        return super().hyperparameter_search(hp_space, objective, *args, **kwargs)

    # ---- the run ----

    def _fitting_chunk(self) -> int | None:
        """Pairs that fit into memory at once, the same number on every rank; None for all of the batch."""
        model = cast(nn.Module, self.model).train()
        inputs = model_inputs(self._prepare_inputs(next(iter(self.get_train_dataloader()))))
        size = self.args.per_device_train_batch_size

        def forward(pairs: int) -> Any:
            with self.compute_loss_context_manager():
                return model(**chunks(inputs, pairs)[-1], return_logits=False)

        fits = fitting_chunk(model, forward, size, checkpointing=bool(self.args.gradient_checkpointing))
        if self.args.world_size > 1:
            least = torch.tensor(fits, device=self.args.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            fits = int(least)
        _logger.info("auto_batch: %d of %d pairs at once", fits, size)
        return None if fits >= size else fits

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; ``resume_from_checkpoint=True`` takes the last whole checkpoint and passes over
        unfinished and damaged ones.

        Raises:
            FloatingPointError: a step's loss or gradient is not finite. Model and, unless nothing is to be saved, a
                checkpoint have the state before it.
            ChildProcessError: a process that loads pictures has died.
            OSError: a checkpoint cannot be written; earlier ones are kept.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        set_calibrations(self.model, {})  # of the weights that it begins with
        if self.args.bf16:
            warn_of_slow_bf16(self.args.device.type)
        if self.args.auto_batch:
            self.args.grad_cache_chunk_size = self._fitting_chunk()
        if self.args.l2_sp or self.args.distillation:  # before a checkpoint's weights take the start's place
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("l2_sp, distillation: expected a model that is whole on each process, not sharded")
            start = cast(nn.Module, self.model)
            self._start = StartingPoint(start, l2_sp=self.args.l2_sp, distillation=self.args.distillation)
        with cudnn_benchmark(self.args.cudnn_benchmark), worker_deaths(self._kept) as self._check_workers:
            try:
                result = super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._resumed = None
                if self._unfreezing:
                    self._unfreezing.finish()
        if self._average:  # the best model's file holds an average already
            self._average.finish(keep=not self.args.load_best_model_at_end)
        return result

    def _averaged(self) -> AbstractContextManager[None]:
        return self._average.in_use() if self._average else nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average:
            self._average.load_trained(Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in Trainer; what was sharded is saved as it was before."""
        super()._save(output_dir, None if state_dict is None else as_saved(state_dict, self.model))

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        """As in Trainer, with averaged weights, and beside them what else an exact resume needs."""
        with self._averaged():
            super()._write_checkpoint(folder, model, trial)
            if self._average and self.args.should_save:
                self._average.save_trained(folder)
        if self._mined and self.args.should_save:
            self._mined.save(folder)


# ---- parts ----


def _heads_of_run(args: CLIPTrainingArguments, model: Any, kwargs: dict[str, Any]) -> HeadTraining | None:
    if args.head == "none" and not args.attributes:
        for head in heads_of(model).values():
            head.requires_grad_(False)  # processes would wait for its gradient
        return None
    if args.fsdp:
        raise ValueError("head, attributes: not with FSDP, which shares out what it computes inside forward alone")
    return HeadTraining(args, model, kwargs.get("processing_class"), kwargs.get("train_dataset"))


def _times_world_size(embeds: Tensor, world_size: int) -> Tensor:
    """Scale the gradient. With ``group`` each rank gets the gradient of the joined batch's loss for its own embeddings;
    the model's gradient is the sum of the ranks' parts, but DistributedDataParallel takes their mean. (The logit
    scale's gradient is whole on every rank, so its mean is right.)
    """
    return _scale_gradient(embeds, world_size)


def _scale_gradient(value: _Value, factor: float) -> _Value:
    """The value stays, as it is logged."""
    if factor != 1 and isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(lambda gradient: gradient * factor)
    return value


class _ClampLogitScale(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ceiling, scale = family_of(model).max_log_scale, base_model(model).logit_scale
        if ceiling is not None and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=ceiling)
