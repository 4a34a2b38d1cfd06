"""An int8 model of any family, and its files.

Its modules are those of ``int8_layers``, in the places of Hugging Face's. A folder holds ``clipft_int8.safetensors``
and never ``model.safetensors``, from which transformers would make a model with random linears; with the name that it
has, transformers refuses the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention, CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.utils.generic import can_return_tuple

from clipft.errors import line_of
from clipft.families.family import Family, Tower
from clipft.families.projected import needs_all_tokens
from clipft.families.registry import family_of, family_of_type
from clipft.files import check_set, read_json, settle, write_json
from clipft.models import int8_layers as forms
from clipft.models.configurations import check_sizes
from clipft.models.formats import (
    FLOAT_WEIGHTS,
    INT8_REPORT,
    INT8_WEIGHTS,
    MODEL_MANIFEST,
    PROCESSOR_FILES,
    QUANT_METHOD,
    model_set,
)
from clipft.models.heads import restore_heads
from clipft.models.int8_layers import BLOCKS, Block, QuantizedPatchEmbedding, quantized_class
from clipft.models.weights import check_whole
from clipft.ops.nn import QuantizedLinear

__all__ = [
    "QKV",
    "QuantizedModel",
    "QuantizedPatchEmbedding",
    "check_own_folder",
    "fused_activation",
    "install",
    "load_quantized",
    "sources_of",
    "tower_of",
]

QKV = "qkv_proj"  # queries, keys and values in one
_FUSED_ACTIVATIONS = {  # from Hugging Face's names to the op's
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


# ---- models ----


class QuantizedModel(nn.Module):
    """A model with int8 linear layers, for inference: in use, one of Hugging Face's class of its family. Made by
    :func:`clipft.quantize` and :func:`clipft.load`.

    Attributes:
        quantization_report: see :func:`clipft.quantize`.
    """

    quantization_report: dict[str, Any]

    if TYPE_CHECKING:
        config: Any
        dtype: torch.dtype

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``config.json``, the weights and the report; :func:`clipft.load` reads them back. A processor's files
        stay.

        Raises:
            ValueError: the folder holds a float model, which would pass for this one.
        """
        folder = Path(save_directory)
        check_own_folder(folder)
        with model_set(folder, keep=PROCESSOR_FILES) as staging:
            self.write_files(staging)

    def write_files(self, folder: Path) -> None:
        """The files of :meth:`save_pretrained`, into an empty folder."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / INT8_WEIGHTS, metadata={"format": "pt"})
        write_json(folder / INT8_REPORT, self.quantization_report)
        self.config.save_pretrained(folder)
        _mark(folder / "config.json", family_of(self), str(self.dtype).removeprefix("torch."))


class QuantizedFirstTokenModel(QuantizedModel):
    """Of a family whose pictures are pooled at the first token."""

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        class_token_only: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As the plain class's, for ``pooler_output`` [N, D]. With ``class_token_only`` the last layer computes that
        token alone, and ``last_hidden_state`` is None, unless hidden states or attentions are asked for or hooks wait
        for all tokens.
        """
        only = class_token_only and not needs_all_tokens(self, kwargs)
        options = {"class_token_only": True} if only else {}
        features: BaseModelOutputWithPooling = super().get_image_features(  # type: ignore[misc]
            pixel_values, interpolate_pos_encoding, **options, **kwargs
        )
        features.last_hidden_state = None if only else features.last_hidden_state
        return features


def _model_class(family: Family) -> Any:
    plain: Any = family.model
    return quantized_class(QuantizedFirstTokenModel if family.vision.pools_first else QuantizedModel, plain)


def __getattr__(name: str) -> Any:
    """CLIP's, by the names that 0.1's pickles have for them."""
    plain: dict[str, type] = {
        "QuantizedAttention": CLIPAttention,
        "QuantizedEncoderLayer": CLIPEncoderLayer,
        "QuantizedLastLayer": CLIPEncoderLayer,
        "QuantizedMLP": CLIPMLP,
        "QuantizedVisionEmbeddings": CLIPVisionEmbeddings,
    }
    if name in plain:
        return quantized_class(getattr(forms, name), plain[name])
    if name == "QuantizedCLIPModel":
        return quantized_class(QuantizedFirstTokenModel, CLIPModel)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- files ----


def check_own_folder(folder: Path) -> None:
    """That no float model lies where an int8 one is to be written."""
    settle(folder)
    present = [name for name in FLOAT_WEIGHTS if (folder / name).exists()]
    if present:
        raise ValueError(f"{folder}: expected a folder of its own for an int8 model, found {present[0]} in it")


