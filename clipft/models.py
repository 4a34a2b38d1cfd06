"""Loading, freezing and fusing Hugging Face ``CLIPModel``, ``SiglipModel`` and ``Siglip2Model``.

``fuse`` takes over instances by their class: parameters, names and hooks stay, only ``forward`` changes, to those of
``clipft.fused`` and ``clipft.fused_siglip``. ``unfuse`` gives the classes back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.utils.hub import cached_file

from clipft.families.family import Family, Tower
from clipft.families.registry import FAMILIES, MODEL_NAMES, MOST_TOKENS, base_model, check_model, family_of
from clipft.fused import FusedCLIPModel, FusedQuickGELU, fuse_last_layer
from clipft.fused_siglip import FusedSiglip2Model, FusedSiglipModel
from clipft.heads import CONFIG as HEADS
from clipft.heads import with_heads
from clipft.lora import is_adapter_folder, load_merged

__all__ = ["freeze", "fuse", "load", "unfuse"]

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "clipft_int8.safetensors")
QUANT_METHOD = "clipft_int8"
_FUSED: dict[type, type] = {
    cls._clipft_stands_in_for: cls for cls in (FusedCLIPModel, FusedSiglipModel, FusedSiglip2Model)
}
Model = TypeVar("Model", bound=nn.Module)


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
        was saved with (``clipft.heads``), and its processor, whose image
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
    family = _family(config.get("model_type"), source)
    processor = _load_processor(family, source, revision)
    model = _quantized(family, source, kwargs) or _float(family, source, bool(config.get(HEADS)), kwargs)
    tokenizer = cast(Any, processor).tokenizer
    if tokenizer.model_max_length > MOST_TOKENS:
        tokenizer.model_max_length = cast(Any, model.config).text_config.max_position_embeddings
    return model.eval(), processor


def _family(model_type: Any, where: str) -> Family:
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = " or ".join(f"{family.model_type!r} (a {family.model.__name__})" for family in FAMILIES)
    raise ValueError(f"{where}: expected model_type {known}, found {model_type!r}")


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


def _float(family: Family, source: str, has_heads: bool, kwargs: dict[str, Any]) -> Any:
    """The model, with its classification heads where the configuration names some."""
    kind: Any = with_heads(family.model) if has_heads else family.model
    model, found = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **kwargs)
    missing = sorted(name for name in found["missing_keys"] if name.startswith("heads."))
    if missing:
        raise ValueError(f"{source}: expected weights of the heads in config.json, these are missing: {missing}")
    model.__class__ = family.model
    return model


def _quantized(family: Family, source: str, kwargs: dict[str, Any]) -> Any:
    """The int8 model, where the configuration says that it is one."""
    if family.model is not CLIPModel:
        return None
    revision = kwargs.get("revision", "main")
    config = CLIPConfig.from_pretrained(source, revision=revision)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") != QUANT_METHOD:
        return None
    from clipft.quantized_clip import WEIGHTS, load_quantized

    other = sorted(kwargs.keys() - {"revision"})
    if other:
        raise TypeError(f"{other[0]}: not for {source!r}, an int8 model, which comes as it was saved")
    return load_quantized(Path(str(cached_file(source, WEIGHTS, revision=revision))), config)


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
    _family(kind, str(config))
    if not any((folder / name).is_file() for name in _WEIGHTS):
        hint = (
            "; pytorch_model.bin is a pickle, which clipft does not open: save it again with save_pretrained(...)"
            if (folder / "pytorch_model.bin").exists()
            else ""
        )
        raise FileNotFoundError(f"{folder}: expected the weights in {_WEIGHTS[0]}, which is missing{hint}")


# ---- freezing ----

_STRATEGIES = '"none", "text", "vision", "towers", "vision:N", "text:N" (N: last layers that stay trainable)'


def freeze(model: Model, strategy: str) -> Model:
    """Choose which parameters train. A strategy is absolute: it does not add to an earlier one, and ``"none"`` undoes
    any.

    Args:
        model: a ``CLIPModel``, ``SiglipModel`` or ``Siglip2Model``, fused or not; changed in place.
        strategy: ``"none"`` trains everything. ``"text"`` and ``"vision"`` freeze that tower and its projection.
            ``"towers"`` freezes both towers and leaves both projections, the logit scale and bias trainable.
            ``"vision:N"`` and ``"text:N"`` freeze a tower's embeddings and all but its last N layers; its last norm and
            projection train. The projection of a SigLIP tower is its ``head``.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown strategy, or N outside 1 ... the tower's number of layers.
    """
    check_model(model)
    check_float(model)
    frozen = _frozen_by(model, strategy)
    model.requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    return model


def _frozen_by(model: nn.Module, strategy: str) -> list[nn.Module]:
    family, towers = family_of(model), cast(tuple[Tower, ...], ("vision", "text"))
    if strategy == "none":
        return []
    if strategy == "towers":
        return [part for tower in towers for part in family.body(model, tower)]
    for tower in towers:
        if strategy == tower:
            return [*family.body(model, tower), family.projection(model, tower)]
        count = str(strategy).removeprefix(f"{tower}:")
        if count != strategy and count.isdecimal():
            layers = cast(nn.ModuleList, model.get_submodule(f"{tower}_model.encoder.layers"))
            return [*family.stem(model, tower), *_all_but_last(layers, int(count), strategy)]
    raise ValueError(f"strategy: expected one of {_STRATEGIES}, got {strategy!r}")


def _all_but_last(layers: Iterable[nn.Module], count: int, strategy: str) -> list[nn.Module]:
    layers = list(layers)
    if not 1 <= count <= len(layers):
        raise ValueError(f"strategy: expected N from 1 to {len(layers)}, the tower's layers, got {strategy!r}")
    return layers[: len(layers) - count]


# ---- fusing ----


def fuse(model: Any) -> Any:
    """Let an existing ``CLIPModel``, ``SiglipModel``, ``Siglip2Model`` or peft model compute with clipft's ops.

    - A ``CLIPModel``, also the one inside a peft model, gets its loss from ``clipft.contrastive_loss``: with
      ``return_loss=True`` the output holds ``loss``, ``image_embeds`` and ``text_embeds``, and logits and the image
      tower's ``last_hidden_state`` only with ``return_logits=True``. Its ``quick_gelu`` activations become one op each.
    - A ``SiglipModel`` or ``Siglip2Model`` likewise from ``clipft.sigmoid_loss``.
    - The ``lora.Linear`` layers of a peft model, of a ``CLIPModel`` or any other, run ``clipft.lora_linear``. All that
      peft does still works: several adapters, switching, disabling, merging, saving. What the op does not cover (DoRA
      and other variants, mixed batches, several active adapters, quantised layers, GPUs) runs peft's own forward; one
      warning in the log per reason names the layers for which that is so now. Layers that a later ``add_adapter``
      makes are peft's until ``fuse`` is called again.

    Instances keep their parameters, the names of these, hooks and places; ``copy.deepcopy``, ``save_pretrained`` and
    pickling work, and what is saved loads without clipft. Fusing twice is harmless.

    Returns:
        The same object.

    Raises:
        TypeError: none of these, nor a peft model with LoRA; or a subclass of one, whose own ``forward`` would be
            lost.
    """
    clip, with_lora = base_model(model), _has_lora(model)
    check_float(clip)
    if type(clip) in _FUSED:
        clip.__class__ = _FUSED[type(clip)]
    elif type(clip) not in _FUSED.values() and (isinstance(clip, tuple(_FUSED)) or not with_lora):
        raise TypeError(f"model: expected {MODEL_NAMES} or a peft model of one, got {type(clip).__qualname__}")
    for module in model.modules():
        if isinstance(module, CLIPMLP) and type(module.activation_fn) is QuickGELUActivation:
            module.activation_fn.__class__ = FusedQuickGELU
    if isinstance(clip, FusedCLIPModel):
        fuse_last_layer(clip)
    if with_lora:
        from clipft.lora_layers import fuse_lora

        fuse_lora(model)
    return model


def unfuse(model: Any) -> Any:
    """Undo :func:`fuse`: the same object, its modules of their own classes again. What is not fused stays as it is."""
    for module in model.modules():
        plain = getattr(type(module), "_clipft_stands_in_for", None)
        if plain is not None:
            module.__class__ = plain
            _drop_wrapped_forward(module)
    return model


def check_float(model: Any) -> None:
    """That this is not a model of :func:`clipft.quantize`, which is for inference."""
    if hasattr(model, "quantization_report"):
        raise ValueError("model: expected a float model, got one with int8 layers, which do not train")


def _has_lora(model: Any) -> bool:
    if sys.modules.get("peft") is None or not isinstance(model, nn.Module):
        return False  # without peft nothing can have put LoRA in
    from clipft.lora_layers import has_lora

    return has_lora(model)


def _drop_wrapped_forward(module: nn.Module) -> None:
    """Mixed precision in accelerate leaves a wrapper of the class's forward, here the fused one, on the instance."""
    original = vars(module).get("_original_forward")
    if getattr(original, "__func__", None) in {cls.forward for cls in _FUSED.values()}:  # type: ignore[attr-defined]
        del module._original_forward
        module.__dict__.pop("forward", None)
