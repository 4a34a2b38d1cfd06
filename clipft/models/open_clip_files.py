"""open_clip's folders, names and checkpoints: which a name means, and what they hold.

What is on the hub is found by transformers' code, tags by open_clip's own.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from clipft.families.clip import CLIP
from clipft.families.open_clip import import_open_clip
from clipft.files import expanded, read_json
from clipft.models.calibrated import Calibration, calibrations_of
from clipft.models.formats import CALIBRATION_KEY, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, WEIGHT_FILES
from clipft.models.pickles import read_pickle
from clipft.models.weights import tensors_of

__all__ = ["OpenCLIPFiles", "find", "is_open_clip_name"]

_PREFIX, _HUB, _LOCAL = "open_clip:", "hf-hub:", "local-dir:"  # the last two are open_clip's own
_CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors")
_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # numbers beside the weights of OpenAI's archives
_ARCHIVES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
_PREPROCESS = {"mean": CLIP.pixel_mean, "std": CLIP.pixel_std, "interpolation": "bicubic", "resize_mode": "shortest"}
_NAMED = 8  # tags in a message
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenCLIPFiles:
    """A model of open_clip's: where it is, and what its configuration says.

    Attributes:
        name: what :func:`clipft.load` takes for it, in any working directory.
        model_cfg, preprocess_cfg: as in ``open_clip_config.json``; the latter with open_clip's defaults.
        weights: their file.
        folder: where its tokenizer's files are, if they are anywhere.
        calibrations: what clipft wrote beside, of a model that it calibrated.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: Path
    folder: Path | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Both files, for messages."""
        return str(self.weights) + (f" (with {OPEN_CLIP_CONFIG})" if self.folder else "")

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights by open_clip's names, as they are stored.

        Raises:
            ValueError: the file is damaged, or holds something else than weights.
        """
        return {name: tensor for name, tensor in _read_weights(self.weights).items() if name not in _OPENAI}


# ---- which a name means ----


def is_open_clip_name(name: str) -> bool:
    """Whether it can be nothing but one of open_clip's."""
    path = expanded(name)
    return name.startswith((_PREFIX, _HUB, _LOCAL)) or (path.suffix in _CHECKPOINTS and path.is_file())


def find(name: str, revision: str = "main") -> OpenCLIPFiles | None:
    """What a name means; None if it is a model of Hugging Face's, or nothing. Where a folder, or a repository of the
    hub, has both, it is Hugging Face's.

    Args:
        name: a folder, a hub name, ``hf-hub:NAME``, ``local-dir:FOLDER``, ``open_clip:ARCHITECTURE/TAG``,
            ``open_clip:ARCHITECTURE/FILE``, or a file with weights of OpenAI's.
        revision: of a model on the hub.

    Raises:
        FileNotFoundError: a file is missing. ImportError: it takes open_clip.
        ValueError: no such architecture or tag, or none is said.
    """
    if name.startswith(_PREFIX):
        return _of_architecture(name)
    path = expanded(name.removeprefix(_LOCAL))
    if not name.startswith((_HUB, _LOCAL)) and path.suffix in _CHECKPOINTS and path.is_file():
        return _of_bare_file(path)
    local = path.is_dir() or name.startswith(_LOCAL)
    get = partial(_in_folder, path) if local else partial(_on_hub, name.removeprefix(_HUB), revision)
    if not name.startswith((_HUB, _LOCAL)) and _is_hugging_face(get):
        return None
    if (config := get(OPEN_CLIP_CONFIG)) is None:
        if name.startswith((_HUB, _LOCAL)):
            raise FileNotFoundError(f"{name}: expected {OPEN_CLIP_CONFIG}, which is missing")
        return None
    weights = next((found for file in OPEN_CLIP_WEIGHTS if (found := get(file))), None)
    if weights is None:
        raise FileNotFoundError(f"{name}: expected the weights in {' or '.join(OPEN_CLIP_WEIGHTS)}; all are missing")
    about = read_json(config)
    model_cfg, preprocess_cfg = about.get("model_cfg"), about.get("preprocess_cfg") or {}
    if not isinstance(model_cfg, dict) or not isinstance(preprocess_cfg, dict):
        raise ValueError(f"{config}: expected an object under model_cfg, and one under preprocess_cfg")
    own = str(path.absolute()) if local else name
    calibrations = calibrations_of(about.get(CALIBRATION_KEY), f"{config}: {CALIBRATION_KEY}")
    return OpenCLIPFiles(own, model_cfg, _with_defaults(preprocess_cfg), weights, config.parent, calibrations)


