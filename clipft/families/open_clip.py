"""Models that open_clip has and transformers has not: towers of timm's (ConvNeXt, EVA, MobileCLIP ...), ResNets, text
towers of Hugging Face's, layer scale and what else a configuration of open_clip's may ask for.

The towers are open_clip's own modules, made by its own code; around them stands one model of transformers' kind.
Tensors have open_clip's names, so that open_clip loads what is saved. It is optional, and imported where it is used.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, CLIPProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import cached_file

from clipft.families.family import Family, Tower
from clipft.families.forward import normalised
from clipft.families.losses import LOSSES
from clipft.families.open_clip_towers import tower_of
from clipft.families.siglip import SiglipTowersForward
from clipft.files import write_json

__all__ = [
    "OPEN_CLIP",
    "OPEN_CLIP_CONFIG",
    "TEXT_TOWERS",
    "OpenCLIPConfig",
    "OpenCLIPModel",
    "import_open_clip",
    "with_scalars_of",
    "with_text_apart",
]

OPEN_CLIP_CONFIG, WEIGHTS = "open_clip_config.json", "model.safetensors"  # open_clip knows both names
TEXT_TOWERS = ("bert", "m2m_100", "mt5", "roberta", "xlm-roberta")  # whose layers open_clip knows
_LENGTH = 77  # of a text, where a configuration does not say


def import_open_clip(what: str) -> Any:
    """The optional dependency.

    Raises:
        ImportError: it is not installed; ``what`` is what needs it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{what}: needs open_clip: pip install 'clipft[open_clip]' ({error})") from error
    return open_clip


# ---- tensors by open_clip's names ----


def with_text_apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As open_clip's models have them whose text tower is a module of its own (``custom_text``)."""
    apart = ("visual.", "logit_")
    return {name if name.startswith(apart) else f"text.{name}": tensor for name, tensor in state.items()}


