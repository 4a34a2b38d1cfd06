"""What a model family is: all in which CLIP, SigLIP, MetaCLIP 2, Chinese-CLIP and so on differ.

A CLIP has a projection after each tower and a softmax over the batch; a SigLIP has a head inside each tower, a sigmoid
over pairs with a bias of its own, and reads captions padded to their full length. What the rest of the package needs to
know of that is a field here; a family is a file beside this one, and a row of ``registry``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["TOWERS", "EmbeddingTower", "Family", "Tower", "TowerName"]

TowerName = Literal["vision", "text"]
TOWERS: tuple[TowerName, ...] = ("vision", "text")


def _pooler_output(output: Any) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled


@dataclass(frozen=True)
class Tower:
    """Where the parts of a tower are. Paths start at the model.

    Attributes:
        module: what takes pixels or tokens.
        layers: its list of layers, or each of them.
        projection: what turns a token or tokens to the embedding, a submodule or a parameter; trainable with
            ``freeze(model, "towers")``.
        stem: what comes before the first layer, as far as the model has it: submodules and parameters.
        positions: what holds ``position_embedding``, where pictures or captions of another size are another table.
        linears: names of a layer's linear layers, which LoRA adapts.
        pools_first: whether the embedding is of the first token alone, so that the last layer need give no more, nor
            does with ``class_token_only`` where it is fused.
        block: what a layer is made as: CLIP's, with norms before its parts, or BERT's, with norms behind them.
        dropouts: fields of the tower's configuration that make its output random in training.
        pooled: from the module's output to what the projection takes, [N, D].
        mlp: Hugging Face's class of a layer's MLP, with ``fc1``, ``activation_fn`` and ``fc2``, where the activation is
            quick_gelu, which a LoRA layer can take over.
        tokens_before: of an image tower whose layers give a token a patch, in rows from the top left: how many come
            before these. None: there is no such grid, or every picture has its own.
        embed_patches: of such a tower, from the model and pictures [N, 3, H, W] to the embeddings of their patches
            [N, P, D] (``clipft.families.value_path``), and of the pictures [N, D].
    """

    module: str
    layers: str | tuple[str, ...]
    projection: str
    stem: tuple[str, ...]
    positions: str | None = None
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    pools_first: bool = False
    block: Literal["clip", "bert"] = "clip"
    dropouts: tuple[str, ...] = ("attention_dropout",)
    pooled: Callable[[Any], Tensor] = _pooler_output
    mlp: type[nn.Module] | None = None
    tokens_before: int | None = None
    embed_patches: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None

    def module_of(self, model: nn.Module) -> nn.Module:
        """The tower itself."""
        return model.get_submodule(self.module)

    def features(self, model: Any, **inputs: Tensor) -> Tensor:
        """[N, D], which the model's ``forward`` takes as ``image_pooler_output`` or ``text_pooler_output``."""
        return self.pooled(self.module_of(model)(**inputs))

    def settings(self, model: Any) -> str:
        """All that its output depends on besides its weights."""
        module: Any = self.module_of(model)
        return str(module.config.to_json_string())

    def paths_of_layers(self, model: nn.Module) -> list[str]:
        """From the input up."""
        if isinstance(self.layers, tuple):
            return list(self.layers)
        return [f"{self.layers}.{name}" for name, _ in model.get_submodule(self.layers).named_children()]

    def layers_of(self, model: nn.Module) -> list[nn.Module]:
        """From the input up."""
        return [model.get_submodule(path) for path in self.paths_of_layers(model)]

    def projection_of(self, model: nn.Module) -> nn.Module | nn.Parameter:
        """What turns the tower's token or tokens to the embedding."""
        return _parts(model)[self.projection]

    def body_of(self, model: nn.Module) -> list[nn.Parameter]:
        """The tower without its projection."""
        projection = {id(parameter) for parameter in _parameters(self.projection_of(model))}
        return [parameter for parameter in self.module_of(model).parameters() if id(parameter) not in projection]

    def parameters_of(self, model: nn.Module) -> list[nn.Parameter]:
        """Of the tower and its projection, which may be a part of it."""
        return [*self.body_of(model), *_parameters(self.projection_of(model))]

    def stem_of(self, model: nn.Module) -> list[nn.Module | nn.Parameter]:
        """The tower before its first layer."""
        parts = _parts(model)
        return [parts[path] for path in self.stem if path in parts]

    def is_frozen(self, model: nn.Module) -> bool:
        """Whether it gives the same output for the same input throughout a training run."""
        tower: Any = self.module_of(model)
        random = any(getattr(tower.config, name) for name in self.dropouts)
        return not random and not any(parameter.requires_grad for parameter in tower.parameters())


