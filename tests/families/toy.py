"""A family that shares no name with the others: a small dual encoder and the row that makes clipft work with it.

Both towers mix their tokens by likeness instead of attention, pool all of them, padding or not, and keep their
positions in a parameter of their own. The processor is CLIP's, but captions are padded to their full length: what goes
by the processor's class, where CLIP stands first, gets them wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from tiny_clip import LENGTH, SIZE, tiny_clip
from torch import Tensor, nn
from transformers import CLIPProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from clipft.families.family import Family, Tower
from clipft.families.forward import PairForward

DEPTHS = {"vision": 3, "text": 2}


# ---- as a library of models would have it ----


@strict
class ToyPictureConfig(PreTrainedConfig):
    model_type = "toy_pictures"
    base_config_key = "vision_config"
    breadth: int = 32
    depth: int = DEPTHS["vision"]
    edge: int = SIZE
    tile: int = 16
    forget: float = 0.0


@strict
class ToyWordConfig(PreTrainedConfig):
    model_type = "toy_words"
    base_config_key = "text_config"
    breadth: int = 32
    depth: int = DEPTHS["text"]
    known: int = 600
    longest: int = LENGTH
    forget: float = 0.0


@strict
class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    sub_configs_defaults = {"vision_config": ToyPictureConfig, "text_config": ToyWordConfig}  # noqa: RUF012
    vision_config: dict | ToyPictureConfig | None = None
    text_config: dict | ToyWordConfig | None = None
    shared: int = 16


@dataclass
class ToyOutput(ModelOutput):
    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: Any = None
    vision_model_output: Any = None


class ToyBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.calm = nn.LayerNorm(config.breadth)
        self.mix = nn.Linear(config.breadth, config.breadth)
        self.up = nn.Linear(config.breadth, 2 * config.breadth)
        self.down = nn.Linear(2 * config.breadth, config.breadth)
        self.forget = nn.Dropout(config.forget)

    def forward(self, states: Tensor) -> Tensor:
        calm = self.calm(states)
        likeness = (calm @ calm.transpose(1, 2) / math.sqrt(calm.shape[-1])).softmax(-1)
        states = states + self.mix(likeness @ calm)
        return states + self.forget(self.down(nn.functional.gelu(self.up(states))))


class ToyTower(nn.Module):
    def __init__(self, config: Any, first: nn.Module, positions: int) -> None:
        super().__init__()
        self.config = config
        self.first = first
        self.places = nn.Parameter(0.5 * torch.randn(positions, config.breadth))
        self.blocks = nn.ModuleList(ToyBlock(config) for _ in range(config.depth))
        self.close = nn.LayerNorm(config.breadth)

    def _pooled(self, tokens: Tensor) -> Any:
        states = tokens + self.places[: tokens.shape[1]]
        for block in self.blocks:
            states = block(states)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.close(states.mean(1)))


class ToyPictures(ToyTower):
    def __init__(self, config: Any) -> None:
        tiles = nn.Conv2d(3, config.breadth, config.tile, config.tile)
        super().__init__(config, tiles, (config.edge // config.tile) ** 2)

    def forward(self, pixel_values: Tensor) -> Any:
        return self._pooled(self.first(pixel_values).flatten(2).transpose(1, 2))


class ToyWords(ToyTower):
    def __init__(self, config: Any) -> None:
        super().__init__(config, nn.Embedding(config.known, config.breadth), config.longest)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self._pooled(self.first(input_ids))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.pictures = ToyPictures(config.vision_config)
        self.words = ToyWords(config.text_config)
        self.picture_out = nn.Linear(config.vision_config.breadth, config.shared, bias=False)
        self.word_out = nn.Linear(config.text_config.breadth, config.shared, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As torch has made them."""

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        output = self.pictures(pixel_values)
        output.pooler_output = self.picture_out(output.pooler_output)
        return output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = self.words(input_ids, attention_mask)
        output.pooler_output = self.word_out(output.pooler_output)
        return output

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> ToyOutput:
        images = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        texts = nn.functional.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        logits = self.logit_scale.exp() * images @ texts.t()
        targets = torch.arange(len(logits))
        loss = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.t(), targets)) / 2
        return ToyOutput(loss, logits, logits.t(), texts, images)


def toy(seed: int = 0, **vision: Any) -> tuple[ToyModel, CLIPProcessor]:
    """A model with random weights, and its processor."""
    torch.manual_seed(seed)
    config = ToyConfig(vision_config=ToyPictureConfig(**vision), text_config=ToyWordConfig())
    return ToyModel(config).eval(), tiny_clip()[1]


# ---- what clipft needs to know of it ----


@dataclass
class FusedToyOutput(ToyOutput):
    logit_scale: Tensor | None = None
    head_weights: tuple[Tensor, ...] | None = None


class ToyForward(PairForward):
    output_class = FusedToyOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool | None = None,
        image_pooler_output: Tensor | None = None,
        text_pooler_output: Tensor | None = None,
        text_index: Tensor | None = None,
        **kwargs: Any,
    ) -> FusedToyOutput:
        model: Any = self
        images = texts = None
        if image_pooler_output is not None:
            images = model.picture_out(image_pooler_output)
        elif pixel_values is not None:
            images = self.get_image_features(pixel_values).pooler_output
        if text_pooler_output is not None:
            texts = model.word_out(text_pooler_output)
        elif input_ids is not None:
            texts = self.get_text_features(input_ids, attention_mask).pooler_output
        return self._pairs(
            images,
            texts,
            return_loss=return_loss,
            return_logits=not return_loss if return_logits is None else return_logits,
            text_index=text_index,
        )


def _tower(module: str, projection: str) -> Tower:
    return Tower(
        module=module,
        layers=f"{module}.blocks",
        projection=projection,
        stem=(f"{module}.first", f"{module}.places"),
        linears=("mix", "up", "down"),
        dropouts=("forget",),
    )


TOY = Family(
    title="Toy",
    model_type="toy",
    model=ToyModel,
    processor=CLIPProcessor,
    forward=ToyForward,
    loss="contrastive",
    max_log_scale=math.log(50.0),
    padding="max_length",
    text_length=LENGTH,
    vision=_tower("pictures", "picture_out"),
    text=_tower("words", "word_out"),
    dim=lambda config: int(config.shared),
    most_positions=lambda config: int(config.text_config.longest),
    picture=lambda config: (3, config.vision_config.edge, config.vision_config.edge),
    onnx=True,
)