def with_scalars_of(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The logits' scale and bias in the shape that a model has: open_clip's may be [] or [1]."""
    one = {name for name in ("logit_scale", "logit_bias") if name in wanted and name in state}
    return {**state, **{name: state[name].reshape(wanted[name].shape) for name in one if state[name].numel() == 1}}


# ---- the configuration ----


class OpenCLIPConfig(PreTrainedConfig):
    """As ``open_clip_config.json`` has it.

    Attributes:
        model_cfg, preprocess_cfg: open_clip's.
        text_tower: the configuration of Hugging Face's text tower, of which ``model_cfg`` has the name only.
    """

    model_type = "open_clip"
    model_cfg: dict[str, Any] | None = None
    preprocess_cfg: dict[str, Any] | None = None
    text_tower: dict[str, Any] | None = None

    @property
    def vision_config(self) -> PreTrainedConfig:
        """What others ask of an image tower: the side of its pictures."""
        cfg = (self.model_cfg or {}).get("vision_cfg", {})
        layers, size = cfg.get("layers", 1), cfg.get("image_size", 224)
        depth = sum(layers) if isinstance(layers, list | tuple) else layers
        own: Any = {"image_size": size if isinstance(size, int) else min(size), "num_hidden_layers": depth}
        return PreTrainedConfig(**own)

    @property
    def text_config(self) -> PreTrainedConfig:
        """What others ask of a text tower: its tokens and positions."""
        cfg = (self.model_cfg or {}).get("text_cfg", {})
        if self.text_tower is not None:
            return AutoConfig.for_model(**_known(self.text_tower))
        own: Any = {"vocab_size": cfg.get("vocab_size", 49408), "num_hidden_layers": cfg.get("layers", 12)}
        return PreTrainedConfig(**own | {"max_position_embeddings": cfg.get("context_length", _LENGTH)})


AutoConfig.register(OpenCLIPConfig.model_type, OpenCLIPConfig, exist_ok=True)  # a tokenizer's class looks at it


def _known(text_tower: dict[str, Any]) -> dict[str, Any]:
    """A text tower's configuration: of transformers' own code."""
    found = text_tower.get("model_type")
    if found not in TEXT_TOWERS:
        raise ValueError(f"text tower: expected model_type {' or '.join(TEXT_TOWERS)}, found {found!r}")
    return {key: value for key, value in text_tower.items() if key != "auto_map"}


def _positions(config: Any) -> int:
    return int(config.model_cfg["text_cfg"].get("context_length", _LENGTH))


def _picture(config: Any) -> tuple[int, int, int]:
    size = config.model_cfg["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return 3, int(height), int(width)


# ---- the model ----


class OpenCLIPModel(PreTrainedModel):
    """open_clip's towers, ``visual`` and ``text``, with the methods that a ``CLIPModel`` has.

    What a ``BatchNorm`` whose parameters are frozen knows of the pictures' statistics stays as it is in training, too.
    """

    config_class = OpenCLIPConfig
    base_model_prefix = "open_clip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: OpenCLIPConfig) -> None:
        super().__init__(config)
        clip = _made(config)
        self.visual, self.text, self.logit_scale = clip.visual, clip.text, clip.logit_scale
        if clip.logit_bias is not None:
            self.logit_bias = clip.logit_bias
        if isinstance(getattr(self.text, "attn_mask", None), Tensor):
            self.text.transformer.register_forward_pre_hook(_mask_of_length, with_kwargs=True)
        self.towers = {"vision": tower_of(self.visual, "visual"), "text": tower_of(self.text, "text")}
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path | None,
        *,
        config: OpenCLIPConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        revision: str = "main",
        dtype: Any = None,
        output_loading_info: bool = False,
        use_safetensors: Literal[True] = True,
        ignore_mismatched_sizes: bool = False,
        trust_remote_code: Literal[False] = False,
    ) -> Any:
        """As of other models of transformers: a folder that ``save_pretrained`` wrote, or a name on the hub.

        Args:
            name, revision: the folder or name; None with ``config`` and ``state_dict``, which take its place.
            config, state_dict: see :meth:`from_state`.
            dtype: of the weights; default: as they are stored.
            output_loading_info: give what is missing too, which is nothing.
            use_safetensors, ignore_mismatched_sizes, trust_remote_code: whatever is said, safetensors alone, whole.
        """
        if config is None:
            config = OpenCLIPConfig.from_pretrained(str(name), revision=revision)
        if state_dict is None:
            state_dict = load_file(str(cached_file(str(name), WEIGHTS, revision=revision)))
        model = cls.from_state(config, state_dict, dtype)
        info: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, info) if output_loading_info else model

    @classmethod
    def from_state(cls, config: OpenCLIPConfig, state: Mapping[str, Tensor], dtype: Any = None) -> Any:
        """A model in evaluation mode that holds these tensors, which have open_clip's names. It is made without numbers
        first, and nothing is allocated for weights that do not fill it.

        Raises:
            ImportError: open_clip is not installed.
            ValueError: no such architecture, or other weights than it has.
        """
        with torch.device("meta"):
            wanted = cls(config).state_dict()
        own = _as_named(dict(state), wanted)
        for words, names in (
            ("lack", [name for name in wanted if name not in own]),
            ("have more than they need", [name for name in own if name not in wanted]),
            (
                "have other shapes for",
                [name for name in wanted if name in own and own[name].shape != wanted[name].shape],
            ),
        ):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                raise ValueError(
                    f"the weights are not those of the architecture: they {words}: {', '.join(names[:4])}{more}"
                )
        with init_empty_weights(include_buffers=False):  # masks and the like are in no file
            model = cls(config)
        model.load_state_dict(own, assign=True)
        floats = {tensor.dtype for tensor in own.values() if tensor.is_floating_point()}
        if dtype in (None, "auto"):
            dtype = floats.pop() if len(floats) == 1 else torch.float32
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """As of other models of transformers; beside it ``open_clip_config.json``, with which open_clip loads the
        folder (``local-dir:FOLDER``)."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            model_cfg = {**self.config.model_cfg, "custom_text": True}
            about = {"model_cfg": model_cfg, "preprocess_cfg": self.config.preprocess_cfg}
            write_json(Path(save_directory) / OPEN_CLIP_CONFIG, about)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """[N, 3, H, W] -> ``pooler_output`` [N, D], not L2-normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values.to(self.dtype)))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """[N, L] -> ``pooler_output`` [N, D], not L2-normalised. open_clip's towers know padding by themselves."""
        if not self.config.model_cfg["text_cfg"].get("hf_tokenizer_name") and self.config.text_tower is None:
            ends = input_ids.argmax(-1, keepdim=True)  # whatever a tokenizer pads with, these towers saw zeros
            input_ids = input_ids.masked_fill(torch.arange(input_ids.shape[1], device=ends.device) > ends, 0)
        return BaseModelOutputWithPooling(pooler_output=self.text(input_ids))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> SiglipOutput:
        """As ``CLIPModel.forward`` or, where the model has a ``logit_bias``, ``SiglipModel.forward``."""
        images = normalised(self.get_image_features(pixel_values).pooler_output)
        texts = normalised(self.get_text_features(input_ids).pooler_output)
        scale, bias = self.logit_scale.exp().reshape(()), getattr(self, "logit_bias", None)
        shared = (scale,) if bias is None else (scale, bias.reshape(()))
        logits = scale * images @ texts.t() + (0.0 if bias is None else bias)
        loss = LOSSES[OPEN_CLIP.of(self).loss](images, texts, *shared) if return_loss else None
        return SiglipOutput(loss, logits, logits.t(), texts, images)

    def train(self, mode: bool = True) -> OpenCLIPModel:
        """As of any module."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """By open_clip's own means."""
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(True)

    def get_input_embeddings(self) -> nn.Module:
        """Of the text tower."""
        return next(module for module in self.text.modules() if isinstance(module, nn.Embedding))

    def _init_weights(self, module: nn.Module) -> None:
        """As open_clip has made them."""


# ---- made of open_clip's parts ----


def _made(config: OpenCLIPConfig) -> Any:
    """open_clip's module, with weights that mean nothing; nothing is fetched for it."""
    open_clip = import_open_clip("this model, which is open_clip's own")
    cfg = copy.deepcopy(config.model_cfg or {})
    cfg.pop("custom_text", None)  # both kinds compute the same; this one has the text tower in a module of its own
    if "multimodal_cfg" in cfg:
        raise ValueError("model_cfg: expected two towers, found CoCa's multimodal_cfg, a decoder that clipft has not")
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    vision["timm_model_pretrained"] = text["hf_model_pretrained"] = False
    if name := vision.get("timm_model_name"):
        _check_timm(name)
    if bool(text.get("hf_model_name")) != (config.text_tower is not None):
        raise ValueError("config.json: expected text_tower, the configuration of text_cfg.hf_model_name")
    with _tower_folder(config.text_tower) as folder:
        clip = open_clip.CustomTextCLIP(**cfg | {"text_cfg": text | ({"hf_model_name": folder} if folder else {})})
    _mark_unreachable(clip)
    return clip


def _check_timm(name: str) -> None:
    """That timm has this architecture itself: it would fetch others."""
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"vision_cfg: expected timm_model_name to be one that timm has, found {name!r}: pip install -U timm"
        )