class EmbeddingTower(Tower):
    """A tower whose module gives the embedding itself, projection and all. It is asked through the model, whose words
    for pictures are the same in all versions of transformers.
    """

    def features(self, model: Any, **inputs: Tensor) -> Tensor:
        """The embedding, before it is normalised."""
        features = model.get_image_features if "pixel_values" in inputs else model.get_text_features
        return self.pooled(features(**inputs))


def _parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """By their paths."""
    return {**dict(model.named_modules()), **dict(model.named_parameters())}


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


def _most_positions(config: Any) -> int:
    return int(config.text_config.max_position_embeddings)


def _picture(config: Any) -> tuple[int, int, int]:
    vision = config.vision_config
    return int(vision.num_channels), int(vision.image_size), int(vision.image_size)


def _no_layers(model: Any) -> None:
    """For families whose layers clipft leaves as they are."""


def _backend(tokenizer: Any) -> Tokenizer:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"processor: expected a tokenizer that makes tokenizer.json, got {type(tokenizer).__name__}")
    return backend


def _fits(model: Any, tokenizer: Any) -> None:
    """For families whose checkpoints have no more than one way of captions."""


def _nothing(model: Any) -> dict[str, Any]:
    """For families of one architecture."""
    return {}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        title: for readers.
        model_type: as in ``config.json``.
        model, processor: Hugging Face's classes.
        forward: a mixin with the ``forward`` of the fused model, a :class:`clipft.families.forward.PairForward`.
        loss: what it was pre-trained with, hence what it is fine-tuned with: a row of ``clipft.families.losses``.
        max_log_scale: ceiling of ``logit_scale`` in training, if it has one.
        padding: of captions. SigLIP pools the last token, padding or not, and saw full lengths only.
        text_length: tokens of a caption, where the tokenizer does not say.
        vision, text: the towers.
        dim: from the configuration to the length of an embedding.
        most_positions: from the configuration to the tokens that the text tower has positions for.
        picture: from the configuration to the shape of a picture, channels first.
        scale_shape: of the parameter ``logit_scale``.
        pixel_mean, pixel_std: of the pixels that its checkpoints were trained on, where no processor says.
        fuse_layers: takes over layers of a model that compute less than Hugging Face's.
        split_layers: takes over layers whose products are not linear layers, of which int8 takes no others.
        fit_tokenizer: brings a model and a tokenizer, as they were loaded, to the captions that the family was trained
            on, where the checkpoint's files do not say them; gives a line on what it changed.
        fast_tokenizer: a loaded tokenizer as one of the ``tokenizers`` library, for an export.
        onnx, int8: whether ``clipft.export_onnx`` and ``clipft.quantize`` take it.
        of_model: what of all this is otherwise for a model, in a family of many architectures.
    """

    title: str
    model_type: str
    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    forward: type
    loss: str
    max_log_scale: float | None
    padding: Literal["longest", "max_length"]
    text_length: int
    vision: Tower
    text: Tower
    dim: Callable[[Any], int]
    most_positions: Callable[[Any], int] = _most_positions
    picture: Callable[[Any], tuple[int, int, int]] = _picture
    scale_shape: tuple[int, ...] = ()
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    fuse_layers: Callable[[Any], None] = _no_layers
    split_layers: Callable[[Any], None] = _no_layers
    fit_tokenizer: Callable[[Any, Any], str | None] = _fits
    fast_tokenizer: Callable[[Any], Tokenizer] = _backend
    onnx: bool = False
    int8: bool = False
    of_model: Callable[[Any], dict[str, Any]] = _nothing

    @property
    def towers(self) -> dict[TowerName, Tower]:
        """Both, by name."""
        return {"vision": self.vision, "text": self.text}

    def of(self, model: Any) -> Family:
        """The row of this very model."""
        own = self.of_model(model)
        return replace(self, **own) if own else self
