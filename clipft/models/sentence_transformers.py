"""Folders of sentence-transformers: what makes it load one of clipft's, and where in one of its own the CLIP is.

Its ``modules.json`` lists what a batch goes through; the first of these is the model, in the folder itself (since 5.4)
or in a sub-folder such as ``0_CLIPModel``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_MAPPING

from clipft.data.collate import most_tokens
from clipft.families.naflex import is_naflex
from clipft.families.registry import family_of
from clipft.files import read_json, write_json
from clipft.models.formats import SENTENCE_CONFIG, SENTENCE_MODULES

__all__ = ["folder_of_clip", "place_of_clip", "write_modules"]

_MODELS, _AFTER = ("CLIPModel", "Transformer"), ("Normalize",)  # modules that leave a CLIP's embeddings as they are
_PROMPTS = "config_sentence_transformers.json"
_logger = logging.getLogger(__name__)


def write_modules(model: Any, processor: Any, staging: Path) -> None:
    """Beside a float model: two files that name its own, so that ``SentenceTransformer(folder)`` gives the same
    embeddings, at length 1. Nothing where transformers' ``AutoModel``, which it loads with, does not know the model.
    """
    if type(getattr(model, "config", None)) not in MODEL_MAPPING:
        return
    kinds = {"": "Transformer", "1_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    config: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            name: {"method": f"get_{name}_features", "method_output_name": "pooler_output"}
            for name in ("text", "image")
        },
        "module_output_name": "sentence_embedding",
    }
    if asked := _processing(model, processor):
        config["processing_kwargs"] = asked
    write_json(staging / SENTENCE_MODULES, modules)
    write_json(staging / SENTENCE_CONFIG, config)


def _processing(model: Any, processor: Any) -> dict[str, dict[str, Any]]:
    """What the processor is to be told at each call, where its own defaults are other than clipft's."""
    family, asked = family_of(model), dict[str, dict[str, Any]]()
    if family.padding == "max_length":
        length = most_tokens(processor, family.most_positions(model.config), family=family)
        asked["text"] = {"padding": "max_length", "max_length": length}
    if is_naflex(images := processor.image_processor):
        asked["image"] = {"patch_size": images.patch_size, "max_num_patches": images.max_num_patches}
    return asked


def folder_of_clip(folder: Path) -> Path:
    """The folder with the model's own files: this one, or a sub-folder that sentence-transformers put them into.

    Raises:
        ValueError: its modules are other than a CLIP. FileNotFoundError: there is no such sub-folder.
    """
    path = folder / SENTENCE_MODULES
    if not path.exists():
        return folder
    place, _ = _modules(path)
    if place and (folder / "config.json").exists():
        return folder  # which holds a model that transformers loads
    if (folder / _PROMPTS).is_file():
        about = read_json(folder / _PROMPTS)
        prompts, default = about.get("prompts"), about.get("default_prompt_name")
        if isinstance(prompts, dict) and isinstance(default, str) and (prompt := prompts.get(default)):
            _logger.warning("%s: texts are taken as they are, without the prompt %r", folder / _PROMPTS, prompt)
    own = folder / place_of_clip(path)
    if not own.is_dir():
        raise FileNotFoundError(f"{path}: its first module is in {own.name!r:.80}, and there is no such folder")
    return own


def place_of_clip(path: Path) -> str:
    """By a ``modules.json``: where the CLIP is, seen from there; empty for the same folder.

    Raises:
        ValueError: no CLIP, or more modules, which would change its embeddings.
    """
    place, modules = _modules(path)
    if modules[0] not in _MODELS or any(kind not in _AFTER for kind in modules[1:]):
        raise ValueError(
            f"{path}: expected the modules of a CLIP, {' or '.join(_MODELS)} and maybe {_AFTER[0]}, found "
            f"{', '.join(modules)}, whose embeddings are not a CLIP's"
        )
    return place


def _modules(path: Path) -> tuple[str, list[str]]:
    """Where the first module is, and the kinds of all."""
    entries = read_json(path, list)
    if not entries or not all(isinstance(entry, dict) and isinstance(entry.get("type"), str) for entry in entries):
        raise ValueError(f"{path}: expected a list of modules, each with its type and path")
    place = entries[0].get("path", "")
    if not isinstance(place, str) or not re.fullmatch(r"[\w-]{0,200}", place):
        raise ValueError(f"{path}: expected the first module's path to be a sub-folder, found {place!r:.80}")
    return place, [entry["type"].rpartition(".")[2] for entry in entries]
