"""Where captions end and are cut, whatever a checkpoint says: of CLIPs, and of SigLIP 2 as big_vision trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_clip import tiny_clip
from tiny_siglip import tiny_siglip
from torch import nn
from transformers import CLIPConfig, CLIPModel, GemmaTokenizer, SiglipConfig, SiglipModel

import clipft
from clipft.data.collate import tokenize


@pytest.mark.parametrize(
    "positions, stated, cut, said",
    [(32, 77, 32, True), (77, 77, 77, False), (248, 77, 248, True), (248, 100, 100, True), (77, 10**30, 77, False)],
)
def test_captions_are_cut_where_the_model_ends(
    positions: int, stated: int, cut: int, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """77 is what every CLIP's tokenizer says, and says nothing of a model with more."""
    model, processor = tiny_clip()
    config = model.config.to_dict()
    config["text_config"]["max_position_embeddings"] = positions
    CLIPModel(CLIPConfig.from_dict(config)).save_pretrained(tmp_path)
    processor.tokenizer.model_max_length = stated
    processor.save_pretrained(tmp_path)
    model, processor = clipft.load(tmp_path)
    assert tokenize(processor, ["x " * 300])["input_ids"].shape == (1, cut)
    assert any(f"cut at {cut} tokens" in line for line in caplog.messages) == said
    texts = ["x" * (cut - 3) + end for end in "ab"]  # which differ in the last token but one
    same = clipft.embed(model, processor, texts=texts)
    assert not torch.equal(same[0], same[1])


def test_an_old_end_token_beside_added_tokens(tmp_path: Path) -> None:
    """transformers takes the largest number for the end where a configuration has the old 2."""
    model, processor = tiny_clip()
    end = processor.tokenizer.eos_token_id
    processor.tokenizer.add_tokens(["zzproduct"])
    old = model.text_model.embeddings.token_embedding
    new = nn.Embedding(len(processor.tokenizer), old.embedding_dim)
    with torch.no_grad():
        new.weight[: old.num_embeddings] = old.weight
    model.text_model.embeddings.token_embedding = new
    model.config.text_config.vocab_size, model.config.text_config.eos_token_id = len(processor.tokenizer), 2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = clipft.load(tmp_path)
    vectors = clipft.embed(model, processor, texts=["a zzproduct on a", "a zzproduct in b"])
    assert model.config.text_config.eos_token_id == end and vectors[0] @ vectors[1] < 0.9999


def test_captions_of_siglip2(tmp_path: Path) -> None:
    """Its checkpoints come with Gemma's tokenizer, which keeps capitals, pads on the left and makes a mask."""
    model, processor = tiny_siglip("siglip2", tmp_path / "spiece")
    config = model.config.to_dict()
    config["text_config"]["max_position_embeddings"] = 64
    model = SiglipModel(SiglipConfig.from_dict(config))
    processor.tokenizer = GemmaTokenizer(vocab=dict(processor.tokenizer.get_vocab()), padding_side="left")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        model, processor = clipft.load(folder)
        tokens = tokenize(processor, ["A Red", "a red"])
        assert list(tokens) == ["input_ids"] and tokens["input_ids"].shape == (2, 64)
        assert torch.equal(*tokens["input_ids"]) and tokens["input_ids"][0, -1] == processor.tokenizer.pad_token_id
        model.save_pretrained(tmp_path / "again")
        processor.save_pretrained(tmp_path / "again")