@contextmanager
def _tower_folder(text_tower: dict[str, Any] | None) -> Iterator[str | None]:
    """Where open_clip finds the configuration of a text tower that is Hugging Face's, and nothing else."""
    if text_tower is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="clipft-tower-") as folder:
        write_json(Path(folder) / "config.json", _known(text_tower))
        yield folder


def _mark_unreachable(clip: nn.Module) -> None:
    """A ResNet's attention takes the weights of its linear layers and does not call them: no adapter reaches them."""
    for module in clip.modules():
        if type(module).__name__ == "AttentionPool2d" and hasattr(module, "c_proj"):
            for linear in module.children():
                linear.__class__ = NonDynamicallyQuantizableLinear


def _as_named(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names and shapes that this model has for what others of open_clip's saved."""
    if "positional_embedding" in state:  # its plain CLIP, whose text tower is not apart
        state = with_text_apart(state)
    if "logit_bias" in wanted and "logit_scale" in state:  # open_clip gives a bias to weights that have none
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    state.pop("text.transformer.embeddings.position_ids", None)  # of older versions of transformers
    return with_scalars_of(wanted, state)


def _mask_of_length(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a text's layers run: the causal mask for as many tokens as there are."""
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.dim() == 2:
        length = args[0].shape[1]
        kwargs["attn_mask"] = mask[:length, :length]
    return args, kwargs


class OpenCLIPForward(SiglipTowersForward):
    """``forward`` of a fused ``OpenCLIPModel``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As ``OpenCLIPModel.forward``, but with ``return_loss=True`` logits come only with ``return_logits=True``.
        More arguments: see :class:`clipft.families.clip.CLIPForward`.
        """
        texts = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._contrast({"pixel_values": pixel_values}, texts, return_loss=return_loss, **kwargs)


# ---- what clipft needs to know of one ----


def _of_model(model: Any) -> dict[str, Any]:
    """What differs from architecture to architecture."""
    has_bias = hasattr(model, "logit_bias")
    return {
        "loss": "sigmoid" if has_bias else "contrastive",
        "max_log_scale": None if has_bias else math.log(100.0),
        "padding": "max_length" if _reads_padding(model.config) else "longest",
        "text_length": _positions(model.config),
        "vision": model.towers["vision"],
        "text": model.towers["text"],
        "scale_shape": (1,) if model.config.model_cfg.get("nonscalar_logit_scale") else (),
    }


def _reads_padding(config: OpenCLIPConfig) -> bool:
    """Whether a text's embedding is another without the padding to the full length, which open_clip always has."""
    cfg = (config.model_cfg or {})["text_cfg"]
    own = config.text_tower is None
    return own and bool(cfg.get("no_causal_mask") or cfg.get("embed_cls") or cfg.get("pool_type") == "last")


_UNKNOWN = Tower(module="", layers="", projection="", stem=())  # until there is a model: see _of_model

OPEN_CLIP = Family(
    title="open_clip's others",
    model_type="open_clip",
    model=OpenCLIPModel,
    processor=CLIPProcessor,
    forward=OpenCLIPForward,
    loss="contrastive",
    max_log_scale=math.log(100.0),
    padding="longest",
    text_length=_LENGTH,
    vision=_UNKNOWN,
    text=_UNKNOWN,
    dim=lambda config: int(config.model_cfg["embed_dim"]),
    most_positions=_positions,
    picture=_picture,
    of_model=_of_model,
)
