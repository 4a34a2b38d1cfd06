"""A CLIP model of a hundred thousand parameters with random weights, and pictures for it: what fast tests run on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIZE, PATCH, LENGTH = 32, 16, 24
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("square", "bar", "column", "frame")


def tiny_clip(seed: int = 0, positions: int = LENGTH, **config: Any) -> tuple[CLIPModel, CLIPProcessor]:
    """A model with 3 layers a tower, and a processor whose tokenizer knows single bytes."""
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return tiny_model(seed, positions, **config), CLIPProcessor(images, tiny_tokenizer())


def tiny_tokenizer() -> CLIPTokenizer:
    """Single bytes as tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=LENGTH)


def tiny_model(seed: int = 0, positions: int = LENGTH, **config: Any) -> CLIPModel:
    """The model alone, which needs no torchvision."""
    tokenizer = tiny_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": positions},
            vision_config=tower | {"image_size": SIZE, "patch_size": PATCH},
            projection_dim=16,
            **config,
        )
    )
    return model.eval()


def save_odd(model: Any, processor: Any, folder: Path) -> None:
    """With a layer that int8 would harm: a column far above the others, which it does not read."""
    with torch.no_grad():
        model.text_model.encoder.layers[1].layer_norm2.bias[3] = 400.0
        model.text_model.encoder.layers[1].mlp.fc1.weight[:, 3] = 0.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def picture(index: int) -> tuple[Image.Image, str, str]:
    """A coloured shape with noise of its own, its caption and its colour."""
    colour, shape = list(COLOURS)[index % 4], SHAPES[index // 4 % 4]
    noise = np.random.default_rng(index)
    pixels = noise.integers(0, 60, (40, 50, 3), dtype=np.uint8)
    area = {
        "square": np.s_[10:30, 15:35],
        "bar": np.s_[15:25, :],
        "column": np.s_[:, 20:30],
        "frame": np.s_[2:38, 2:48],
    }
    pixels[area[shape]] = COLOURS[colour]
    if shape == "frame":
        pixels[8:32, 8:42] = 0
    return Image.fromarray(pixels), f"a {colour} {shape}", colour


def captioned(count: int, captions: int = 1) -> datasets.Dataset:
    """Distinct captions: one a picture, or a list of several."""
    rows = [picture(index) for index in range(count)]
    own = [[f"{caption} {number} {index}" for number in range(captions)] for index, (_, caption, _) in enumerate(rows)]
    text: Any = datasets.Value("string") if captions == 1 else datasets.List(datasets.Value("string"))
    columns = {"image": [row[0] for row in rows], "caption": [o[0] for o in own] if captions == 1 else own}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(), "caption": text}))


def labelled(count: int) -> datasets.Dataset:
    """Pictures with their colour as the class."""
    names = list(COLOURS)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [picture(index) for index in range(count)]
    return datasets.Dataset.from_dict(
        {"image": [row[0] for row in rows], "label": [names.index(row[2]) for row in rows]}, features=features
    )


def class_folders(folder: Path, count: int) -> Path:
    """The same as files: one sub-folder a colour."""
    for index in range(count):
        image, _, colour = picture(index)
        (folder / colour).mkdir(parents=True, exist_ok=True)
        image.save(folder / colour / f"{index}.png")
    return folder


def smooth(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options: Any) -> Any:
    """As ``load_pairs`` keeps a picture whose file is in memory: JPEG unless options name another format."""
    from clipft.data.pictures import EncodedPicture

    file = io.BytesIO()
    image.save(file, **({"format": "JPEG", "quality": 95} | options))
    return EncodedPicture(file.getvalue(), "row 0")


def check_gradients(fused: nn.Module, plain: nn.Module, exact: nn.Module) -> None:
    """The fused model may err no more than transformers in float32, up to the luck of the order of sums: a few ulps of
    what is summed. That is as large as the gradients of the block's other parameters of the same kind; a key's bias
    moves all logits of a query alike, so its own is zero but for their rounding.
    """
    truths = {name: parameter.grad for name, parameter in exact.named_parameters()}
    largest: dict[tuple[str, torch.Size], Tensor] = {}
    for name, truth in truths.items():
        block = name.rsplit(".", 2)[0], truth.shape
        largest[block] = torch.maximum(truth.abs().max(), largest.get(block, truth.new_zeros(())))
    for name, truth in truths.items():
        error, of_plain = ((model.get_parameter(name).grad - truth).abs().max() for model in (fused, plain))
        rounding = torch.finfo(torch.float32).eps * largest[name.rsplit(".", 2)[0], truth.shape]
        assert error <= 4 * of_plain + 8 * rounding, f"{name}: {error:.3g}, of transformers {of_plain:.3g}"


def attributes_csv(folder: Path, count: int = 24) -> Path:
    """Pictures with a caption, the colour, which is missing in every fifth row, and the shape."""
    rows = ["image,caption,color,shape"]
    for index in range(count):
        image, caption, colour = picture(index)
        image.save(folder / f"{index}.png")
        rows.append(f"{index}.png,{caption},{'' if index % 5 == 0 else colour},{SHAPES[index // 4 % 4]}")
    path = folder / "pairs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path
