"""From rows to a batch: the collator, and captions to tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipft.data.captions import shortened
from clipft.data.objects import as_row
from clipft.data.pictures import EncodedPicture
from clipft.data.rows import read_stored
from clipft.data.sampling import mix_seed
from clipft.data.transforms import Augmentation, build_transform, stack_pictures
from clipft.families.family import Family
from clipft.families.registry import MOST_TOKENS, family_of_processor

__all__ = ["CLIPDataCollator", "FrozenFeatures", "model_inputs", "most_tokens", "tokenize", "unify_captions"]

_CHUNK = 4096  # captions tokenized at a time

# ---- collator ----


@dataclass(frozen=True)
class FrozenFeatures:
    """``pooler_output`` of frozen towers for one data set, from
    ``clipft.training.feature_cache``; None for a tower that trains.

    Attributes:
        images: [N, D], in the order of the rows.
        texts: [M, D], and ``text_rows``, the row of each caption; one of those that become the same tokens.
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
    one, else captions that become the same tokens. A row with ``draw = (epoch, index)`` is a training row: one of its
    captions and its augmentation are drawn from (seed, epoch, index). Any other row is taken as it is: first caption,
    no augmentation. Rows without captions give no text inputs.

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

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The batch of N rows, or (picture, text or class) pairs, with U distinct texts: ``pixel_values`` [N, 3, H, W],
        ``input_ids`` and ``attention_mask`` [U, L], ``text_index`` [N] where U < N, ``labels`` [N];
        ``image_pooler_output`` [N, D] and ``text_pooler_output`` [U, D] instead where features are known; ``targets``
        [N, K] of K heads. NaFlex models get patches (see ``clipft.families.naflex``), SigLIP's no ``attention_mask``,
        which they never saw.
        """
        rows = [_ready(row, number) for number, row in enumerate(rows)]
        pictures, captions = zip(*map(self._draw, rows), strict=True)
        known = self.features or FrozenFeatures()
        batch: dict[str, Tensor] = {}
        if known.images is not None:
            batch["image_pooler_output"] = known.images[[row["index"] for row in rows]]
        else:
            batch |= stack_pictures(self.processor.image_processor, pictures)
        texts: Sequence[int | None] = [None] * len(rows)
        if all(caption is not None for caption in captions):
            inputs, texts = self._texts(list(captions), known)
            batch |= inputs
        labels = [row.get("label", text) for row, text in zip(rows, texts, strict=True)]
        if all(label is not None for label in labels):
            numbers = (mix_seed(label) if isinstance(label, str) else int(label) for label in labels)
            batch["labels"] = torch.tensor(list(numbers))
        if all("targets" in row for row in rows):
            batch["targets"] = torch.tensor([row["targets"] for row in rows])
        return batch

    def _texts(self, captions: list[str], known: FrozenFeatures) -> tuple[dict[str, Tensor], list[int]]:
        """Inputs of the distinct texts, and each row's text as a number that is the same in every batch."""
        distinct = list(dict.fromkeys(captions))
        if known.texts is not None:
            assert known.text_rows is not None
            numbers = [known.text_rows[caption] for caption in distinct]
            inputs = {"text_pooler_output": known.texts[numbers]}
        else:
            inputs = tokenize(self.processor, distinct, self.max_length, family=self.family)
            numbers = _numbers(inputs)
        first = {number: row for row, number in reversed(list(enumerate(numbers)))}
        kept = sorted(first.values())
        if len(kept) < len(distinct):
            inputs = {name: tensor[kept] for name, tensor in inputs.items()}
        number_of = dict(zip(distinct, numbers, strict=True))
        texts = [number_of[caption] for caption in captions]
        if len(kept) < len(captions):
            place = {numbers[row]: number for number, row in enumerate(kept)}
            inputs["text_index"] = torch.tensor([place[text] for text in texts])
        return inputs, texts

    def _draw(self, row: dict[str, Any]) -> tuple[Tensor | None, str | None]:
        captions = row.get("captions", row.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if "draw" not in row:
            picture = self._plain(row["image"]) if "image" in row else None
            return picture, captions[0] if captions else None
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            # torch.manual_seed would seed GPUs too, whose dropout would follow the pictures
            torch.default_generator.manual_seed(mix_seed(self.seed, *row["draw"]))
            choice = int(torch.randint(len(captions), ())) if captions else 0
            picture = self._random(row["image"]) if "image" in row else None
            return picture, captions[choice] if captions else None


def _ready(row: Any, number: int) -> dict[str, Any]:
    """A row of any kind, its picture one that transforms take."""
    row = as_row(row, f"row {number}")
    if isinstance(row.get("image"), dict):
        row["image"] = EncodedPicture(read_stored(row["image"]), f"row {number}")
    return row


def tokenize(
    processor: Any, captions: list[str], max_length: int | None = None, *, family: Family | None = None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` [N, L]: cut at ``max_length`` and the tokenizer's maximum, and padded to the
    longest; for SigLIP to that length, and without a mask. ``family``: as in :class:`CLIPDataCollator`."""
    family = family or family_of_processor(processor)
    length = most_tokens(processor, max_length, family=family)
    tokens = processor.tokenizer(
        shortened(captions), padding=family.padding, truncation=True, max_length=length, return_tensors="pt"
    )
    names = ("input_ids",) if family.padding == "max_length" else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names if name in tokens}


def _numbers(tokens: dict[str, Tensor]) -> list[int]:
    """A number for the tokens of each text, without the padding, of which other batches have more or less."""
    ids = tokens["input_ids"]
    kept = tokens.get("attention_mask", torch.ones_like(ids)).bool()
    return [mix_seed(*row[own].tolist()) for row, own in zip(ids, kept, strict=True)]


def unify_captions(
    processor: Any, captions: Sequence[Sequence[str]], max_length: int | None = None, *, family: Family | None = None
) -> list[list[str]]:
    """Captions by row, those that become the same tokens (as :func:`tokenize` cuts them) as the first of them: to the
    model they are one text.
    """
    length = most_tokens(processor, max_length, family=family)
    distinct = list(dict.fromkeys(caption for own in captions for caption in own))
    first: dict[tuple[int, ...], str] = {}
    text_of: dict[str, str] = {}
    for start in range(0, len(distinct), _CHUNK):
        chunk = distinct[start : start + _CHUNK]
        tokens = processor.tokenizer(shortened(chunk), truncation=True, max_length=length)["input_ids"]
        text_of |= {text: first.setdefault(tuple(ids), text) for text, ids in zip(chunk, tokens, strict=True)}
    return [[text_of[caption] for caption in own] for own in captions]


def most_tokens(processor: Any, max_length: int | None = None, *, family: Family | None = None) -> int:
    """Where captions are cut: at ``max_length`` and the tokenizer's maximum or, if it has none, the family's."""
    limits = [length for length in (max_length, processor.tokenizer.model_max_length) if length is not None]
    return min(limits) if min(limits) <= MOST_TOKENS else (family or family_of_processor(processor)).text_length
