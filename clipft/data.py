"""From rows to batches: the checkpoint's own preprocessing, seeded augmentation, the collator.

A data set has the columns ``image``, ``caption`` (a string or a list of them) and / or ``label``. Every random choice
of a training row (which caption, which crop) is drawn from (seed, epoch, index) alone, so a resumed run sees what the
unbroken one would have seen, with any number of workers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from transformers.image_utils import pil_torch_interpolation_mapping

from clipft import naflex
from clipft.families import MOST_TOKENS, family_of_processor

__all__ = ["DEFAULT_TEMPLATES", "Augmentation", "CLIPDataCollator", "PairRows", "class_text"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_text(name: str) -> str:
    """A class name as it stands in a caption: ``long_sleeve`` is "long sleeve"."""
    return name.replace("_", " ")


# ---- preprocessing ----


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training picture; all off by default.

    Attributes:
        random_resized_crop: smallest share of the picture's area that a crop may keep, in (0, 1], or None for the
            checkpoint's own resize and centre crop. Small shares harm where the caption tells of something that a crop
            may miss.
        horizontal_flip: probability. Harms where left and right mean something: text in pictures, radiographs, signs.
        color_jitter: strength of random brightness, contrast and saturation (hue: a quarter of it), at most 0.5. Harms
            where colour is in the captions, or carries a measurement.
    """

    random_resized_crop: float | None = None
    horizontal_flip: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        scale = self.random_resized_crop
        if scale is not None and not 0.0 < scale <= 1.0:
            raise ValueError(f"random_resized_crop: expected a share of the area in (0, 1] or None, got {scale}")
        if not 0.0 <= self.horizontal_flip <= 1.0:
            raise ValueError(f"horizontal_flip: expected a probability in [0, 1], got {self.horizontal_flip}")
        if not 0.0 <= self.color_jitter <= 0.5:
            raise ValueError(f"color_jitter: expected a strength in [0, 0.5], got {self.color_jitter}")


def build_transform(image_processor: Any, augmentation: Augmentation | None = None) -> Callable[[Any], Tensor]:
    """Picture (PIL, array or tensor) to [3, H, W] float32; :func:`stack_pictures` makes a batch of them.

    The steps are the image processor's own methods, hence its result bit for bit; a random crop stands in for its
    resize and centre crop, with its size and interpolation, and random changes come before its normalisation.
    """
    backend = getattr(image_processor, "backend", None)
    if backend != "torchvision":
        raise ValueError(
            f"processor: expected the torchvision image processor, got {type(image_processor).__name__} with backend "
            f"{backend!r}: load it with clipft.load, or with backend='torchvision'"
        )
    steps: list[Any] = [
        partial(image_processor.process_image, do_convert_rgb=image_processor.do_convert_rgb),
        *_geometry(image_processor, augmentation),
        *_changes(augmentation),
        _normalisation(image_processor),
    ]
    return v2.Compose(steps)


def stack_pictures(image_processor: Any, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """What the image tower takes of N pictures that :func:`build_transform` made: ``pixel_values`` [N, 3, H, W], or
    patches (see ``clipft.naflex``)."""
    if naflex.is_naflex(image_processor):
        return naflex.patchify(pictures, image_processor)
    return {"pixel_values": torch.stack(list(pictures))}


def _geometry(processor: Any, augmentation: Augmentation | None) -> list[Any]:
    if naflex.is_naflex(processor):
        smallest = None if augmentation is None else augmentation.random_resized_crop
        cut = [] if smallest is None else [naflex.RandomCrop((smallest, 1.0))]
        return [*cut, partial(naflex.resize, image_processor=processor)]
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    if augmentation is not None and augmentation.random_resized_crop is not None:
        target = crop or size
        side = (target.height or target.shortest_edge, target.width or target.shortest_edge)
        scale = (augmentation.random_resized_crop, 1.0)
        resample = pil_torch_interpolation_mapping[processor.resample]
        return [v2.RandomResizedCrop(side, scale=scale, interpolation=resample, antialias=True)]
    steps = [partial(processor.resize, size=size, resample=processor.resample)] if processor.do_resize else []
    return [*steps, partial(processor.center_crop, size=crop)] if crop else steps


def _changes(augmentation: Augmentation | None) -> list[Any]:
    steps: list[Any] = []
    if augmentation is not None and augmentation.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.horizontal_flip))
    if augmentation is not None and augmentation.color_jitter:
        strength = augmentation.color_jitter
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    return steps


def _normalisation(processor: Any) -> Callable[[Tensor], Tensor]:
    return partial(
        processor.rescale_and_normalize,
        do_rescale=processor.do_rescale,
        rescale_factor=processor.rescale_factor,
        do_normalize=processor.do_normalize,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
    )


# ---- rows ----


class PairRows(Dataset[dict[str, Any]]):
    """A view of a data set for the collator: rows of ``image``, ``captions`` (a list), and ``label`` where captions
    come from it.

    An index may be a pair (epoch, i), or (epoch, i, repeat): the row then carries it as ``draw``, which makes it a
    training row. A data set without captions gets them from its class names through ``templates``. With
    ``images=False`` rows come without their pictures, for a collator that has features of them, and carry ``index``
    instead.
    """

    def __init__(self, dataset: Any, templates: Sequence[str] = DEFAULT_TEMPLATES, *, images: bool = True) -> None:
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset: expected one with a length and rows by index, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise ValueError("dataset: expected at least one row, got none")
        self.dataset = dataset
        columns = column_names(dataset)
        if "image" not in columns:
            raise ValueError(f"dataset: expected a column 'image', found {sorted(columns)}; clipft.load_pairs renames")
        self._class_captions: list[list[str]] | None = None
        if "caption" not in columns:
            self._class_captions = _class_captions(dataset, columns, templates)
        self._without_images = None if images else _drop_images(dataset, columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        row = read_row(self.dataset if self._without_images is None else self._without_images, index)
        pair: dict[str, Any] = {"captions": self._captions_of(row, index)}
        if self._without_images is None:
            pair["image"] = row["image"]
        else:
            pair["index"] = index
        if self._class_captions is not None:
            pair["label"] = int(row["label"])
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
    """``dataset[index]``; a picture that cannot be decoded is an error that names its row."""
    try:
        return cast(dict[str, Any], dataset[index])
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises for broken files
        raise ValueError(f"row {index}: the image cannot be read ({error})") from error


def column_names(dataset: Any) -> list[str]:
    """Columns of a ``datasets.Dataset``, else the keys of the first row."""
    names = getattr(dataset, "column_names", None)
    return list(names if names is not None else dataset[0])


def class_names_of(dataset: Any) -> list[str] | None:
    """The names behind the column ``label``, if the data set has them."""
    feature = (getattr(dataset, "features", None) or {}).get("label")
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


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
        ``text_pooler_output`` [U, D] instead where features are known. NaFlex models get patches (see
        ``clipft.naflex``), SigLIP's an ``attention_mask`` only where their tokenizer gives one."""
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
    family, tokenizer = family_of_processor(processor), processor.tokenizer
    limits = [length for length in (max_length, tokenizer.model_max_length) if length is not None]
    length = min(limits) if min(limits) <= MOST_TOKENS else family.text_length
    tokens = tokenizer(captions, padding=family.padding, truncation=True, max_length=length, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
