"""Models for larger pictures and longer captions than they were pre-trained on: their tables of positions, resized.

An image tower's table is a grid, resized bicubically with antialiasing as open_clip does, the class token apart. A text
tower's is stretched as Long-CLIP does (arXiv:2403.15378): the first 20 positions, which most captions of pre-training
did not go beyond, stay; the rest is interpolated. Configuration and processor follow, so that what is saved is a plain
model of the new size. All other weights stay: a resized model wants training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipft.data.collate import tokenize
from clipft.families.family import Family, Tower
from clipft.families.registry import base_model, check_model
from clipft.models.calibrated import set_calibrations
from clipft.models.fusing import check_float
from clipft.models.processors import check_pictures

__all__ = ["SIZES", "check_resize", "names_of_tables", "resize", "sizes_of"]

SIZES = ("image_size", "max_tokens")
_MOST = 8192  # pixels a side, or tokens
_KEPT = 20  # positions of a caption that stay where they are


def resize(model: Any, processor: Any, *, image_size: int | None = None, max_tokens: int | None = None) -> Any:
    """Give a model another picture size, or room for longer captions, before it is trained with them.

    Args:
        model: a ``CLIPModel`` or ``SiglipModel`` without adapters, as it was loaded; changed in place.
        processor: its processor, whose pictures and captions become the model's; changed in place.
        image_size: pixels a side, which the model's patches divide; the processor's resize keeps its proportion to the
            crop.
        max_tokens: of a caption, its begin and end included. Beyond what the model has positions for, these are
            stretched; below it, captions are cut there and no weight changes.

    Returns:
        The model. An adapter that is trained on it and saved by clipft knows these sizes, and gets them again when it
        is loaded.

    Raises:
        TypeError: another kind of model. ValueError: a size that does not fit it, or a model that was resized before.
    """
    if image_size is None and max_tokens is None:
        return model
    check_resize(model, image_size=image_size, max_tokens=max_tokens)
    own = getattr(model.config.vision_config, "image_size", None), processor.tokenizer.model_max_length
    asked = zip(SIZES, (image_size, max_tokens), own, strict=True)
    sizes = {name: size for name, size, now in asked if size is not None and size != now}
    before = sizes_of(model)
    if twice := sorted(sizes.keys() & before.keys()):
        raise ValueError(
            f"{twice[0]}: the model was resized before, to {before[twice[0]]}: load it again and resize it once, which "
            "keeps more of its positions"
        )
    family = check_model(model)
    if "image_size" in sizes:
        _resize_pictures(family, model, processor.image_processor, sizes["image_size"])
    if "max_tokens" in sizes:
        _stretch_captions(family, model, sizes["max_tokens"])
        _cut_captions(family, processor, sizes["max_tokens"])
    check_pictures(family, model, processor, str(model.name_or_path or "model"))
    set_calibrations(model, {})  # of other weights
    model._clipft_sizes = {"of": model.name_or_path, **before, **sizes}
    return model


def sizes_of(model: Any) -> dict[str, int]:
    """What a model was resized to since it was loaded, by the argument's name; also inside a peft model."""
    plain = base_model(model)
    sizes = dict(getattr(plain, "_clipft_sizes", {}))
    return sizes if sizes.pop("of", None) == plain.name_or_path else {}


def names_of_tables(model: Any, sizes: Mapping[str, int]) -> set[str]:
    """The weights that these sizes may have changed: they come out of interpolation, whose last bit is the machine's
    own.
    """
    family = check_model(base_model(model))
    towers = {"image_size": family.vision, "max_tokens": family.text}
    return {f"{towers[name].positions}.position_embedding.weight" for name in sizes if towers[name].positions}


def check_resize(model: Any, *, image_size: int | None = None, max_tokens: int | None = None) -> None:
    """That a model can be given these sizes, without doing it.

    Raises:
        TypeError, ValueError: as of :func:`resize`.
    """
    if image_size is None and max_tokens is None:
        return
    family = check_model(model)
    check_float(model)
    for name, size, tower in zip(SIZES, (image_size, max_tokens), (family.vision, family.text), strict=True):
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MOST:
            raise ValueError(f"{name}: expected a number from 1 to {_MOST}, got {size!r}")
        if tower.positions is None:
            _check_without_table(family, model, name, size)
    if image_size is not None:
        _check_pictures(model, image_size)
    if max_tokens is not None:
        _check_captions(family, model, max_tokens)


