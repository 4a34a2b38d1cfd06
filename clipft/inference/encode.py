"""Pictures and texts as embeddings: by a model in torch or by ONNX Runtime (``clipft.embed``).

An encoder is what both have in common: a transform of one picture, and functions from batches to L2-normalised rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clipft.data.collate import tokenize, unify_captions
from clipft.data.objects import as_rows
from clipft.data.pictures import (
    UNREADABLE,
    EncodedPicture,
    UnreadablePictureError,
    in_order,
    naming,
    open_picture,
)
from clipft.data.rows import read_row, read_stored, render, stored_pictures
from clipft.data.transforms import build_transform, stack_pictures
from clipft.errors import line_of
from clipft.families.registry import base_model, family_of
from clipft.files import expanded, settle
from clipft.models.formats import ONNX_INFO
from clipft.models.given import given_model
from clipft.models.loading import load

__all__ = [
    "Encoder",
    "Pictures",
    "Progress",
    "batches_of",
    "class_embeddings",
    "class_vectors",
    "embed",
    "embed_images",
    "embed_texts",
    "encode_pictures",
    "encoder_of",
    "evaluating",
    "finite",
    "load_any",
    "load_encoder",
    "unified",
]

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Encoder:
    """A model for embedding, whatever runs it."""

    transform: Callable[[Any], Any]  # a PIL picture -> [3, H, W] float32
    images: Callable[[Sequence[Any]], Array]  # N of them -> [N, D]
    texts: Callable[[Sequence[str]], Array]  # N -> [N, D]
    identity: Callable[[], str]  # of weights and preprocessing


def embed(
    model: Any,
    processor: Any = None,
    images: Any = None,
    texts: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Vectors of pictures or of texts.

    Args:
        model: a folder (one of :func:`clipft.export_onnx` too), a hub name, ``"demo"``, ``(model, processor)``, a
            :class:`clipft.recipes.run.Run`; or with ``processor`` a ``CLIPModel``, in float or int8, or one of another
            family, a peft model of one, or a :class:`clipft.OnnxCLIP`.
        processor: of a model in torch that comes without its own; None with ``OnnxCLIP``.
        images: PIL pictures, paths, or a data set as :class:`clipft.CLIPTrainer` takes it; of pairs their pictures.
        texts: strings. One of the two is given.
        batch_size, num_workers: pictures or texts at a time; processes that load pictures.
        progress: wraps the loop over batches of pictures.

    Returns:
        [N, D] float32 on the CPU, L2-normalised, in the order given.

    Raises:
        ValueError: both or none of ``images`` and ``texts``, a picture that cannot be read, or a model that gives NaN.
        TypeError: a single string or picture where several are expected.
    """
    if (images is None) == (texts is None):
        raise ValueError("images, texts: expected one of the two")
    model, processor = given_model(model, processor, load_any)
    encoder = encoder_of(model, processor, batch_size)
    if texts is not None:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts: expected a list of strings, got {type(texts).__name__}")
        texts = list(texts)
        return torch.from_numpy(finite(encoder.texts(texts), texts))
    if isinstance(images, (str, bytes, Path, Image.Image)) or not hasattr(images, "__getitem__"):
        raise TypeError(f"images: expected several pictures, paths or a data set, got {type(images).__name__}")
    pictures = _pictures_of(images)
    parts = [rows for rows, _ in encode_pictures(encoder, pictures, batch_size, num_workers, progress=progress)]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, _dim(model))


def _pictures_of(images: Any) -> Any:
    """Pictures by index, or rows of them."""
    images = in_order(images) if getattr(images, "ndim", 2) == 1 else images  # a frame is rows
    several = isinstance(images, (list, tuple, np.ndarray))
    return images if several and not (len(images) and isinstance(images[0], (dict, tuple, list))) else as_rows(images)


def _dim(model: Any) -> int:
    if info := getattr(model, "info", None):
        return int(info["dim"])

    return family_of(model).dim(model.config)


# ---- encoders ----


def load_encoder(name: str, *, int8: bool = False, batch_size: int = 64, threads: int | None = None) -> Encoder:
    """Of a folder that :func:`clipft.export_onnx` wrote, where ``int8`` chooses between its encoders, or of anything
    that :func:`clipft.load` takes. ``threads``: of ONNX Runtime or, in the whole process, of torch.
    """
    return encoder_of(*load_any(name, int8=int8, threads=threads), batch_size)


