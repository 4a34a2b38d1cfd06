"""``load``: a model and its processor from any folder or name: float, int8, or a LoRA adapter with its base.

The only module that knows every kind of folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from transformers import CLIPConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from clipft.families.family import Family
from clipft.families.registry import MOST_TOKENS, family_of_type
from clipft.models.formats import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DEMO_MODEL,
    HEADS_KEY,
    INT8_WEIGHTS,
    QUANT_METHOD,
    WEIGHT_FILES,
    is_adapter_folder,
)
from clipft.models.heads import with_heads
from clipft.models.int8 import load_quantized
from clipft.models.lora import import_peft

__all__ = ["load", "load_merged"]

# ---- loading ----


def load(name_or_path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name_or_path: a folder as ``save_pretrained`` writes it, of a float model or one of :func:`clipft.quantize`, a
            folder with a LoRA adapter as peft writes it, a name on the Hugging Face hub, or ``"demo"``: the small model
            inside the package.
        kwargs: passed to the model's ``from_pretrained`` (``dtype``, ``revision``, ...). Weights are read from
            safetensors only.

    Returns:
        A ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model`` in evaluation mode, with the classification heads that it
        was saved with (``clipft.models.heads``), and its processor, whose image
        processor is torchvision's: Hugging Face has two, their outputs differ by up to 0.015, and everything in clipft
        uses this one. An adapter comes as its base model with the adapter merged in; to train it on, load it into the
        base with ``peft.PeftModel.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: another kind of model.
        ImportError: an adapter without peft installed, or a SigLIP's tokenizer without sentencepiece.
    """
    folder = DEMO_MODEL if str(name_or_path) == "demo" else Path(name_or_path).expanduser()
    if is_adapter_folder(folder):
        return load_merged(folder, **kwargs)
    source = str(folder)
    if folder.is_dir():
        _check_folder(folder)
    elif _looks_like_path(str(name_or_path)):
        raise FileNotFoundError(
            f"name_or_path: expected a folder or a model name, but there is no folder {str(name_or_path)!r}"
        )
    else:
        source = str(name_or_path)
    revision = kwargs.get("revision", "main")
    config = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    family = family_of_type(config.get("model_type"), source)
    processor = _load_processor(family, source, revision)
    model = _load_int8(family, source, kwargs) or _load_float(family, source, bool(config.get(HEADS_KEY)), kwargs)
    tokenizer = cast(Any, processor).tokenizer
    if tokenizer.model_max_length > MOST_TOKENS:
        tokenizer.model_max_length = family.most_positions(model.config)
    return model.eval(), processor


def _load_processor(family: Family, source: str, revision: str) -> Any:
    try:
        processor = family.processor.from_pretrained(source, revision=revision, backend="torchvision")
    except ImportError as error:
        if "sentencepiece" not in str(error).lower() and "protobuf" not in str(error).lower():
            raise
        raise ImportError(f"{source}: its tokenizer needs sentencepiece: pip install 'clipft[siglip]'") from error
    backend = getattr(processor.image_processor, "backend", None)
    if backend != "torchvision":
        raise ImportError(
            f"name_or_path: {source!r}: expected an image processor with the torchvision backend, got {backend!r}: "
            "install torchvision"
        )
    return processor


def _load_float(family: Family, source: str, has_heads: bool, kwargs: dict[str, Any]) -> Any:
    """The model, with its classification heads where the configuration names some."""
    kind: Any = with_heads(family.model) if has_heads else family.model
    model, found = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **kwargs)
    missing = sorted(name for name in found["missing_keys"] if name.startswith("heads."))
    if missing:
        raise ValueError(f"{source}: expected weights of the heads in config.json, these are missing: {missing}")
    model.__class__ = family.model
    return model


def _load_int8(family: Family, source: str, kwargs: dict[str, Any]) -> Any:
    """The int8 model, where the configuration says that it is one."""
    if not family.int8:
        return None
    revision = kwargs.get("revision", "main")
    config = CLIPConfig.from_pretrained(source, revision=revision)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") != QUANT_METHOD:
        return None

    other = sorted(kwargs.keys() - {"revision"})
    if other:
        raise TypeError(f"{other[0]}: not for {source!r}, an int8 model, which comes as it was saved")
    return load_quantized(Path(str(cached_file(source, INT8_WEIGHTS, revision=revision))), config)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.glob("*"))[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: expected a model folder as save_pretrained writes it, with config.json; found {found}"
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{config}: expected a JSON object with the model's configuration ({error})") from error
    family_of_type(kind, str(config))
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        hint = (
            "; pytorch_model.bin is a pickle, which clipft does not open: save it again with save_pretrained(...)"
            if (folder / "pytorch_model.bin").exists()
            else ""
        )
        raise FileNotFoundError(f"{folder}: expected the weights in {WEIGHT_FILES[0]}, which is missing{hint}")


def load_merged(folder: Path, **kwargs: Any) -> tuple[Any, Any]:
    """The base model that an adapter folder names, with the adapter merged into its weights, and the base's processor.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        kwargs: as of :func:`clipft.load`, for the base model.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: no weights as safetensors, or no base model.
        ValueError: not LoRA, no base model named, or weights that do not fit it.
    """
    peft = import_peft()
    base, revision = _base_of(folder)

    try:
        model, processor = load(base, **({"revision": revision} if revision else {}) | kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{folder / ADAPTER_CONFIG}: the base model {base!r} does not load: {error}") from error
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split("\n")[:2])  # of a line per tensor
        raise ValueError(f"{folder}: the adapter does not fit its base model {base!r}: {first}") from error
    _check_keys(folder, base, set(peft.get_peft_model_state_dict(adapted)))
    merged = adapted.merge_and_unload().requires_grad_(True).eval()
    merged.name_or_path = str(folder)  # not the base's: these are other weights
    return merged, processor


def _base_of(folder: Path) -> tuple[str, str | None]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, base, revision = (config.get(key) for key in ("peft_type", "base_model_name_or_path", "revision"))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object with the adapter's configuration ({error})") from error
    if kind != "LORA":
        raise ValueError(f"{path}: expected peft_type 'LORA', found {kind!r}")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: expected base_model_name_or_path to name the base model, found {base!r}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        hint = "; adapter_model.bin is a pickle, which clipft does not open" * (folder / "adapter_model.bin").exists()
        raise FileNotFoundError(
            f"{folder}: expected the adapter's weights in {ADAPTER_WEIGHTS}, which is missing{hint}"
        )
    return base, revision


def _check_keys(folder: Path, base: str, expected: set[str]) -> None:
    """peft only warns where an adapter's weights are not those that its configuration asks for."""
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        found = set(file.keys())
    if found != expected:
        odd = ", ".join(sorted(found ^ expected)[:4])
        raise ValueError(f"{folder}: the adapter does not fit its base model {base!r}: missing or left over: {odd} ...")
