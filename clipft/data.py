"""From rows to batches: rows of a data set, the order of an epoch, the collator.

A data set has the columns ``image``, ``caption`` (a string or a list of them) and / or ``label``. Every random choice
of a training row (which caption, which crop) is drawn from (seed, epoch, index) alone, so a resumed run sees what the
unbroken one would have seen, with any number of workers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from clipft.families import MOST_TOKENS, family_of_processor
from clipft.losses import MISSING
from clipft.pixels import UNREADABLE
from clipft.shards import read_slice, shard_of
from clipft.transforms import Augmentation, EncodedPicture, build_transform, stack_pictures

__all__ = ["DEFAULT_TEMPLATES", "CLIPDataCollator", "PairRows", "class_text"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_text(name: str) -> str:
    """A class name as it stands in a caption: ``long_sleeve`` is "long sleeve"."""
    return name.replace("_", " ")


# ---- rows ----


class PairRows(Dataset[dict[str, Any]]):
    """A view of a data set for the collator: rows of ``image``, ``captions`` (a list), and ``label`` where captions
    come from it.

    An index may be a pair (epoch, i), or (epoch, i, repeat): the row then carries it as ``draw``, which makes it a
    training row. A data set without captions gets them from its class names through ``templates``. With
    ``images=False`` rows come without their pictures, for a collator that has features of them, and carry ``index``
    instead. With ``encoded=True`` the pictures are not decoded yet (:class:`clipft.transforms.EncodedPicture`), where
    the data set has their files. With ``captions=False`` rows come without them, for a loss that needs none.
    ``heads`` names data columns with the classes of each: rows then carry ``targets``, the class in each of them.
    """

    def __init__(
        self,
        dataset: Any,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        images: bool = True,
        encoded: bool = False,
        captions: bool = True,
        heads: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset: expected one with a length and rows by index, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise ValueError("dataset: expected at least one row, got none")
        self.dataset = dataset
        columns = column_names(dataset)
        if "image" not in columns:
            raise ValueError(f"dataset: expected a column 'image', found {sorted(columns)}; clipft.load_pairs renames")
        self.targets = {name: class_targets(dataset, name, classes) for name, classes in (heads or {}).items()}
        self.has_captions = captions
        self._class_captions: list[list[str]] | None = None
        if captions and "caption" not in columns:
            self._class_captions = _class_captions(dataset, columns, templates)
        self._images = images
        self._source = dataset if images else _drop_images(dataset, columns)
        if images and encoded:
            self._source = stored_pictures(dataset) or dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        row = read_row(self._source, index)
        pair: dict[str, Any] = {"captions": self._captions_of(row, index)} if self.has_captions else {}
        if self._images:
            pair["image"] = row["image"]
        else:
            pair["index"] = index
        if self._class_captions is not None:
            pair["label"] = int(row["label"])
        if self.targets:
            pair["targets"] = [int(own[index]) for own in self.targets.values()]
        if isinstance(key, tuple):
            pair["draw"] = key
        return pair

    def captions(self) -> list[list[str]]:
        """The captions of every row, without decoding pictures where the data set allows it."""
        column = "caption" if self._class_captions is None else "label"
        if isinstance(self.dataset, datasets.Dataset):
            rows = ({column: value} for value in self.dataset[column])
        else:
            rows = (self.dataset[index] for index in range(len(self)))
        return [self._captions_of(row, index) for index, row in enumerate(rows)]

    def _captions_of(self, row: dict[str, Any], index: int) -> list[str]:
        if self._class_captions is not None:
            return self._class_captions[int(row["label"])]
        captions = [row["caption"]] if isinstance(row["caption"], str) else list(row["caption"] or ())
        if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise ValueError(f"row {index}: expected a caption or a list of captions, got {row['caption']!r}")
        return captions


def _drop_images(dataset: Any, columns: list[str]) -> Any:
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    return dataset.select_columns([name for name in ("caption", "label") if name in columns])


def read_row(dataset: Any, index: int) -> dict[str, Any]:
    """``dataset[index]``, with an :class:`EncodedPicture` where a picture comes as a file. One that cannot be read is
    an error that names its row.
    """
    try:
        row = cast(dict[str, Any], dataset[index])
        if isinstance(row.get("image"), dict):
            row["image"] = EncodedPicture(read_stored(row["image"]), _name(row["image"], index))
        return row
    except UNREADABLE as error:
        stored = stored_pictures(dataset)
        name = _name(stored[index]["image"] if stored else {}, index)
        raise ValueError(f"{name}: the image cannot be read ({error})") from error


def _name(stored: dict[str, Any], index: int) -> str:
    return f"row {index} ({stored['path']})" if stored.get("path") else f"row {index}"


def stored_pictures(dataset: Any) -> datasets.Dataset | None:
    """The data set with its pictures as they are stored, ``{"bytes": ..., "path": ...}``, if it stores files."""
    if not isinstance(dataset, datasets.Dataset) or not isinstance(dataset.features.get("image"), datasets.Image):
        return None
    return dataset.cast_column("image", datasets.Image(decode=False))


def read_stored(image: dict[str, Any]) -> bytes:
    """The file of a picture of :func:`stored_pictures`."""
    if image["bytes"] is not None:
        return image["bytes"]
    return read_slice(image["path"]) if shard_of(image["path"]) else Path(image["path"]).read_bytes()


def column_names(dataset: Any) -> list[str]:
    """Columns of a ``datasets.Dataset``, else the keys of the first row."""
    names = getattr(dataset, "column_names", None)
    return list(names if names is not None else dataset[0])


def column_values(dataset: Any, column: str) -> list[Any]:
    """A column's values, without decoding pictures where the data set allows it."""
    by_column = hasattr(dataset, "column_names")
    return list(dataset[column]) if by_column else [dataset[index][column] for index in range(len(dataset))]