def load_any(name: str | Path, *, int8: bool = False, threads: int | None = None) -> tuple[Any, Any]:
    """As :func:`load_encoder`: an :class:`clipft.OnnxCLIP` and None, or a model and its processor."""
    folder = expanded(name)
    settle(folder)
    if (folder / ONNX_INFO).is_file():
        from clipft.inference.onnx_clip import OnnxCLIP  # an extra, which writes files as it loads

        return OnnxCLIP(folder, int8=int8, threads=threads), None
    if int8:
        raise ValueError(f"int8: chooses between the encoders of an ONNX folder, which {str(name)!r} is not")
    if threads is not None:
        torch.set_num_threads(threads)
    return load(name)


def encoder_of(model: Any, processor: Any, batch_size: int) -> Encoder:
    """The encoder that runs this model."""
    if hasattr(model, "encode_images"):
        return Encoder(
            model.preprocess,
            lambda pictures: cast(Array, model.run_images(np.stack(pictures))),
            lambda texts: cast(Array, model.encode_texts(texts, batch_size)),
            lambda: _digest([json.dumps(model.info, sort_keys=True).encode(), model.identity().encode()]),
        )

    if processor is None:
        raise ValueError("processor: expected the model's processor, as clipft.load gives both, got None")

    def images(pictures: Sequence[Any]) -> Array:
        inputs = stack_pictures(processor.image_processor, [torch.as_tensor(picture) for picture in pictures])
        with evaluating(model) as device:
            features = model.get_image_features(**{name: x.to(device) for name, x in inputs.items()}).pooler_output
        return cast(Array, torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())

    def identity() -> str:
        tensors = (tensor.detach().cpu().contiguous() for tensor in model.state_dict().values())
        weights = (tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
        return _digest([str(processor.image_processor.to_dict()).encode(), *weights])

    return Encoder(
        build_transform(processor.image_processor),
        images,
        lambda texts: cast(Array, embed_texts(model, processor, texts, batch_size).numpy()),
        identity,
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


# ---- pictures ----


class _Pixels(Dataset[Any]):
    """Transformed pictures by index; with ``skip``, what is wrong with one that cannot be read."""

    def __init__(self, transform: Callable[[Any], Any], pictures: Any, names: Sequence[str] | None, skip: bool) -> None:
        if isinstance(pictures, (list, tuple)):  # a spawned worker may stand in another folder
            pictures = [Path(one).absolute() if isinstance(one, (str, Path)) else one for one in pictures]
        self.transform, self.names, self.skip = transform, names, skip
        self.pictures = stored_pictures(pictures) or pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        try:
            return np.asarray(self.transform(self._picture(index)))
        except UNREADABLE as error:
            if self.skip:
                return _why(error)
            with naming(self.names[index] if self.names else f"row {index}"):
                raise

    def _picture(self, index: int) -> Any:
        picture = self.pictures[index]
        picture = picture["image"] if isinstance(picture, dict) else picture
        if isinstance(picture, dict):
            return EncodedPicture(read_stored(picture), f"row {index}").decode()
        return open_picture(picture)


def encode_pictures(
    encoder: Encoder,
    pictures: Any,
    batch_size: int,
    num_workers: int = 0,
    *,
    names: Sequence[str] | None = None,
    skip: bool = False,
    batches: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Array, list[str | None]]]:
    """Batch by batch: vectors of the pictures that could be read, and for each picture None or why it could not.
    ``names`` are for errors; ``batches`` are the rows of each, default: all in their order. One pool of workers reads
    for all of them.

    Raises:
        ValueError: a picture cannot be read, and not ``skip``; or the model gives NaN.
    """
    rows = _Pixels(encoder.transform, pictures, names, skip)
    if batches is None:
        batches = batches_of([range(len(rows))], batch_size)
    loader = DataLoader(rows, batch_sampler=batches, num_workers=num_workers, collate_fn=list)  # type: ignore[arg-type]
    for numbers, batch in zip(batches, progress(loader) if progress else loader, strict=True):
        faults = [pixels if isinstance(pixels, str) else None for pixels in batch]
        kept = [number for number, fault in zip(numbers, faults, strict=True) if fault is None]
        if kept:
            vectors = encoder.images([pixels for pixels in batch if not isinstance(pixels, str)])
            yield finite(vectors, [names[number] if names else f"row {number}" for number in kept]), faults
        else:
            yield np.empty((0, 0), np.float32), faults


def batches_of(parts: Sequence[range], size: int) -> list[range]:
    """Rows of a batch each, none of two parts."""
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def _why(error: BaseException) -> str:
    """In a line, without the picture's name."""
    return line_of(error.why if isinstance(error, UnreadablePictureError) else error)


def finite(vectors: Array, names: Sequence[str]) -> Array:
    """The vectors [N, D] that a model gave for N pictures or texts.

    Raises:
        ValueError: NaN or Inf among them.
    """
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{names[bad[0]]}: the model gives NaN or Inf for it and {len(bad) - 1} more of {len(names)}: a training "
            "that diverged, or half precision that overflows"
        )
    return vectors


