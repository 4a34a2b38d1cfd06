"""From rows to a batch: the collator, and captions to tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipft.data.sampling import mix_seed
from clipft.data.transforms import Augmentation, build_transform, stack_pictures
from clipft.families.family import Family
from clipft.families.registry import MOST_TOKENS, family_of_processor

__all__ = ["CLIPDataCollator", "FrozenFeatures", "model_inputs", "most_tokens", "tokenize"]

# ---- collator ----


@dataclass(frozen=True)
class FrozenFeatures:
    """``pooler_output`` of frozen towers for one data set, from
    ``clipft.training.feature_cache``; None for a tower that trains.

    Attributes:
        images: [N, D], in the order of the rows.
        texts: [M, D], and ``text_rows``, the row of each caption.
    """

    images: Tensor | None = None
    texts: Tensor | None = None
    text_rows: dict[str, int] | None = None


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a collator's batch, what the model's forward takes."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}


class CLIPDataCollator:
    """Rows to a batch: ``pixel_values``, ``input_ids``, ``attention_mask``, ``labels``.

    Captions are cut at the model's maximum (77 for CLIP, 64 for SigLIP) and padded to the batch's longest, for SigLIP
    to the maximum. ``labels`` [N] int64 tell which pairs are positives of each other: the row's ``label`` if it has
    one, else equal captions. A row with ``draw = (epoch, index)`` is a training row: one of its captions and its
    augmentation are drawn from (seed, epoch, index). Any other row is taken as it is: first caption, no augmentation.
    Rows without captions give no text inputs.

    Args:
        processor: with the torchvision image processor, as ``clipft.load`` gives it.
        augmentation: random changes to training rows.
        seed: of the draws.
        max_length: most tokens of a caption; default: the tokenizer's own maximum.
        family: the model's; default: by the class of the processor, which families may share.
    """

    def __init__(
        self,
        processor: Any,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        max_length: int | None = None,
        family: Family | None = None,
    ) -> None:
        self.processor = processor
        self.family = family or family_of_processor(processor)
        self.seed = seed
        self.max_length = max_length
        self.augmentation = augmentation or Augmentation()
        self.features: FrozenFeatures | None = None
        self._plain = build_transform(processor.image_processor)
        self._random = build_transform(processor.image_processor, self.augmentation)

    def with_features(self, features: FrozenFeatures | None) -> CLIPDataCollator:
        """The same for a data set whose frozen towers' outputs are known; they take the place of inputs."""
        other = copy.copy(self)
        other.features = features
        return other

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of N rows with U distinct captions: ``pixel_values`` [N, 3, H, W], ``input_ids`` and
        ``attention_mask`` [U, L], ``text_index`` [N] where U < N, ``labels`` [N]; ``image_pooler_output`` [N, D] and
        ``text_pooler_output`` [U, D] instead where features are known; ``targets`` [N, K] of K heads. NaFlex models get
        patches (see ``clipft.families.naflex``), SigLIP's no ``attention_mask``, which they never saw.
        """
        pictures, captions = zip(*map(self._draw, rows), strict=True)
        known = self.features or FrozenFeatures()
        batch: dict[str, Tensor] = {}
        if known.images is not None:
            batch["image_pooler_output"] = known.images[[row["index"] for row in rows]]
        else:
            batch |= stack_pictures(self.processor.image_processor, pictures)
        if all(caption is not None for caption in captions):
            batch |= self._texts(list(captions), known)
        labels = [row.get("label", caption) for row, caption in zip(rows, captions, strict=True)]
        if all(label is not None for label in labels):
            batch["labels"] = torch.tensor(
                [mix_seed(label) if isinstance(label, str) else int(label) for label in labels]
            )
        if all("targets" in row for row in rows):
            batch["targets"] = torch.tensor([row["targets"] for row in rows])
        return batch

    def _texts(self, captions: list[str], known: FrozenFeatures) -> dict[str, Tensor]:
        place = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        batch: dict[str, Tensor] = {}
        if known.texts is not None:
            assert known.text_rows is not None
            batch["text_pooler_output"] = known.texts[[known.text_rows[caption] for caption in place]]
        else:
            batch |= tokenize(self.processor, list(place), self.max_length, family=self.family)
        if len(place) < len(captions):
            batch["text_index"] = torch.tensor([place[caption] for caption in captions])
        return batch

    def _draw(self, row: dict[str, Any]) -> tuple[Tensor | None, str | None]:
        captions = row.get("captions", row.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if "draw" not in row:
            picture = self._plain(row["image"]) if "image" in row else None
            return picture, captions[0] if captions else None
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(mix_seed(self.seed, *row["draw"]))
            choice = int(torch.randint(len(captions), ())) if captions else 0
            picture = self._random(row["image"]) if "image" in row else None
            return picture, captions[choice] if captions else None


def tokenize(
    processor: Any, captions: list[str], max_length: int | None = None, *, family: Family | None = None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [N, L]: cut at ``max_length`` and the tokenizer's maximum, and padded to the
    longest; for SigLIP to that length, and without a mask. ``family``: as in :class:`CLIPDataCollator`."""
    family = family or family_of_processor(processor)
    length = most_tokens(processor, max_length, family=family)
    tokens = processor.tokenizer(
        captions, padding=family.padding, truncation=True, max_length=length, return_tensors="pt"
    )
    names = ("input_ids",) if family.padding == "max_length" else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names if name in tokens}


def most_tokens(processor: Any, max_length: int | None = None, *, family: Family | None = None) -> int:
    """Where captions are cut: at ``max_length`` and the tokenizer's maximum or, if it has none, the family's."""
    limits = [length for length in (max_length, processor.tokenizer.model_max_length) if length is not None]
    return min(limits) if min(limits) <= MOST_TOKENS else (family or family_of_processor(processor)).text_length
