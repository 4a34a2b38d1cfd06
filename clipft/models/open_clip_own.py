"""open_clip's models that no class of transformers is the same as: their configuration and tensors as they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils.hub import cached_file

from clipft.families.open_clip import OpenCLIPConfig
from clipft.files import expanded, read_json
from clipft.models.configurations import check_sizes, check_trust
from clipft.models.convert import Converted
from clipft.models.open_clip_files import OpenCLIPFiles

__all__ = ["as_it_is"]

_DECODER = "text_decoder."
_logger = logging.getLogger(__name__)


def as_it_is(files: OpenCLIPFiles) -> Converted:
    """For :class:`clipft.families.open_clip.OpenCLIPModel`.

    Raises:
        OSError: the configuration of its text tower is neither here nor on the hub.
        ValueError: sizes that lie.
    """
    if not all(isinstance(files.model_cfg.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        raise ValueError(f"{files.name}: model_cfg: vision_cfg and text_cfg are not both there")
    model_cfg, state = _two_towers(files)
    config = OpenCLIPConfig(model_cfg=model_cfg, preprocess_cfg=files.preprocess_cfg, text_tower=_text_tower(files))
    check_sizes(config, files.where, len(state))
    return Converted(config, state)


def _two_towers(files: OpenCLIPFiles) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a CoCa (arXiv:2205.01917) those that give its embeddings; its decoder, which writes captions, is left out."""
    if "multimodal_cfg" not in files.model_cfg:
        return files.model_cfg, files.state
    alone = {"output_tokens": False}  # what is beside the embeddings is the decoder's
    model_cfg = {key: value for key, value in files.model_cfg.items() if key not in ("multimodal_cfg", "pad_id")}
    model_cfg |= {part: files.model_cfg[part] | alone for part in ("vision_cfg", "text_cfg")}
    kept = {name: tensor for name, tensor in files.state.items() if not name.startswith(_DECODER)}
    left = sum(tensor.numel() for name, tensor in files.state.items() if name not in kept)
    words = "%s: a CoCa, of which the two towers are taken; its decoder is left out (%s numbers)"
    _logger.warning(words, files.name, f"{left:,}")
    return model_cfg, kept


def _text_tower(files: OpenCLIPFiles) -> dict[str, Any] | None:
    """The configuration of a tower that is Hugging Face's, of which open_clip's has the name: a folder or a name on the
    hub, from which nothing else is read."""
    name = files.model_cfg["text_cfg"].get("hf_model_name")
    if not name:
        return None
    _logger.warning("%s: its text tower is one of %r, whose config.json is read now", files.name, name)
    folder = expanded(str(name))
    try:
        path = folder / "config.json" if folder.is_dir() else cached_file(str(name), "config.json")
        config = read_json(path)  # type: ignore[arg-type]
    except OSError as error:
        raise OSError(
            f"{files.name}: its text tower is one of {name!r}, whose config.json is not on this machine, and cannot be "
            f"had from the hub: go online once ({error!s:.200})"
        ) from error
    check_trust(config, Path(str(path)))
    return config