def _in_folder(folder: Path, file: str) -> Path | None:
    return folder / file if (folder / file).is_file() else None


def _on_hub(repo: str, revision: str, file: str) -> Path | None:
    absent = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(repo, file, revision=revision, **absent)
    return None if found is None else Path(found)


def _is_hugging_face(get: Callable[[str], Path | None]) -> bool:
    """timm's models have a config.json too, without a model_type."""
    config = get("config.json")
    return config is not None and "model_type" in read_json(config) and any(map(get, WEIGHT_FILES))


def _with_defaults(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's."""
    given = {key: value for key, value in preprocess_cfg.items() if key in _PREPROCESS and value is not None}
    return _PREPROCESS | given


# ---- architectures, tags and checkpoints ----


def _of_architecture(name: str) -> OpenCLIPFiles:
    open_clip = import_open_clip(name)
    architecture, _, which = name.removeprefix(_PREFIX).partition("/")
    model_cfg = open_clip.get_model_config(architecture)
    if model_cfg is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=_NAMED)
        hint = f"; there are {', '.join(near)}" if near else "; open_clip.list_models() has those that there are"
        raise ValueError(f"{name}: open_clip has no architecture {architecture!r}{hint}")
    if tag := open_clip.get_pretrained_cfg(architecture, which):
        weights = Path(open_clip.download_pretrained(tag))
        if tag.get("quick_gelu") and not model_cfg.get("quick_gelu"):
            model_cfg["quick_gelu"] = True
            _logger.warning("%s: these weights were trained with quick_gelu, so they are taken with it", name)
        return OpenCLIPFiles(name, model_cfg, _with_defaults(tag), weights)
    path = expanded(which)
    if not which or not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        some = ", ".join(tags[:_NAMED]) or "none"
        raise ValueError(
            f"{name}: expected {_PREFIX}{architecture}/ and a tag of open_clip's or a file; the tags of "
            f"{architecture}: {some}{' ...' if len(tags) > _NAMED else ''}"
        )
    return OpenCLIPFiles(f"{_PREFIX}{architecture}/{path.absolute()}", model_cfg, dict(_PREPROCESS), path)


def _of_bare_file(path: Path) -> OpenCLIPFiles:
    """Only of OpenAI's the architecture is known: all have quick_gelu and heads of 64."""
    state = {} if path.suffix == ".safetensors" else _read_weights(path)
    if not state.keys() >= _OPENAI:
        raise ValueError(
            f"{path}: weights do not say their architecture: name it, as in {_PREFIX}ViT-B-32/{path} (of OpenAI's "
            f"weights: ViT-B-32-quickgelu), or put {OPEN_CLIP_CONFIG} beside them, call them {OPEN_CLIP_WEIGHTS[0]} "
            f"or {OPEN_CLIP_WEIGHTS[-1]}, and give the folder"
        )
    return OpenCLIPFiles(str(path.absolute()), _openai_cfg(state), dict(_PREPROCESS), path)


def _openai_cfg(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """As open_clip reads it off the shapes."""
    first = state["visual.conv1.weight"]
    width = state["ln_final.weight"].shape[0]
    blocks = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    if "visual.proj" in state:
        layers: Any = sum(name.startswith("visual.") and name.endswith(".attn.in_proj_weight") for name in state)
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {"layers": layers, "width": first.shape[0], "patch_size": first.shape[-1]}
        vision["image_size"] = first.shape[-1] * grid
    else:
        stages = [{name.split(".")[2] for name in state if name.startswith(f"visual.layer{n}.")} for n in range(1, 5)]
        grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        vision = {"layers": [len(stage) for stage in stages], "image_size": grid * 32}
        vision["width"] = state["visual.layer1.0.conv1.weight"].shape[0]
    text = {"width": width, "heads": width // 64, "layers": len(blocks)}
    text["context_length"] = state["positional_embedding"].shape[0]
    text["vocab_size"] = state["token_embedding.weight"].shape[0]
    dim = state["text_projection"].shape[1]
    return {"embed_dim": dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


# ---- weights ----


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        tensors_of([path])
        return load_file(path)
    stem = path.stem.removesuffix("px")  # OpenAI's name of the larger pictures
    which = stem if stem in _ARCHIVES else "ARCHITECTURE"
    tags = f"{_PREFIX}{which}-quickgelu/openai{'' if stem in _ARCHIVES else ' for ' + ', '.join(_ARCHIVES)}"
    return read_pickle(path, f"; the same weights are {tags}")
