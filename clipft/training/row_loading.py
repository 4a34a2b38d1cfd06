"""What the Trainer reads: loaders of rows, the order of an epoch, features of frozen towers in place of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clipft.data.collate import CLIPDataCollator, FrozenFeatures
from clipft.data.objects import as_rows
from clipft.data.rows import PairRows, column_names
from clipft.data.sampling import (
    AllButLast,
    ClassBalancedSampler,
    EpochSampler,
    HardNegativeSampler,
    labels_of,
    positives_of_each_other,
)
from clipft.data.transforms import AUGMENTATION_OPTIONS, Augmentation, augmentation_set
from clipft.families.registry import family_of, family_of_processor
from clipft.inference.encode import unified
from clipft.training.arguments import CLIPTrainingArguments, loss_of
from clipft.training.checkpoints import StagedCheckpoints
from clipft.training.feature_cache import FrozenTowers, frozen_towers
from clipft.training.head_training import HeadTraining

__all__ = ["RowLoading", "given_rows", "own_collator", "rows_of_epoch"]

_FEW_EPOCHS = 5


class RowLoading(StagedCheckpoints):
    """A ``Trainer`` of data sets with the columns ``image``, ``caption`` and / or ``label``."""

    args: CLIPTrainingArguments
    _heads: HeadTraining | None = None
    _own_loss: Callable[[Tensor, Tensor, dict[str, Any]], Tensor] | None = None

    # ---- loaders ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        rows_of = partial(PairRows, dataset, self.args.caption_templates)
        if self._heads:
            rows_of = partial(rows_of, captions=self._heads.pairs, heads=self._heads.classes)
        rows = rows_of()
        self._features = self._frozen_features(rows, kwargs.get("is_training", False))
        if self._features and self._features.images is not None:
            rows = rows_of(images=False)
        elif kwargs.get("is_training") and isinstance(self.data_collator, CLIPDataCollator):
            rows = rows_of(encoded=True)
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
        passes = _passes(self.args, len(rows)) if is_training else math.inf
        has_texts = "text" in frozen and rows.has_captions
        captions = sorted({caption for own in rows.captions() for caption in own}) if has_texts else []
        cache_texts = 0 < len(captions) < passes * len(rows)
        cache_images = (
            "vision" in frozen and passes > 1 and (not is_training or collator.augmentation == Augmentation())
        )
        if not (cache_texts or cache_images):
            return None
        [texts] = unified(cast(nn.Module, self.model), self.processing_class, [captions], collator.max_length)
        place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        with self.args.main_process_first(desc="features of frozen towers"):
            towers = self._frozen_towers()
            return FrozenFeatures(
                images=towers.images(rows) if cache_images else None,
                texts=towers.texts(list(place)) if cache_texts else None,
                text_rows={caption: place[text] for caption, text in zip(captions, texts, strict=True)},
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        sampler = self._sampler(rows)
        fewer = rows_of_epoch(self.args, self.model, len(rows), own_loss=self._own_loss is not None) < len(rows)
        return AllButLast(sampler) if fewer else sampler

    def _sampler(self, rows: Any) -> Any:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed

        def epoch() -> int:
            return int(self.state.epoch or 0)

        if self.args.class_balanced:
            return ClassBalancedSampler(labels_of(getattr(rows, "dataset", rows)), seed, epoch)
        if self.args.hard_negatives:
            data = getattr(rows, "dataset", rows)
            captions = PairRows(data, self.args.caption_templates).captions()
            length = getattr(self.data_collator, "max_length", None)
            positives = positives_of_each_other(
                unified(cast(nn.Module, self.model), self.processing_class, captions, length),
                labels_of(data) if "label" in column_names(data) else None,
            )
            batch_size = self.args.train_batch_size * self.args.world_size
            embed = partial(self._embeddings, data)
            self._mined = HardNegativeSampler(embed, positives, self.args.hard_negatives, batch_size, seed, epoch)
            if self._resumed:
                self._mined.load(self._resumed)
            return self._mined
        return EpochSampler(len(rows), seed, epoch)

    _mined: HardNegativeSampler | None = None

    def _embeddings(self, data: Any) -> tuple[Tensor, Tensor]:
        """Of all rows, by the weights as they are, without augmentation; equal on all ranks."""
        model = cast(nn.Module, self.model).eval()
        parts = []
        for batch in self.get_test_dataloader(data):
            outputs: Any = self.prediction_step(model, batch, prediction_loss_only=False)[1]
            parts.append(self.accelerator.gather_for_metrics(outputs[:2]))
        images, texts = (torch.cat(side).float() for side in zip(*parts, strict=True))
        return images, texts


def given_rows(data: Any) -> Any:
    """Of what a Trainer is given: a data set, several by name, or none."""
    if isinstance(data, dict):
        return {name: as_rows(own) for name, own in data.items()}
    return None if data is None else as_rows(data)


def rows_of_epoch(args: CLIPTrainingArguments, model: Any, rows: int, *, own_loss: bool = False) -> int:
    """So many of the rows an epoch trains on: all, but for one that would be a batch of its own where the loss, of
    pairs that are told apart, is then 0 whatever the model says. (Of several processes none has a pair to itself.)
    """
    alone = args.world_size == 1 and rows > args.train_batch_size and rows % args.train_batch_size == 1
    of_pairs = args.head == "none" and not args.attributes and not own_loss
    return rows - 1 if alone and of_pairs and loss_of(args, model).needs_others else rows


# ---- the collator ----


def _passes(args: CLIPTrainingArguments, rows: int) -> float:
    """Epochs of the run, as planned."""
    if args.max_steps <= 0:
        return args.num_train_epochs
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / max(rows, 1)


def own_collator(model: Any, args: CLIPTrainingArguments, processor: Any, rows: int) -> CLIPDataCollator:
    """Where a run brings none: with the augmentation that its arguments ask for.

    Args:
        rows: of the training set.
    """
    family = family_of_processor(processor) if model is None else family_of(model)
    if not isinstance(processor, family.processor):
        family_of_processor(processor)  # or an error
    kind = _default_augmentation(model, _passes(args, rows)) if args.augmentation == "auto" else args.augmentation
    augmentation = augmentation_set(kind, **{name: getattr(args, name) for name in AUGMENTATION_OPTIONS})
    length = None if model is None else family.most_positions(model.config)
    return CLIPDataCollator(processor, augmentation=augmentation, seed=args.seed, max_length=length, family=family)


def _default_augmentation(model: Any, passes: float) -> str:
    """Crops keep a tower from learning pictures by heart; in a few epochs it cannot, and they only slow it down. What a
    frozen tower says of a picture is computed once, where the picture stays the same.
    """
    frozen = model is not None and "vision" in frozen_towers(model)
    return "none" if frozen or passes <= _FEW_EPOCHS else "crop"