def _check_without_table(family: Family, model: Any, name: str, size: int) -> None:
    """Where there is no table of positions that clipft could resize: captions may be cut at fewer tokens."""
    kind, most = type(model).__name__, family.most_positions(model.config)
    if name == "image_size":
        raise ValueError(f"{name}: not for a {kind} ({family.model_type}), which has no table of that size")
    if size > most:
        raise ValueError(f"{name}: expected at most the {most} tokens that this {kind} has positions for, got {size}")


# ---- pictures ----


def _check_pictures(model: Any, size: int) -> None:
    vision = model.config.vision_config
    patch = vision.patch_size
    if size % patch and size != vision.image_size:
        near = sorted({max(size // patch, 1) * patch, (size // patch + 1) * patch})
        raise ValueError(
            f"image_size: expected a multiple of the model's patches of {patch} pixels, such as "
            f"{' or '.join(map(str, near))}, got {size}"
        )


def _resize_pictures(family: Family, model: Any, images: Any, size: int) -> None:
    vision = model.config.vision_config
    before = vision.image_size
    embeddings = _embeddings(family.vision, model)
    old, new = (side // vision.patch_size for side in (before, size))
    _put_table(embeddings, resized_grid(embeddings.position_embedding.weight.detach(), old, new))
    tower: Any = family.vision.module_of(model)
    for config in (vision, embeddings, tower.config):
        config.image_size = size
    embeddings.num_patches, embeddings.num_positions = new**2, embeddings.position_embedding.num_embeddings
    for name in ("size", "crop_size"):
        if sides := getattr(images, name, None):
            setattr(images, name, type(sides)(**{side: round(n * size / before) for side, n in dict(sides).items()}))


def resized_grid(table: Tensor, old: int, new: int) -> Tensor:
    """[E + old * old, D] -> [E + new * new, D], the E tokens before the grid as they are."""
    extra = len(table) - old**2
    grid = table[extra:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:extra], grid.permute(0, 2, 3, 1).reshape(new**2, -1).to(table.dtype)])


# ---- captions ----


def _check_captions(family: Family, model: Any, length: int) -> None:
    positions = family.most_positions(model.config)
    if length < positions and family.padding == "max_length":
        raise ValueError(
            f"max_tokens: expected at least the model's {positions} tokens, to which it reads every caption padded, "
            f"got {length}"
        )
    if length == family.text_length < positions:
        raise ValueError(
            f"max_tokens: {length} is what every tokenizer of this family says, and says nothing of a model with "
            f"positions for {positions}: take one more or less"
        )
    if length > positions < _KEPT + 2:
        raise ValueError(
            f"max_tokens: expected a model with positions for at least {_KEPT + 2} tokens, of which the first {_KEPT} "
            f"stay and the rest is stretched; this one has {positions}"
        )
    if length < 2:
        raise ValueError(f"max_tokens: expected at least 2, a caption's begin and end, got {length}")


def _stretch_captions(family: Family, model: Any, length: int) -> None:
    positions = family.most_positions(model.config)
    if length <= positions:
        return
    embeddings = _embeddings(family.text, model)
    _put_table(embeddings, stretched(embeddings.position_embedding.weight.detach(), length))
    tower: Any = family.text.module_of(model)
    for config in (model.config.text_config, tower.config):
        config.max_position_embeddings = length


def _cut_captions(family: Family, processor: Any, length: int) -> None:
    """Also in what a tokenizer remembers, and saves, of its last call: processors of transformers go by that."""
    processor.tokenizer.model_max_length = length
    processor.tokenizer.init_kwargs.pop("max_length", None)
    tokenize(processor, ["a"], family=family)


def stretched(table: Tensor, length: int) -> Tensor:
    """[L, D] -> [length, D]: the first 20 rows as they are, the others' places spread evenly, and linear between them;
    beyond the last, where the last two lead.
    """
    places = torch.arange(length - _KEPT, dtype=torch.float64) * (len(table) - _KEPT) / (length - _KEPT) + _KEPT
    lower = places.long().clamp(max=len(table) - 2)
    share = (places - lower)[:, None].to(table.device)
    lower = lower.to(table.device)
    rest = (1 - share) * table[lower].double() + share * table[lower + 1].double()
    return torch.cat([table[:_KEPT], rest.to(table.dtype)])


# ---- tables ----


def _embeddings(tower: Tower, model: Any) -> Any:
    return model.get_submodule(str(tower.positions))


def _put_table(embeddings: Any, weight: Tensor) -> None:
    table = embeddings.position_embedding
    table.weight = nn.Parameter(weight.contiguous(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(weight)
    embeddings.position_ids = torch.arange(len(weight), device=weight.device).expand(1, -1)