def class_names_of(dataset: Any, column: str = "label") -> list[str] | None:
    """The names behind the column ``label``, or another, if the data set has them."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def class_targets(dataset: Any, column: str, class_names: Sequence[str]) -> np.ndarray[Any, Any]:
    """[N] int64: for each row the place of its class in ``class_names``, which need not be those of the data set;
    ``MISSING`` where it has none.

    Raises:
        ValueError: no such column, or a class that is not among the names.
    """
    if column not in column_names(dataset):
        raise ValueError(
            f"dataset: expected a column {column!r} with the classes {list(class_names)[:5]}, found "
            f"{sorted(column_names(dataset))}"
        )
    own, place = class_names_of(dataset, column), {name: number for number, name in enumerate(class_names)}

    def target(value: Any) -> int:
        if value is None or value == -1:  # how datasets write an unknown ClassLabel
            return MISSING
        if own is None and not isinstance(value, str):
            return int(value) if 0 <= value < len(class_names) else -1
        return place.get(value if own is None else own[value], -1)

    values = column_values(dataset, column)
    targets = np.array([target(value) for value in values], dtype=np.int64)
    if (targets == -1).any():
        other = sorted({str(values[row] if own is None else own[values[row]]) for row in (targets == -1).nonzero()[0]})
        raise ValueError(f"dataset: column {column!r}: expected classes among {list(class_names)}, found {other[:10]}")
    return targets


def _class_captions(dataset: Any, columns: list[str], templates: Sequence[str]) -> list[list[str]]:
    names = class_names_of(dataset)
    if "label" not in columns or names is None:
        raise ValueError(
            "dataset: expected a column 'caption', or a column 'label' of type datasets.ClassLabel to make captions "
            f"from; found {sorted(columns)}"
        )
    return [render(templates, name) for name in names]


def render(templates: Sequence[str], name: str) -> list[str]:
    """Captions of one class. A template has exactly one ``{}``."""
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates: expected a list of strings with {{}}, got {templates!r}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: expected exactly one {{}} in each, got {template!r}")
    return [template.replace("{}", class_text(name)) for template in templates]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in an order that depends on seed and epoch alone, hence equal on all ranks and after a
    resume.
    """

    def __init__(self, length: int, seed: int, epoch: Callable[[], int]) -> None:
        self.length, self.seed, self.epoch = length, seed, epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch()
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(mix_seed(self.seed, epoch, "order"))
        )
        return ((epoch, index) for index in order.tolist())


def mix_seed(*parts: Any) -> int:
    """A 64-bit seed from any values, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# ---- collator ----


@dataclass(frozen=True)
class FrozenFeatures:
    """``pooler_output`` of frozen towers for one data set, from ``clipft.features``; None for a tower that trains.

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
    """

    def __init__(
        self,
        processor: Any,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
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
        patches (see ``clipft.naflex``), SigLIP's an ``attention_mask`` only where their tokenizer gives one."""
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
            batch |= tokenize(self.processor, list(place), self.max_length)
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


def tokenize(processor: Any, captions: list[str], max_length: int | None = None) -> dict[str, Tensor]:
    """``input_ids`` and, where the tokenizer gives it, ``attention_mask`` [N, L]: cut at ``max_length`` and the
    tokenizer's maximum, and padded to the longest, for SigLIP to that length."""
    padding, length = family_of_processor(processor).padding, most_tokens(processor, max_length)
    tokens = processor.tokenizer(captions, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}


def most_tokens(processor: Any, max_length: int | None = None) -> int:
    """Where captions are cut: at ``max_length`` and the tokenizer's maximum or, if it has none, the family's."""
    limits = [length for length in (max_length, processor.tokenizer.model_max_length) if length is not None]
    return min(limits) if min(limits) <= MOST_TOKENS else family_of_processor(processor).text_length
