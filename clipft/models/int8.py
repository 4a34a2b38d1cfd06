"""The modules of an int8 ``CLIPModel``, and its files.

Instances keep their place in Hugging Face's model and are taken over by class, as in ``clipft.fuse``: attention has q,
k and v in one product (``qkv_proj``), the MLP's first layer its activation, and the patch convolution is a linear layer
over patches. A folder holds ``clipft_int8.safetensors`` and never ``model.safetensors``, from which transformers would
make a model with random linears; with the name that it has, transformers refuses the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from clipft.families.clip import needs_all_tokens
from clipft.families.forward import is_watched
from clipft.files import check_set, read_json, settle, write_json
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
from clipft.models.weights import check_whole
from clipft.ops.attention import attention
from clipft.ops.nn import QuantizedLinear

__all__ = ["QuantizedCLIPModel", "QuantizedPatchEmbedding", "check_own_folder", "install", "load_quantized"]

_FUSED_ACTIVATIONS = ("quick_gelu", "gelu")  # of Hugging Face's names, those that the op has


# ---- modules ----


class QuantizedAttention(CLIPAttention):
    """Queries, keys and values as one product of one quantised input."""

    qkv_proj: QuantizedLinear

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
        first_only: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``CLIPAttention.forward``: [B, L, D] -> [B, L, D] and the attention weights, if its function gives any.
        ``norm`` and ``residual``: as those of ``QuantizedLinear.forward``. ``first_only``: for the first token
        alone, [B, 1, D]."""
        length = hidden_states.shape[1]
        states, queries = self.qkv_proj(hidden_states, norm), 1 if first_only else length
        output, weights = self._attend(states, queries, attention_mask, **kwargs)
        return (self.out_proj(output) if residual is None else self.out_proj(output, None, residual)), weights

    def _attend(
        self, states: Tensor, queries: int, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, 3 * D] queries, keys and values -> [B, queries, D], and the weights if the model's function gives any.

        ``clipft.attention`` where it takes over from torch's (the "sdpa" that transformers chooses): not with a mask,
        which a batch of texts of several lengths has, and not for an exporter, which could not translate it.
        """
        sdpa = self.config._attn_implementation == "sdpa"
        if sdpa and attention_mask is None and states.device.type == "cpu" and not torch.compiler.is_exporting():
            causal = bool(kwargs.get("is_causal"))
            return attention(states, self.num_heads, scale=self.scale, causal=causal, queries=queries), None
        batch, length = states.shape[:2]
        heads = states.view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mask = attention_mask
        output, weights = attend(
            self, query[:, :, :queries], key, value, mask, scaling=self.scale, dropout=0.0, **kwargs
        )
        return output.reshape(batch, queries, -1), weights


class QuantizedMLP(CLIPMLP):
    """The activation belongs to ``fc1``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As ``CLIPMLP.forward``."""
        return cast(Tensor, self.fc2(self.fc1(hidden_states)))


class QuantizedEncoderLayer(CLIPEncoderLayer):
    """All in int8: norms and residuals are done with the products, and the MLP's two layers row block by row block."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As ``CLIPEncoderLayer.forward``: [B, L, D] -> [B, L, D]."""
        if is_watched(self.layer_norm1, self.layer_norm2, self.mlp, self.mlp.fc1, self.mlp.fc2, self.self_attn):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[arg-type]
        return self._block(hidden_states, hidden_states, attention_mask, **kwargs)

    def _block(self, states: Tensor, residual: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        states, _ = self.self_attn(states, attention_mask, norm=self.layer_norm1, residual=residual, **kwargs)
        return cast(Tensor, self.mlp.fc1(states, self.layer_norm2, states, self.mlp.fc2))


class QuantizedLastLayer(QuantizedEncoderLayer):
    """The image tower's last layer, which computes the class token alone where no more is wanted."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As ``CLIPEncoderLayer.forward``: [B, L, D] -> [B, L, D], or [B, 1, D]."""
        if not class_token_only or attention_mask is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self._block(hidden_states, hidden_states[:, :1], None, first_only=True, **kwargs)


class QuantizedPatchEmbedding(QuantizedLinear):
    """The patch convolution, whose patches do not overlap, as a linear layer over them."""

    def __init__(self, channels: int, patch: int, out_features: int, bias: bool, **kwargs: Any) -> None:
        super().__init__(channels * patch * patch, out_features, bias, **kwargs)
        self.channels, self.patch = channels, patch

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, H, W] -> [B, patches, out]."""
        return super().forward(self.patches(pixel_values))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, patches, C * patch * patch], rows and columns of pixels beyond whole patches left out."""
        batch, side = pixel_values.shape[0], self.patch
        rows, cols = pixel_values.shape[2] // side, pixel_values.shape[3] // side
        whole = pixel_values[:, :, : rows * side, : cols * side].reshape(batch, self.channels, rows, side, cols, side)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, self.in_features)