def _mark(path: Path, family: Family, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = {"architectures": [family.model.__name__], "dtype": dtype}
    config |= kind | {"quantization_config": {"quant_method": QUANT_METHOD}}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- putting layers into a model ----


def tower_of(model: Any, name: str) -> Tower | None:
    """The tower that the part of this name is in; None: a projection behind it."""
    return next((own for own in family_of(model).towers.values() if name.startswith(f"{own.module}.")), None)


def sources_of(model: Any, name: str) -> list[str]:
    """The names of the float layers that an int8 layer of this name stands for."""
    path, _, own = name.rpartition(".")
    tower = tower_of(model, name)
    return [f"{path}.{part}" for part in BLOCKS[tower.block].qkv] if tower and own == QKV else [name]


def install(model: Any, layers: Mapping[str, QuantizedLinear]) -> QuantizedModel:
    """Put int8 layers where a plain model has its linears; a ``qkv_proj`` takes the place of three."""
    family = family_of(model)
    for name, layer in layers.items():
        path, _, own = name.rpartition(".")
        parent: Any = model.get_submodule(path)
        setattr(parent, own, layer)
        tower = tower_of(model, name)
        if isinstance(layer, QuantizedPatchEmbedding):
            _take_over(parent, forms.QuantizedVisionEmbeddings)
        elif tower and own == QKV:
            _take_over(parent, BLOCKS[tower.block].attention)
            for source in BLOCKS[tower.block].qkv:
                delattr(parent, source)
        elif tower and layer.activation is not None:
            _take_over(parent, BLOCKS[tower.block].mlp)
    for tower in family.towers.values():
        _take_over_layers(tower.layers_of(model), BLOCKS[tower.block], tower.pools_first)
    model.__class__ = _model_class(family)
    return cast(QuantizedModel, model.requires_grad_(False).eval())


def _take_over_layers(layers: list[nn.Module], block: Block, pools_first: bool) -> None:
    for layer in layers:
        parts: dict[str, Any] = dict(layer.named_modules())
        whole = all(isinstance(parts.get(name), QuantizedLinear) for name in block.parts)
        if whole and parts[block.activated].activation is not None:
            only = block.first_only if pools_first and layer is layers[-1] else None
            _take_over(layer, only or block.layer)


def _take_over(module: nn.Module, form: type) -> None:
    plain: Any = type(module)
    module.__class__ = quantized_class(form, plain)


def fused_activation(model: Any, name: str) -> str | None:
    """The activation that the layer of this name takes along: its tower's, where it begins an MLP."""
    tower = tower_of(model, name)
    if tower is None or not name.endswith(f".{BLOCKS[tower.block].activated}"):
        return None
    hidden_act = cast(Any, tower.module_of(model)).config.hidden_act
    return _FUSED_ACTIVATIONS.get(hidden_act) if isinstance(hidden_act, str) else None


# ---- loading ----


def load_quantized(weights: Path, config: Any) -> QuantizedModel:
    """The model whose weights lie in this file.

    Args:
        config: transformers' object, of one of the families.

    Raises:
        ValueError: the file is damaged, does not fit the configuration, or was not written with the files beside it.
    """
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{weights}: expected weights as safetensors; the file is damaged ({line_of(error)})"
        ) from error
    _check_stored(weights, config, tensors)
    family = family_of_type(config.model_type, str(weights))
    with init_empty_weights():
        plain: Any = family.model(config)
        restore_heads(plain)
        family.split_layers(plain)
    names = [name.removesuffix(".weight_int8") for name in tensors if name.endswith(".weight_int8")]
    try:
        model = install(plain, {name: _empty_layer(plain, name, tensors) for name in names})
        left = model.load_state_dict(tensors, strict=False, assign=True)
    except (AttributeError, RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{weights}: expected the weights of the model in config.json ({line_of(error)})") from error
    check_whole(weights, left.missing_keys, left.unexpected_keys)
    check_set(weights.parent, MODEL_MANIFEST)
    report = weights.with_name(INT8_REPORT)
    model.quantization_report = read_json(report) if report.is_file() else {}
    return model.requires_grad_(False).eval()


def _check_stored(weights: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """That codes are int8, scales float32 and all else numbers of the one float type of the model."""
    check_sizes(config, weights.with_name("config.json"), len(tensors))
    kinds = {tensors[name].dtype for name in ("logit_scale",) if name in tensors}
    for name, tensor in tensors.items():
        codes, scale = name.endswith(".weight_int8"), name.endswith(".weight_scale")
        wanted = {torch.int8} if codes else {torch.float32} if scale else kinds | {torch.float32}
        if tensor.dtype not in wanted:
            expected, found = (str(dtype).removeprefix("torch.") for dtype in (min(wanted, key=str), tensor.dtype))
            raise ValueError(f"{weights}: expected {name} in {expected}, found {found}: quantize the model again")
        if not codes and not torch.isfinite(tensor).all():
            raise ValueError(f"{weights}: expected numbers in {name}, found NaN or Inf: quantize the model again")


def _empty_layer(model: Any, name: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    bias = f"{name}.bias" in tensors
    if name.endswith(".patch_embedding"):
        config: Any = model.config.vision_config
        return QuantizedPatchEmbedding(config.num_channels, config.patch_size, config.hidden_size, bias, device="meta")
    first, *others = sources_of(model, name)
    plain: Any = model.get_submodule(first)
    out = plain.out_features * (1 + len(others))
    return QuantizedLinear(plain.in_features, out, bias, fused_activation(model, name), device="meta")
