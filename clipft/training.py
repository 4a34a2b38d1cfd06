"""``transformers.Trainer`` for CLIP and SigLIP: the fused loss, retrieval metrics, negatives across processes, exact
resume.

What it changes: the model's forward gives embeddings and no logits; the loss is ``clipft.contrastive_loss`` or
``clipft.sigmoid_loss`` on them; evaluation gathers embeddings [N, D] and ranks them; rows are drawn by (seed, epoch,
index); a checkpoint appears under its name when whole.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from clipft.auto_batch import fitting_chunk
from clipft.data import DEFAULT_TEMPLATES, CLIPDataCollator, EpochSampler, FrozenFeatures, PairRows
from clipft.evaluation import embed_texts, index_texts
from clipft.families import base_model, family_of, family_of_processor
from clipft.features import FrozenTowers, frozen_towers
from clipft.forgetting import StartingPoint
from clipft.fused import loss_scalars
from clipft.grad_cache import cached_backward, chunks
from clipft.metrics import retrieval_metrics
from clipft.models import fuse
from clipft.ops import contrastive_loss, sigmoid_loss
from clipft.precision import bf16_speedup
from clipft.sampling import ClassBalancedSampler, labels_of
from clipft.schedules import WeightAverage, split_by_depth
from clipft.sharding import as_saved, check_enabled, check_version, gather_for_features, make_shardable
from clipft.transforms import AUGMENTATION_OPTIONS, Augmentation, augmentation_set

__all__ = ["CLIPTrainer", "CLIPTrainingArguments", "default_learning_rate"]

_logger = logging.getLogger(__name__)
_LOSSES = ("auto", "contrastive", "sigmoid")
_BASE_SIZE = 150e6  # parameters of ViT-B/32
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass
class CLIPTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of CLIP fine-tuning, and what only CLIP needs.

    ``label_smoothing_factor`` smooths the targets of the contrastive loss. Augmentations are off by default; see
    ``clipft.transforms.Augmentation`` for when each of them harms.
    """

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate; 5e-6 to 1e-5 keeps what the model knows."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Linear warm-up: steps, or below 1 a share of all steps."}
    )
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "For weights of two or more dimensions only."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Pairs a process; all are negatives of each other."}
    )
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "As in training, so that the losses compare."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The trainer picks the columns that it needs itself."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume early stopping with the patience it had left."}
    )
    loss: str = field(
        default="auto",
        metadata={"help": "auto: the model's own, contrastive for CLIP and sigmoid for SigLIP, which takes either."},
    )
    augmentation: str = field(
        default="none", metadata={"help": "none, light, strong, industrial or medical; the options below override."}
    )
    random_resized_crop: float | None = field(
        default=None, metadata={"help": "Smallest share of the area a crop may keep; 0 for no random crop."}
    )
    horizontal_flip: float | None = field(default=None, metadata={"help": "Probability of a mirror image."})
    color_jitter: float | None = field(
        default=None, metadata={"help": "Strength of random brightness, contrast, saturation, hue."}
    )
    rotation: float | None = field(default=None, metadata={"help": "Largest random rotation, in degrees."})
    noise: float | None = field(
        default=None, metadata={"help": "Largest random noise, as a share of the brightness range."}
    )
    blur: float | None = field(default=None, metadata={"help": "Largest random blur, in pixels of the model's input."})
    caption_templates: list[str] = field(
        default_factory=lambda: list(DEFAULT_TEMPLATES),
        metadata={"help": "Captions from class names, where the data set has labels and no captions."},
    )
    l2_sp: float = field(
        default=0.0, metadata={"help": "Pull to the starting weights: lambda / 2 * |w - w_start|^2 (L2-SP)."}
    )
    distillation: float = field(
        default=0.0, metadata={"help": "Weight of the embeddings' mean squared distance to the starting model's."}
    )
    grad_cache_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Pictures that a tower sees at once; the loss still takes the whole batch."},
    )
    auto_batch: bool = field(
        default=False, metadata={"help": "Choose grad_cache_chunk_size: as many as fit into memory."}
    )
    cache_frozen: bool = field(
        default=True, metadata={"help": "Compute the outputs of a frozen tower once, not in every epoch."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder for them, shared by runs; default: features in output_dir."}
    )
    class_balanced: bool = field(
        default=False, metadata={"help": "Batches with equally many pairs of each class; needs labels."}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "Learning rate of a layer over that of the layer above it."}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "Evaluate and keep an average of the weights over steps; 0.999 is usual."}
    )
    cudnn_benchmark: bool = field(
        default=False, metadata={"help": "Let cuDNN time its kernels; batches have one size."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in _LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(_LOSSES)}, got {self.loss!r}")
        for name in ("l2_sp", "distillation"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if self.grad_cache_chunk_size is not None and self.grad_cache_chunk_size < 1:
            raise ValueError(f"grad_cache_chunk_size: expected at least 1, or None, got {self.grad_cache_chunk_size}")
        if self.auto_batch and self.grad_cache_chunk_size is not None:
            raise ValueError("auto_batch: chooses grad_cache_chunk_size, expected one of the two")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: expected a factor in (0, 1], got {self.layer_decay}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay: expected a decay in [0, 1), got {self.ema_decay}")
        if self.cudnn_benchmark and self.full_determinism:
            raise ValueError(
                "cudnn_benchmark: its choice of kernels varies between runs; not with full_determinism=True"
            )


class CLIPTrainer(Trainer):
    """Used as ``transformers.Trainer``: ``CLIPTrainer(model, args, train_dataset=..., eval_dataset=...,
    processing_class=processor)``.

    Data sets have columns ``image``, ``caption`` (a string or a list) and / or ``label`` (see ``clipft.load_pairs``).
    Evaluation gives ``eval_loss`` and ``eval_image_to_text_R@1`` and so on; ``predict`` gives embeddings, (image [N,
    D], text [N, D]). Several processes (``torchrun``) use each other's pairs as negatives. The model is fused
    (:func:`clipft.fuse`) and stays so; :func:`clipft.unfuse` undoes it.
    """

    args: CLIPTrainingArguments
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: Trainer divides it by the accumulation steps

    def __init__(self, model: Any = None, args: CLIPTrainingArguments | None = None, **kwargs: Any) -> None:
        args = CLIPTrainingArguments(output_dir="trainer_output") if args is None else args
        _check_arguments(args, kwargs)
        if model is not None:
            fuse(model)
            _check_loss(args, model)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = _own_collator(model, args, kwargs.get("processing_class"))
        super().__init__(model=model, args=args, **kwargs)
        check_enabled(args, self.is_fsdp_enabled)
        if self.is_fsdp_enabled and model is not None:
            make_shardable(model)
        # Hugging Face's smoother is for class logits; compute_loss passes the factor to the contrastive loss.
        self.label_smoother = None
        self.add_callback(_ClampLogitScale)
        if args.ema_decay:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("ema_decay: not with FSDP or DeepSpeed, where no process has the whole weights")
            self._average = WeightAverage(lambda: self.model, args.ema_decay)
            self.add_callback(self._average)

    _average: WeightAverage | None = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Trainer, and fused."""
        model = fuse(super().call_model_init(trial))
        _check_loss(self.args, model)
        if self.args.fsdp:
            make_shardable(model)
        return cast(nn.Module, model)

    # ---- data ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        rows = PairRows(dataset, self.args.caption_templates)
        self._features = self._frozen_features(rows, kwargs.get("is_training", False))
        if self._features and self._features.images is not None:
            rows = PairRows(dataset, self.args.caption_templates, images=False)
        elif kwargs.get("is_training") and isinstance(self.data_collator, CLIPDataCollator):
            rows = PairRows(dataset, self.args.caption_templates, encoded=True)
        return super()._get_dataloader(rows, *args, **kwargs)

    _features: FrozenFeatures | None = None

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """The collator of the loader that is being made. PairRows has left out what is not needed."""
        return data_collator.with_features(self._features) if self._features else data_collator

    def _frozen_features(self, rows: PairRows, is_training: bool) -> FrozenFeatures | None:
        """What frozen towers say of these rows, where that saves forward passes."""
        collator = self.data_collator
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not self.args.cache_frozen or not isinstance(collator, CLIPDataCollator):
            return None
        frozen = frozen_towers(self.model)
        passes = self._passes(len(rows)) if is_training else math.inf
        captions = sorted({caption for own in rows.captions() for caption in own}) if "text" in frozen else []
        cache_texts = 0 < len(captions) < passes * len(rows)
        cache_images = (
            "vision" in frozen and passes > 1 and (not is_training or collator.augmentation == Augmentation())
        )
        if not (cache_texts or cache_images):
            return None
        with self.args.main_process_first(desc="features of frozen towers"):
            towers = self._frozen_towers()
            return FrozenFeatures(
                images=towers.images(rows) if cache_images else None,
                texts=towers.texts(captions) if cache_texts else None,
                text_rows={caption: row for row, caption in enumerate(captions)},
            )

    def _frozen_towers(self) -> FrozenTowers:
        args = self.args
        return FrozenTowers(
            self.model,
            self.processing_class,
            args.feature_cache or Path(str(args.output_dir)) / "features",
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
            precision=(self.accelerator.mixed_precision, self.compute_loss_context_manager),
            max_length=cast(CLIPDataCollator, self.data_collator).max_length,
            progress=self.progress or partial(tqdm, desc="frozen towers", disable=args.disable_tqdm),
        )

    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None  # around that loop, in place of tqdm

    def _passes(self, rows: int) -> float:
        """Epochs of the run, as planned."""
        args = self.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        def epoch() -> int:
            return int(self.state.epoch or 0)

        if self.args.class_balanced:
            return ClassBalancedSampler(labels_of(getattr(rows, "dataset", rows)), seed, epoch)
        return EpochSampler(len(rows), seed, epoch)

    # ---- loss and optimiser ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the batch; in several processes, of the batches of all ranks together."""
        features = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**features, return_logits=False)
        loss = self._loss(inputs.get("labels"), outputs.image_embeds, outputs.text_embeds, *loss_scalars(outputs))
        return (loss, outputs) if return_outputs else loss

    def _loss(
        self,
        labels: Tensor | None,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        loss = self._loss_of_pairs(labels, image_embeds, text_embeds, logit_scale, logit_bias)
        # a mean over this rank's pairs, where the loss's gradient has been multiplied (_times_world_size)
        distance = self._start.distance(image_embeds, text_embeds) if self._start else 0.0
        return loss + distance / self.args.world_size

    def _loss_of_pairs(
        self,
        labels: Tensor | None,
        image_embeds: Tensor,
        text_embeds: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
    ) -> Tensor:
        group = dist.group.WORLD if self.args.world_size > 1 else None
        if group is not None:
            image_embeds, text_embeds = (
                _times_world_size(e, self.args.world_size) for e in (image_embeds, text_embeds)
            )
        if loss_of(self.args, self.accelerator.unwrap_model(self.model)) == "sigmoid":
            assert logit_bias is not None
            return sigmoid_loss(image_embeds, text_embeds, logit_scale, logit_bias, labels=labels, group=group)
        loss = contrastive_loss(
            image_embeds,
            text_embeds,
            logit_scale,
            labels=labels,
            label_smoothing=self.args.label_smoothing_factor,
            group=group,
        )
        return loss if logit_bias is None else loss + 0.0 * logit_bias  # DDP waits for every parameter's gradient

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in Trainer; with ``grad_cache_chunk_size`` the towers see the batch in chunks, and ``l2_sp`` and
        ``distillation`` pull towards the start.
        """
        if self._start is None:
            return self._backward(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        self._start.see(inputs, self.compute_loss_context_manager)
        try:
            loss = self._backward(model, inputs, num_items_in_batch)
        finally:
            self._start.forget_batch()
        scaler = self.accelerator.scaler
        unscaled = 1.0 if scaler is None else float(scaler.get_scale())
        self._start.pull(self.accelerator.unwrap_model(model), unscaled / self.current_gradient_accumulation_steps)
        return loss

    _start: StartingPoint | None = None

    def _backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        size = self.args.grad_cache_chunk_size
        if size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        steps = self.current_gradient_accumulation_steps
        return cached_backward(
            model,
            inputs,
            size,
            lambda *embeds_and_scalars: self._loss(labels, *embeds_and_scalars) / steps,
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
        """Loss, (image_embeds, text_embeds) and labels of a batch: nothing of size B x B to gather."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, (outputs.image_embeds, outputs.text_embeds), inputs.get("labels")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, then retrieval metrics from its embeddings: the towers run once."""
        loss_only = self.args.prediction_loss_only
        with self._averaged():
            output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
            metrics = {} if loss_only else self._retrieval(dataloader.dataset, output.predictions)
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _retrieval(self, rows: PairRows, predictions: Any) -> dict[str, float]:
        captions = rows.captions()
        texts_of, texts = index_texts(captions)
        image_embeds, first_embeds = (torch.from_numpy(part).float() for part in predictions)
        known = {own[0]: row for row, own in enumerate(captions)}
        rest = [text for text in texts if text not in known]
        if rest:
            model = cast(nn.Module, self.model)
            if self.is_fsdp_enabled:
                gather_for_features(model)
            length = getattr(self.data_collator, "max_length", None)
            rest_embeds = embed_texts(model, self.processing_class, rest, self.args.per_device_eval_batch_size, length)
            first_embeds = torch.cat([first_embeds, rest_embeds])
            known |= {text: len(captions) + place for place, text in enumerate(rest)}
        return retrieval_metrics(image_embeds, first_embeds[[known[text] for text in texts]], texts_of)

    # ---- the run ----

    def _warn_of_slow_bf16(self) -> None:
        if self.args.bf16 and self.args.device.type == "cpu" and (gain := bf16_speedup("cpu")) < 1.0:
            _logger.warning(
                "bf16: this CPU takes %.1f times as long in bfloat16 as in float32 (a linear layer, measured now); "
                "float32 is faster here",
                1.0 / gain,
            )

    def _fitting_chunk(self) -> int | None:
        """Pairs that fit into memory at once, the same number on every rank; None for all of the batch."""
        model = cast(nn.Module, self.model).train()
        inputs = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        inputs.pop("labels", None)
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
        unfinished ones.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(str(self.args.output_dir)))
        self._warn_of_slow_bf16()
        if self.args.auto_batch:
            self.args.grad_cache_chunk_size = self._fitting_chunk()
        if self.args.l2_sp or self.args.distillation:  # before a checkpoint's weights take the start's place
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("l2_sp, distillation: expected a model that is whole on each process, not sharded")
            start = cast(nn.Module, self.model)
            self._start = StartingPoint(start, l2_sp=self.args.l2_sp, distillation=self.args.distillation)
        with _cudnn_benchmark(self.args.cudnn_benchmark):
            result = super().train(resume_from_checkpoint, *args, **kwargs)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write under a temporary name, then rename: whatever is called ``checkpoint-N`` is whole."""
        folder = Path(self._get_output_dir(trial))
        staging = folder / "tmp-checkpoint"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with self._averaged():
                super()._save_checkpoint(model, trial)
                if self._average and self.args.should_save:
                    self._average.save_trained(staging / name)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        self._publish(staging / name, folder / name)

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else from _publish, under the final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            shutil.rmtree(final, ignore_errors=True)  # of an earlier run in this folder
            staged.rename(final)
            staged.parent.rmdir()
            rotate_checkpoints(
                str(final.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))


# ---- parts ----


def default_learning_rate(model: nn.Module, *, lora: bool = False) -> float:
    """The peak rate where nobody names one: 1e-5 at ViT-B/32's 150 million parameters, inversely to the size, between
    5e-6 and 5e-4; for an adapter, whose weights start from nothing, 20 times that, 2e-3 at most.

    The large checkpoints know much that a high rate would undo, hence the usual 5e-6 to 1e-5; what a small model knows
    is not worth that care, and in the epochs that people train it would hardly move.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    rate = min(max(1e-5 * _BASE_SIZE / max(size, 1), 5e-6), 5e-4)
    return min(20.0 * rate, 2e-3) if lora else rate


def _check_arguments(args: Any, kwargs: dict[str, Any]) -> None:
    if not isinstance(args, CLIPTrainingArguments):
        raise TypeError(f"args: expected clipft.CLIPTrainingArguments, got {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"args: {args.n_gpu} GPUs in one process would split the negatives; start one process each (torchrun "
            f"--nproc-per-node {args.n_gpu}), or choose one with CUDA_VISIBLE_DEVICES"
        )
    check_version(args)
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy: expected 'random', which resumes exactly, got {args.train_sampling_strategy!r}"
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16: needs a GPU; on a CPU train in bfloat16 (bf16=True) or float32")
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError(
            "compute_loss_func: CLIPTrainer computes the loss named by args.loss; override compute_loss for another"
        )


def loss_of(args: CLIPTrainingArguments, model: Any) -> str:
    """``"contrastive"`` or ``"sigmoid"``."""
    return family_of(model).loss if args.loss == "auto" else args.loss


def _check_loss(args: CLIPTrainingArguments, model: Any) -> None:
    if loss_of(args, model) != "sigmoid":
        return
    if family_of(model).loss != "sigmoid":
        raise ValueError(
            f"loss: 'sigmoid' needs the logit bias that a SigLIP has; a {type(base_model(model)).__name__} has none: "
            "choose 'contrastive'"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor: the sigmoid loss has no distribution to smooth, expected 0.0, got "
            f"{args.label_smoothing_factor}"
        )


def _own_collator(model: Any, args: CLIPTrainingArguments, processor: Any) -> CLIPDataCollator:
    family_of_processor(processor)  # or an error
    augmentation = augmentation_set(args.augmentation, **{name: getattr(args, name) for name in AUGMENTATION_OPTIONS})
    length = None if model is None else model.config.text_config.max_position_embeddings
    return CLIPDataCollator(processor, augmentation=augmentation, seed=args.seed, max_length=length)


def _times_world_size(embeds: Tensor, world_size: int) -> Tensor:
    """Scale the gradient. With ``group`` each rank gets the gradient of the joined batch's loss for its own embeddings;
    the model's gradient is the sum of the ranks' parts, but DistributedDataParallel takes their mean. (The logit
    scale's gradient is whole on every rank, so its mean is right.)
    """
    if embeds.requires_grad:
        embeds.register_hook(lambda gradient: gradient * world_size)
    return embeds


class _ClampLogitScale(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        ceiling, scale = family_of(model).max_log_scale, base_model(model).logit_scale
        if ceiling is not None and scale.requires_grad:
            with torch.no_grad():
                scale.clamp_(max=ceiling)


@contextmanager
def _cudnn_benchmark(value: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = value
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def last_checkpoint(folder: str | Path) -> Path:
    """The whole checkpoint with the highest step; unfinished ones are passed over with a warning.

    Raises:
        ValueError: there is none.
    """
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        missing = _missing_from(path)
        if not missing:
            return path
        _logger.warning("%s is not a whole checkpoint (%s): resuming from an earlier one", path, missing)
    raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint-N in {folder}, found none")


def _missing_from(checkpoint: Path) -> str:
    """What a checkpoint lacks for an exact resume, or an empty string."""
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    if not any((checkpoint / name).is_file() for name in weights):
        return "no weights"
    for pattern in ("optimizer.*", "scheduler.pt", "rng_state*.pth"):  # FSDP's optimizer.bin
        if not any(checkpoint.glob(pattern)):
            return f"no {pattern}"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no readable trainer_state.json"
    return ""