class QuantizedVisionEmbeddings(CLIPVisionEmbeddings):
    """Patches by ``QuantizedPatchEmbedding``."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """As ``CLIPVisionEmbeddings.forward``: [B, C, H, W] -> [B, 1 + patches, D]."""
        height, width = pixel_values.shape[2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values: expected pictures of the model's size, {self.image_size} x {self.image_size}, got "
                f"{height} x {width}; interpolate_pos_encoding=True takes others"
            )
        patches = self.patch_embedding(pixel_values.to(self.class_embedding.dtype))
        classes = self.class_embedding.expand(patches.shape[0], 1, -1)  # not len(), which export would freeze
        embeddings = torch.cat([classes, patches], dim=1)
        if interpolate_pos_encoding:
            return embeddings + self.interpolate_pos_encoding(embeddings, height, width)
        return embeddings + self.position_embedding.weight


class QuantizedCLIPModel(CLIPModel):
    """A ``CLIPModel`` with int8 linear layers, for inference. Made by :func:`clipft.quantize` and :func:`clipft.load`.

    Attributes:
        quantization_report: see :func:`clipft.quantize`.
    """

    quantization_report: dict[str, Any]

    @can_return_tuple
    def get_image_features(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        class_token_only: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As ``CLIPModel.get_image_features``, for ``pooler_output`` [N, D]. With ``class_token_only`` the last layer
        computes that token alone, and ``last_hidden_state`` is None, unless hidden states or attentions are asked for
        or hooks wait for all tokens.
        """
        only = class_token_only and not needs_all_tokens(self, kwargs)
        options = {"class_token_only": True} if only else {}
        features = super().get_image_features(pixel_values, interpolate_pos_encoding, **options, **kwargs)
        features.last_hidden_state = None if only else features.last_hidden_state
        return features

    def save_pretrained(self, save_directory: str | Path) -> None:  # type: ignore[override]
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
        _mark(folder / "config.json", str(self.dtype).removeprefix("torch."))


def check_own_folder(folder: Path) -> None:
    """That no float model lies where an int8 one is to be written."""
    settle(folder)
    present = [name for name in FLOAT_WEIGHTS if (folder / name).exists()]
    if present:
        raise ValueError(f"{folder}: expected a folder of its own for an int8 model, found {present[0]} in it")


def _mark(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": ["CLIPModel"], "dtype": dtype, "quantization_config": {"quant_method": QUANT_METHOD}}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- putting layers into a model ----


def install(model: CLIPModel, layers: Mapping[str, QuantizedLinear]) -> QuantizedCLIPModel:
    """Put int8 layers where a plain model has its linears; ``....self_attn.qkv_proj`` takes the place of three."""
    for name, layer in layers.items():
        path, _, own = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, own, layer)
        if isinstance(layer, QuantizedPatchEmbedding):
            parent.__class__ = QuantizedVisionEmbeddings
        elif own == "qkv_proj":
            parent.__class__ = QuantizedAttention
            del parent.q_proj, parent.k_proj, parent.v_proj
        elif layer.activation is not None:
            parent.__class__ = QuantizedMLP
    for module in model.modules():
        if type(module) is CLIPEncoderLayer and _whole(module):
            module.__class__ = QuantizedEncoderLayer
    last = model.vision_model.encoder.layers[-1]
    if type(last) is QuantizedEncoderLayer:
        last.__class__ = QuantizedLastLayer
    model.__class__ = QuantizedCLIPModel
    return cast(QuantizedCLIPModel, model.requires_grad_(False).eval())


def _whole(layer: CLIPEncoderLayer) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    parts = (attention.out_proj, mlp.fc1, mlp.fc2)
    return (
        isinstance(attention, QuantizedAttention)
        and isinstance(mlp, QuantizedMLP)
        and all(isinstance(part, QuantizedLinear) for part in parts)
    )


def fused_activation(model: CLIPModel, name: str) -> str | None:
    """The activation that the layer of this name takes along: that of its MLP, for ``fc1``."""
    path, _, own = name.rpartition(".")
    hidden_act = cast(Any, model.get_submodule(path)).config.hidden_act if own == "fc1" else None
    return cast(str, hidden_act) if hidden_act in _FUSED_ACTIVATIONS else None


# ---- loading ----


def load_quantized(weights: Path, config: CLIPConfig) -> QuantizedCLIPModel:
    """The model whose weights lie in this file.

    Raises:
        ValueError: the file is damaged, does not fit the configuration, or was not written with the files beside it.
    """
    try:
        tensors = load_file(weights)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{weights}: expected weights as safetensors; the file is damaged ({error})") from error
    _check_stored(weights, config, tensors)
    with init_empty_weights():
        plain = CLIPModel(config)
        restore_heads(plain)
    names = [name.removesuffix(".weight_int8") for name in tensors if name.endswith(".weight_int8")]
    try:
        model = install(plain, {name: _empty_layer(plain, name, tensors) for name in names})
        left = model.load_state_dict(tensors, strict=False, assign=True)
    except (AttributeError, RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"{weights}: expected the weights of the model in config.json ({reason})") from error
    check_whole(weights, left.missing_keys, left.unexpected_keys)
    check_set(weights.parent, MODEL_MANIFEST)
    report = weights.with_name(INT8_REPORT)
    model.quantization_report = read_json(report) if report.is_file() else {}
    return cast(QuantizedCLIPModel, model.requires_grad_(False).eval())


def _check_stored(weights: Path, config: CLIPConfig, tensors: Mapping[str, Tensor]) -> None:
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


def _empty_layer(model: CLIPModel, name: str, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    bias = f"{name}.bias" in tensors
    if name.endswith(".patch_embedding"):
        config: Any = model.config.vision_config
        return QuantizedPatchEmbedding(config.num_channels, config.patch_size, config.hidden_size, bias, device="meta")
    together = name.endswith(".qkv_proj")
    plain: Any = model.get_submodule(name.replace(".qkv_proj", ".q_proj"))
    out = plain.out_features * (3 if together else 1)
    return QuantizedLinear(plain.in_features, out, bias, fused_activation(model, name), device="meta")
