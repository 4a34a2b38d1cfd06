"""open_clip's preprocessing as Hugging Face's processors, and back.

Tokens are the same but for what ftfy mends in open_clip (broken encodings, HTML entities, curly quotes).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, processors
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from clipft.families.family import Family
from clipft.families.open_clip import import_open_clip
from clipft.models.formats import OPEN_CLIP_CONFIG
from clipft.models.open_clip_files import OpenCLIPFiles

__all__ = ["is_clips_own", "preprocess_cfg_of", "processor_of"]

_VOCABULARY = "1099d1a7a249a922"  # digest of CLIP's
_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # PIL's numbers
_SPACES = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
_CLEAN = {
    "whitespace": _SPACES,
    "lower": [*_SPACES, normalizers.Lowercase()],
    "canonicalize": [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Lowercase(),
        *_SPACES,
    ],
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def processor_of(files: OpenCLIPFiles, family: Family, image_size: int) -> Any:
    """Hugging Face's processor that does to pictures and texts what open_clip does.

    Raises:
        ValueError, OSError: there is none, or its tokenizer is not here.
    """
    images = _image_processor(files, family, image_size)
    return family.processor(image_processor=images, tokenizer=_tokenizer(files))  # type: ignore[call-arg]


# ---- pictures ----


def _image_processor(files: OpenCLIPFiles, family: Family, side: int) -> Any:
    given = files.preprocess_cfg
    mode, words = given["resize_mode"], str(given["interpolation"])
    square = {"height": side, "width": side}
    if mode == "shortest":
        geometry: dict[str, Any] = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    elif mode == "squash":
        geometry = {"size": square, "do_center_crop": False}
    else:
        raise ValueError(
            f"{files.name}: preprocess_cfg: expected resize_mode 'shortest' or 'squash', found {mode!r}: transformers "
            "has no image processor that does it"
        )
    mean, std = ([value] * 3 if isinstance(value, float) else list(value) for value in (given["mean"], given["std"]))
    kind = SiglipImageProcessor if family.model_type == "siglip" else CLIPImageProcessor
    resample = _RESAMPLE["bilinear" if words == "bilinear" else "bicubic"]  # "random" is bicubic but in training
    return kind(**geometry, image_mean=mean, image_std=std, resample=resample)


def preprocess_cfg_of(image_processor: Any, side: int) -> dict[str, Any]:
    """As in ``open_clip_config.json``.

    Raises:
        ValueError: open_clip has no such preprocessing.
    """
    size = image_processor.size
    resample = {number: word for word, number in _RESAMPLE.items()}.get(image_processor.resample)
    crop = image_processor.crop_size if image_processor.do_center_crop else None
    if crop and size.shortest_edge == crop.height == crop.width == side:
        mode = "shortest"
    elif not crop and size.height == size.width == side:
        mode = "squash"
    else:
        mode = None
    plain = image_processor.do_resize and image_processor.do_rescale and image_processor.do_normalize
    if mode is None or resample is None or not plain or abs(image_processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(
            "processor: open_clip has no preprocessing like this: expected pictures to be resized bicubically or "
            f"bilinearly to {side} pixels, and cut to the square or not, found {image_processor}"
        )
    return {
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": resample,
        "resize_mode": mode,
    }


# ---- texts ----


def _tokenizer(files: OpenCLIPFiles) -> Any:
    text = files.model_cfg["text_cfg"]
    length, options = text.get("context_length", 77), dict(text.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace" if text.get("hf_tokenizer_name") else "lower")
    strip = bool(options.pop("strip_sep_token", False))
    if options or text.get("tokenizer_mode") or clean not in _CLEAN:
        raise ValueError(
            f"{files.name}: text_cfg: expected a tokenizer that transformers has, found tokenizer_kwargs "
            f"{text.get('tokenizer_kwargs')}, tokenizer_mode {text.get('tokenizer_mode')!r}"
        )
    if text.get("hf_tokenizer_name"):
        tokenizer = _hugging_faces(files, str(text["hf_tokenizer_name"]), clean, strip)
    else:
        tokenizer = _clips(files, clean)
    tokenizer.model_max_length = length
    return tokenizer


def _in_folder(files: OpenCLIPFiles) -> Path | None:
    folder = files.folder
    return folder if folder and any((folder / name).is_file() for name in _TOKENIZER_FILES) else None


def _hugging_faces(files: OpenCLIPFiles, name: str, clean: str, strip: bool) -> Any:
    """One that cleans texts by itself, and is saved so."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(_in_folder(files) or name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{files.name}: its tokenizer, {name!r} of the hub, is neither beside its weights nor does it load from "
            f"the hub: save it into the folder, with {OPEN_CLIP_CONFIG}, or go online once ({error!s:.200})"
        ) from error
    if isinstance(tokenizer, CLIPTokenizer) and clean != "canonicalize":
        return tokenizer  # which has no other way
    backend = tokenizer.backend_tokenizer
    steps = [*_CLEAN[clean], *([backend.normalizer] if backend.normalizer else [])]
    backend.normalizer = normalizers.Sequence(steps)
    if strip:  # CLIPA's: open_clip writes 0 where the end of a text would stand
        first, last = tokenizer.cls_token, tokenizer.convert_ids_to_tokens(0)
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (first, last)]
        backend.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=tokenizer.padding_side, **special)


def _clips(files: OpenCLIPFiles, clean: str) -> CLIPTokenizer:
    """CLIP's own vocabulary: beside the weights, or open_clip's copy."""
    if clean != "lower":
        raise ValueError(
            f"{files.name}: text_cfg: expected CLIP's tokenizer to clean texts by 'lower', found {clean!r}"
        )
    if folder := _in_folder(files):
        found = CLIPTokenizer.from_pretrained(folder)
        if is_clips_own(found):
            return found
    own = import_open_clip(f"{files.name}: CLIP's vocabulary").tokenizer.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    renamed = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {renamed.get(token, token): number for token, number in own.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks))


def is_clips_own(tokenizer: Any) -> bool:
    """Whether it is the tokenizer that open_clip takes where a configuration names none."""
    vocabulary = tokenizer.get_vocab()
    digest = hashlib.blake2b("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)).encode(), digest_size=8)
    return isinstance(tokenizer, CLIPTokenizer) and digest.hexdigest() == _VOCABULARY
