"""SigLIP models of a hundred thousand parameters with random weights: the three kinds that checkpoints come in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

SIZE, LENGTH, PATCH, PATCHES = 32, 16, 8, 12
KINDS = ("siglip", "siglip2", "naflex")
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def tiny_siglip(kind: str, folder: Path, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """``"siglip"``: sentencepiece, which lowers letters and drops punctuation; ``"siglip2"``: the same model with a
    tokenizer like Gemma's; ``"naflex"``: patches. ``folder`` takes the sentencepiece model.
    """
    tokenizer = _sentencepiece(folder) if kind == "siglip" else _bytes()
    images: Any
    processor: ProcessorMixin
    if kind == "naflex":
        images = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=PATCHES)
        processor = Siglip2Processor(images, tokenizer)
    else:
        images = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
        processor = SiglipProcessor(images, tokenizer)
    return tiny_model(kind, len(tokenizer), seed), processor


def tiny_model(kind: str, vocabulary: int = 300, seed: int = 0) -> PreTrainedModel:
    """The model alone, in evaluation mode."""
    torch.manual_seed(seed)
    text = _TOWER | {"vocab_size": vocabulary, "max_position_embeddings": LENGTH, "bos_token_id": 2, "eos_token_id": 1}
    vision = _TOWER | {"patch_size": PATCH}
    model: PreTrainedModel
    if kind == "naflex":
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision | {"num_patches": 16}))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision | {"image_size": SIZE}))
    with torch.no_grad():  # as pre-training starts
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-10.0)
    return model.eval()


def tiny_inputs(kind: str, count: int = 6) -> dict[str, torch.Tensor]:
    """Random inputs of both towers."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (count, LENGTH), generator=generator)
    if kind != "naflex":
        return {"input_ids": ids, "pixel_values": torch.randn(count, 3, SIZE, SIZE, generator=generator)}
    shapes = torch.tensor([(3, 4), (4, 3), (2, 4), (1, 12), (3, 3), (3, 4)])[:count]
    mask = (torch.arange(PATCHES) < shapes.prod(1)[:, None]).int()
    pixels = torch.randn(count, PATCHES, 3 * PATCH**2, generator=generator) * mask[..., None]
    return {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _bytes() -> Siglip2Tokenizer:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    tokens = [*special, *sorted(ByteLevel.alphabet()), "▁"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return Siglip2Tokenizer(vocab=vocabulary, padding_side="right", model_input_names=["input_ids"])


def _sentencepiece(folder: Path) -> Any:
    import sentencepiece
    from transformers import SiglipTokenizer

    words = "a picture of red green blue yellow square bar column frame zero one two three four five six seven"
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{one} {other} 0123456789" for one in words.split() for other in words.split()]),
        model_writer=writer,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    path.write_bytes(writer.getvalue())
    return SiglipTokenizer(str(path), model_max_length=LENGTH, model_input_names=["input_ids"])
