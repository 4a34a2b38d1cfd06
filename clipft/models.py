"""Loading, freezing and fusing Hugging Face ``CLIPModel``.

``fuse`` takes over instances by their class: parameters, names and hooks stay, only ``forward`` changes, to those of
``clipft.fused``. ``unfuse`` gives the classes back.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.utils.hub import cached_file

from clipft.fused import FusedCLIPModel, FusedQuickGELU, fuse_last_layer
from clipft.lora import is_adapter_folder, load_merged

__all__ = ["freeze", "fuse", "load", "unfuse"]

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "clipft_int8.safetensors")
QUANT_METHOD = "clipft_int8"


# ---- loading ----


def load(name_or_path: str | Path, **kwargs: Any) -> tuple[CLIPModel, CLIPProcessor]:
    """Load a CLIP model and its processor.

    Args:
        name_or_path: a folder as ``save_pretrained`` writes it, of a float model or one of :func:`clipft.quantize`, a
            folder with a LoRA adapter as peft writes it, a name on the Hugging Face hub, or ``"demo"``: the small model
            inside the package.
        kwargs: passed to ``CLIPModel.from_pretrained`` (``dtype``, ``revision``, ...). Weights are read from
            safetensors only.

    Returns:
        The model in evaluation mode, and a processor whose image processor is torchvision's: Hugging Face has two,
        their outputs differ by up to 0.015, and everything in clipft uses this one. An adapter comes as its base model
        with the adapter merged in; to train it on, load it into the base with ``peft.PeftModel.from_pretrained``.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: the folder holds another kind of model.
        ImportError: an adapter without peft installed.
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
    processor = CLIPProcessor.from_pretrained(source, revision=kwargs.get("revision", "main"), backend="torchvision")
    backend = getattr(processor.image_processor, "backend", None)
    if backend != "torchvision":
        raise ImportError(
            f"name_or_path: {source!r}: expected an image processor with the torchvision backend, got {backend!r}: "
            "install torchvision"
        )
    quantized = _quantized(source, kwargs)
    model = quantized or CLIPModel.from_pretrained(source, use_safetensors=True, **kwargs)
    return cast(CLIPModel, model.eval()), processor


def _quantized(source: str, kwargs: dict[str, Any]) -> CLIPModel | None:
    """The int8 model, where the configuration says that it is one."""
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
    if kind != "clip":
        raise ValueError(f"{config}: expected model_type 'clip' (a CLIPModel), found {kind!r}")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        hint = (
            "; pytorch_model.bin is a pickle, which clipft does not open: save it again with save_pretrained(...)"
            if (folder / "pytorch_model.bin").exists()
            else ""
        )
        raise FileNotFoundError(f"{folder}: expected the weights in {_WEIGHTS[0]}, which is missing{hint}")


# ---- freezing ----

_STRATEGIES = '"none", "text", "vision", "towers", "vision:N", "text:N" (N: last layers that stay trainable)'


def freeze(model: CLIPModel, strategy: str) -> CLIPModel:
    """Choose which parameters train. A strategy is absolute: it does not add to an earlier one, and ``"none"`` undoes
    any.

    Args:
        model: a ``CLIPModel``, fused or not; changed in place.
        strategy: ``"none"`` trains everything. ``"text"`` and ``"vision"`` freeze that tower and its projection.
            ``"towers"`` freezes both towers and leaves both projections and the logit scale. ``"vision:N"`` and
            ``"text:N"`` freeze a tower's embeddings and all but its last N layers; its last norm and projection train.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown strategy, or N outside 1 ... the tower's number of layers.
    """
    if not isinstance(model, CLIPModel):
        raise TypeError(f"model: expected a CLIPModel, got {type(model).__name__}")
    check_float(model)
    frozen = _frozen_by(model, strategy)
    model.requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    return model


def _frozen_by(model: CLIPModel, strategy: str) -> list[nn.Module]:
    vision, text = model.vision_model, model.text_model
    whole: dict[str, list[nn.Module]] = {
        "none": [],
        "text": [text, model.text_projection],
        "vision": [vision, model.visual_projection],
        "towers": [text, vision],
    }
    if strategy in whole:
        return whole[strategy]
    tower, _, count = str(strategy).partition(":")
    if tower == "vision" and count.isdecimal():
        stem = [vision.embeddings, vision.pre_layrnorm]
        return [*stem, *_all_but_last(vision.encoder.layers, int(count), strategy)]
    if tower == "text" and count.isdecimal():
        return [text.embeddings, *_all_but_last(text.encoder.layers, int(count), strategy)]
    raise ValueError(f"strategy: expected one of {_STRATEGIES}, got {strategy!r}")


def _all_but_last(layers: Iterable[nn.Module], count: int, strategy: str) -> list[nn.Module]:
    layers = list(layers)
    if not 1 <= count <= len(layers):
        raise ValueError(f"strategy: expected N from 1 to {len(layers)}, the tower's layers, got {strategy!r}")
    return layers[: len(layers) - count]


# ---- fusing ----


def fuse(model: Any) -> Any:
    """Let an existing ``CLIPModel`` or peft model compute with clipft's ops.

    - A ``CLIPModel``, also the one inside a peft model, gets its loss from ``clipft.contrastive_loss``: with
      ``return_loss=True`` the output holds ``loss``, ``image_embeds`` and ``text_embeds``, and logits and the image
      tower's ``last_hidden_state`` only with ``return_logits=True``. Its ``quick_gelu`` activations become one op each.
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
        TypeError: neither a ``CLIPModel`` nor a peft model with LoRA, or a subclass of ``CLIPModel``, whose own
            ``forward`` would be lost.
    """
    clip, with_lora = _clip_inside(model), _has_lora(model)
    check_float(clip)
    if type(clip) is CLIPModel:
        clip.__class__ = FusedCLIPModel
    elif type(clip) is not FusedCLIPModel and (isinstance(clip, CLIPModel) or not with_lora):
        raise TypeError(f"model: expected a CLIPModel or a peft model of one, got {type(clip).__qualname__}")
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


def _clip_inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_lora(model: Any) -> bool:
    if sys.modules.get("peft") is None or not isinstance(model, nn.Module):
        return False  # without peft nothing can have put LoRA in
    from clipft.lora_layers import has_lora

    return has_lora(model)


def _drop_wrapped_forward(module: nn.Module) -> None:
    """Mixed precision in accelerate leaves a wrapper of the class's forward, here the fused one, on the instance."""
    original = vars(module).get("_original_forward")
    if getattr(original, "__func__", None) is FusedCLIPModel.forward:
        del module._original_forward
        module.__dict__.pop("forward", None)
