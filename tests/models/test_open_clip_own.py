"""Folders of open_clip's architectures that transformers has not: loaded, trained and written back as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import captioned, picture, tiny_tokenizer
from tiny_open_clip import TEXTS, open_clip_model, tiny_cfg, write_folder
from tiny_open_clip_towers import model_cfg, peer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import clipft
from clipft.data.transforms import build_transform
from clipft.families.open_clip import OpenCLIPModel

open_clip = pytest.importorskip("open_clip")
PICTURES = [picture(index)[0] for index in range(2)]
SCALED = {"vision_cfg__ls_init_value": 0.1, "text_cfg__ls_init_value": 0.1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cfg = tiny_cfg(**SCALED)
    return write_folder(tmp_path / "theirs", cfg, open_clip_model(cfg).state_dict())


def check_same(loaded: tuple[Any, Any], folder: Path) -> None:
    """clipft's embeddings of texts and pixels against what open_clip makes of the folder."""
    (model, processor), name = loaded, f"local-dir:{folder}"
    theirs, tokens = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)(TEXTS)
    transform = build_transform(processor.image_processor)
    with torch.no_grad():
        texts = theirs.encode_text(tokens, normalize=True)
        images = theirs.encode_image(torch.stack([transform(one) for one in PICTURES]), normalize=True)
    torch.testing.assert_close(clipft.embed(model, processor, texts=TEXTS), texts, atol=1e-5, rtol=0)
    torch.testing.assert_close(clipft.embed(model, processor, PICTURES), images, atol=1e-5, rtol=0)


def test_a_folder_loads_trains_and_is_one_of_open_clips_again(folder: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(folder)
    assert type(model) is OpenCLIPModel
    check_same((model, processor), folder)
    options = {"epochs": 2, "batch_size": 8, "control_data": "none", "workers": 0, "lr": 1e-3}
    run = clipft.train(str(folder), captioned(16), tmp_path / "run", eval_data=captioned(8), **options)
    assert type(run.model) is OpenCLIPModel
    check_same((run.model, run.processor), tmp_path / "run")
    check_same(clipft.load(tmp_path / "run"), tmp_path / "run")
    assert not torch.equal(run.model.visual.proj, model.visual.proj)


def test_a_text_tower_of_hugging_faces_is_made_of_its_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = model_cfg("bert")
    cfg["text_cfg"]["hf_tokenizer_name"] = "its"
    theirs = write_folder(tmp_path / "theirs", cfg, peer("bert").state_dict(), {"resize_mode": "squash"})
    tiny_tokenizer().save_pretrained(theirs)
    loaded = clipft.load(theirs)
    assert f"its text tower is one of {cfg['text_cfg']['hf_model_name']!r}" in caplog.text
    check_same(loaded, theirs)
    loaded[0].save_pretrained(tmp_path / "ours")
    loaded[1].save_pretrained(tmp_path / "ours")
    check_same(loaded, tmp_path / "ours")
    caplog.clear()
    check_same(clipft.load(tmp_path / "ours"), tmp_path / "ours")
    assert "text tower" not in caplog.text  # it is in the folder now


def test_clipas_words_end_with_a_zero(tmp_path: Path) -> None:
    cfg = tiny_cfg(
        vision_cfg__no_ln_pre=True,
        vision_cfg__pool_type="avg",
        text_cfg__pool_type="last",
        text_cfg__no_causal_mask=True,
        text_cfg__hf_tokenizer_name="bert-base-uncased",
        text_cfg__tokenizer_kwargs={"strip_sep_token": True},
    )
    theirs = write_folder(tmp_path / "theirs", cfg, open_clip_model(cfg).state_dict())
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "photo", "of", "cat", "on", "the", "sofa", "it", "s", "3", "red"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **special).save_pretrained(theirs)
    loaded = clipft.load(theirs)
    check_same(loaded, theirs)
    clipft.convert(loaded, tmp_path / "back", to="open_clip")
    check_same(loaded, tmp_path / "back")


def test_the_towers_of_a_coca(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its decoder is left out, and said so; open_clip loads what is saved, too."""
    tokens = {"vision_cfg__output_tokens": True, "text_cfg__output_tokens": True}
    pooled = {"vision_cfg__attentional_pool": True, "vision_cfg__attn_pooler_heads": 2, "text_cfg__embed_cls": True}
    cfg = tiny_cfg(custom_text=True, **tokens, **pooled)
    cfg["multimodal_cfg"] = {"width": 32, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 49408}
    torch.manual_seed(0)
    coca = open_clip.CoCa(**{key: value for key, value in cfg.items() if key != "custom_text"})
    theirs = write_folder(tmp_path / "theirs", cfg, coca.state_dict())
    loaded = clipft.load(theirs)
    numbers = sum(parameter.numel() for parameter in coca.text_decoder.parameters())
    assert f"its decoder is left out ({numbers:,} numbers)" in caplog.text
    check_same(loaded, theirs)
    loaded[0].save_pretrained(tmp_path / "ours")
    loaded[1].save_pretrained(tmp_path / "ours")
    check_same(clipft.load(tmp_path / "ours"), tmp_path / "ours")
    check_same(loaded, tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_cfg__hf_model_name": "nobody/nothing"}, "its text tower is one of 'nobody/nothing', whose config.json"),
        ({"vision_cfg__timm_model_name": "hf-hub:nobody/nothing"}, "expected timm_model_name to be one that timm has"),
        ({"vision_cfg__width": 10**9}, "model_cfg: expected width to be at most"),
        ({"text_cfg__layers": 3}, "they lack: text.transformer.resblocks.2"),
    ],
)
def test_what_is_none_is_refused_by_name(changes: dict[str, Any], message: str, folder: Path) -> None:
    cfg = tiny_cfg(**SCALED | changes)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        clipft.load(rewritten(folder, cfg))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def rewritten(folder: Path, cfg: dict[str, Any]) -> Path:
    """With another configuration."""
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_cfg": cfg}))
    return folder


def test_doctor_holds_pixels_against_what_the_folder_says(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    model, processor = clipft.load(folder)
    levels = []
    for mean in (0.5, 0.4):
        processor.image_processor.image_mean = [mean] * 3
        found = clipft.doctor(captioned(4), model=(model, processor))["findings"]
        levels += [finding["status"] for finding in found if finding["check"] == "preprocessing"]
    assert levels == ["ok", "problem"]
