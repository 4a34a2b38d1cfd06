"""Processors as they are loaded: Hugging Face's own, tried once on a small picture and a word.

What a folder says of its pictures and captions is held against its model here, so that nothing of it fails later, or
goes wrong without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.image_utils import SizeDict

from clipft.data.collate import tokenize
from clipft.data.transforms import build_transform, stack_pictures
from clipft.errors import line_of
from clipft.families.family import Family
from clipft.families.naflex import is_naflex
from clipft.families.registry import MOST_TOKENS
from clipft.files import read_json
from clipft.models.formats import PROCESSOR_FILES

__all__ = ["check_pictures", "fit", "load_processor"]

_MOST = 8192  # of pixels a side, or of patches: beyond it no model's pictures
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.*", "merges.txt", "*.model")
_PICTURES = ("processor_config.json", "preprocessor_config.json")
_SIDES = ("size", "crop_size", "pad_size")
_SIZES = (*_SIDES, "patch_size", "max_num_patches")
_TIMES = 8  # a model's pictures, that a side may be before it is cropped
_logger = logging.getLogger(__name__)


def load_processor(family: Family, source: str, revision: str, folder: Path) -> Any:
    """With the torchvision image processor.

    Args:
        source, revision: a folder or a name on the hub.
        folder: where its files are on this machine.

    Raises:
        ImportError: torchvision, or what its tokenizer needs, is not installed.
        ValueError: there is no tokenizer in the folder, or sizes of pictures are none.
    """
    try:
        processor: Any = family.processor.from_pretrained(
            source, revision=revision, backend="torchvision", trust_remote_code=False
        )
    except ImportError as error:
        if "sentencepiece" not in str(error).lower() and "protobuf" not in str(error).lower():
            raise
        raise ImportError(f"{source}: its tokenizer needs sentencepiece: pip install 'clipft[siglip]'") from error
    except Exception as error:
        raise ValueError(f"{_files_at_fault(folder)}: {type(error).__name__}: {line_of(error)}") from error
    backend = getattr(processor.image_processor, "backend", None)
    if backend != "torchvision":
        raise ImportError(
            f"name_or_path: {source!r}: expected an image processor with the torchvision backend, got {backend!r}: "
            "install torchvision"
        )
    _check_vocabulary(processor.tokenizer, folder)
    for name in _SIZES:
        value = getattr(processor.image_processor, name, None)
        for side in vars(value).values() if isinstance(value, SizeDict) else [value]:
            if side is not None and not (isinstance(side, int) and 1 <= side <= _MOST):
                where = _files(folder, _PICTURES)
                raise ValueError(f"{where}: the image processor's {name}: expected 1 to {_MOST}, found {side!r:.80}")
    return processor


def _files_at_fault(folder: Path) -> str:
    """Of a processor that does not load: found by loading its parts.

    Raises:
        ValueError: a file is no JSON object at all.
    """
    for name in PROCESSOR_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    for kind, names in ((AutoTokenizer, _TOKENIZER), (AutoImageProcessor, _PICTURES)):
        try:
            kind.from_pretrained(str(folder), trust_remote_code=False)
        except Exception:  # of whatever class
            return _files(folder, names)
    return _files(folder, _PICTURES[:1])


def _files(folder: Path, names: Sequence[str]) -> str:
    """Those that are there: the first with its folder, the others as what belongs to it."""
    first, *rest = [path.name for name in names for path in sorted(folder.glob(name))] or [""]
    return str(folder / first) + (f" (with {', '.join(rest)})" if rest else "")


def _check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """transformers makes a tokenizer of its special tokens alone where it finds no files."""
    names = getattr(type(tokenizer), "vocab_files_names", {})
    own = [name for kind, name in names.items() if kind != "tokenizer_file"]
    whole = own and all((folder / name).is_file() for name in own)
    if not (whole or (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))):
        wanted = " or ".join(dict.fromkeys(["tokenizer.json", *([" and ".join(own)] if own else [])]))
        raise FileNotFoundError(
            f"{folder}: expected the model's tokenizer, {wanted}, which is missing: save it beside the model with "
            "processor.save_pretrained(...)"
        )


def fit(family: Family, model: Any, processor: Any, folder: Path) -> None:
    """Make the processor the model's: where captions end and are cut; and try both of its halves.

    Raises:
        ValueError: they do not fit.
    """
    tokenizer, words, pictures = processor.tokenizer, _files(folder, _TOKENIZER), _files(folder, _PICTURES)
    vocabulary = getattr(model.config.text_config, "vocab_size", None)  # a family may call it otherwise
    largest = max(tokenizer.get_vocab().values())
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"{words}: has tokens up to {largest}, config.json's vocab_size is {vocabulary}: use the model's own "
            "tokenizer, or model.text_model.resize_token_embeddings"
        )
    try:
        for line in filter(None, (family.fit_tokenizer(model, tokenizer), _cut(family, model, tokenizer))):
            _logger.warning("%s: %s", folder, line)
        if not tokenize(processor, ["a"], family=family)["input_ids"].numel():
            raise ValueError("expected tokens of a word, found none")
    except Exception as error:  # of whatever class a step raises that gets nonsense
        raise ValueError(
            f"{words}: the tokenizer fails on a word, or does not fit config.json: {line_of(error)}"
        ) from error
    check_pictures(family, model, processor, str(pictures))


def check_pictures(family: Family, model: Any, processor: Any, where: str) -> None:
    """Try a small picture.

    Raises:
        ValueError: the image processor fails, or gives what the model does not take; ``where`` is what the message
            begins with.
    """
    _check_sides(processor.image_processor, family, model, where)
    try:
        transform = build_transform(processor.image_processor)
        values = stack_pictures(processor.image_processor, [transform(Image.new("RGB", (3, 2)))])["pixel_values"]
    except Exception as error:
        raise ValueError(f"{where}: the image processor fails on a picture: {line_of(error)}") from error
    shape, finite = tuple(values.shape[1:]), bool(torch.isfinite(values).all())
    if is_naflex(processor.image_processor):
        vision = model.config.vision_config
        wanted: tuple[int, ...] = (shape[0], vision.num_channels * vision.patch_size**2)
    else:
        wanted = family.picture(model.config)
    if shape != wanted or not finite:
        raise ValueError(
            f"{where}: the image processor makes {list(shape)} of a picture{'' if finite else ' (not of numbers)'}, "
            f"the model in config.json takes {list(wanted)}"
        )


def _check_sides(images: Any, family: Family, model: Any, where: str) -> None:
    """Before a picture is made: that it will not be far larger than those that the model takes."""
    if is_naflex(images):
        if images.patch_size != model.config.vision_config.patch_size:
            raise ValueError(f"{where}: patches of {images.patch_size} pixels a side, config.json has others")
        return
    most = _TIMES * max(family.picture(model.config)[1:])
    for name in _SIDES:
        value = getattr(images, name, None)
        for side in vars(value).values() if isinstance(value, SizeDict) else ():
            if side is not None and side > most:
                raise ValueError(
                    f"{where}: {name} of {side} pixels, of a model in config.json that takes {most // _TIMES}"
                )


def _cut(family: Family, model: Any, tokenizer: Any) -> str | None:
    """The most tokens of a caption: the model's positions, or fewer where the tokenizer says so. What every tokenizer
    of the family says, 77 for CLIP, says nothing of a model with more."""
    positions, stated = family.most_positions(model.config), tokenizer.model_max_length
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:
        raise ValueError(f"expected the tokenizer's model_max_length to be a number of tokens, found {stated!r:.80}")
    unsaid = stated > MOST_TOKENS or stated == family.text_length
    tokenizer.model_max_length = positions if unsaid else min(positions, int(stated))
    if stated > MOST_TOKENS or stated == positions:
        return None
    return (
        f"captions are cut at {tokenizer.model_max_length} tokens; the model has positions for {positions}, its "
        f"tokenizer says {stated}"
    )