# ---- embeddings ----


class Pictures(Dataset[Any]):
    """The column ``image`` alone."""

    def __init__(self, dataset: Any) -> None:
        rows = as_rows(dataset)
        self.dataset = stored_pictures(rows) or rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_row(self.dataset, index)["image"]}


class _StackPictures:
    def __init__(self, processor: Any) -> None:
        self.image_processor = processor.image_processor
        self.transform = build_transform(processor.image_processor)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return stack_pictures(self.image_processor, [self.transform(row["image"]) for row in rows])


def embed_images(
    model: nn.Module,
    processor: Any,
    rows: Dataset[Any],
    *,
    batch_size: int,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """[N, D] float32 on the CPU, L2-normalised."""
    loader = DataLoader(rows, batch_size, num_workers=num_workers, collate_fn=_StackPictures(processor))
    with evaluating(model) as device:
        parts = [
            _unit(model.get_image_features(**{name: tensor.to(device) for name, tensor in pictures.items()}))  # type: ignore[operator]
            for pictures in (progress(loader) if progress else loader)
        ]
    embeds = torch.cat(parts)
    finite(embeds.numpy(), [f"row {row}" for row in range(len(embeds))])
    return embeds


def embed_texts(
    model: nn.Module, processor: Any, texts: Sequence[str], batch_size: int, max_length: int | None = None
) -> Tensor:
    """[N, D] float32 on the CPU, L2-normalised. Texts of like length share a batch, so that few padding tokens are
    computed.
    """
    family, max_length = family_of(model), _length(model, max_length)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with evaluating(model) as device:
        parts = []
        for start in range(0, len(order), batch_size):
            batch = [texts[index] for index in order[start : start + batch_size]]
            tokens = tokenize(processor, batch, max_length, family=family)
            features = model.get_text_features(**{name: ids.to(device) for name, ids in tokens.items()})  # type: ignore[operator]
            parts.append(_unit(features))
    embeds = torch.cat(parts)
    return torch.empty_like(embeds).index_copy_(0, torch.tensor(order), embeds)


def unified(
    model: nn.Module, processor: Any, captions: Sequence[Sequence[str]], max_length: int | None = None
) -> list[list[str]]:
    """Captions by row, those that :func:`embed_texts` gives the same tokens as the first of them."""
    return unify_captions(processor, captions, _length(model, max_length), family=family_of(model))


def _length(model: nn.Module, max_length: int | None) -> int:
    positions = family_of(model).most_positions(base_model(model).config)
    return min(positions, max_length or positions)


def _unit(features: Any) -> Tensor:
    return nn.functional.normalize(features.pooler_output.float(), dim=-1).cpu()


def class_embeddings(
    model: nn.Module, processor: Any, names: Sequence[str], templates: Sequence[str], batch_size: int
) -> Tensor:
    """[classes, D]: each class's mean over the templates, L2-normalised."""
    return class_vectors(lambda texts: embed_texts(model, processor, texts, batch_size), names, templates)


def class_vectors(encode: Callable[[Sequence[str]], Any], names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """As :func:`class_embeddings`, whatever gives the texts' embeddings."""
    texts = [text for name in names for text in render(templates, name)]
    embeds = torch.as_tensor(encode(texts)).view(len(names), len(templates), -1)
    return nn.functional.normalize(embeds.mean(1), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, on the model's device; each module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training
