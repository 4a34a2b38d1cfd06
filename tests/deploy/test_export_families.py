"""ONNX of the families beside CLIP: what padding, pooling and tokenizers make different; torch is the truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_clip import captioned, picture
from tiny_families import tiny_family
from tiny_siglip import KINDS, tiny_siglip

import clipft
from clipft.data.collate import tokenize
from clipft.families.registry import family_of
from clipft.families.siglip_tokenizer import fast_tokenizer

for module in ("onnx", "onnxscript", "sentencepiece"):
    pytest.importorskip(module)
tokenizer_of = pytest.importorskip("clipft.inference.onnx_clip", exc_type=ImportError).tokenizer_of
TEXTS = [
    "a red square",
    "x",
    "  A RED Square, twice -- and more than fits into any of these!",
    "一张红色的方块照片",
    "café ½",
]


def made(kind: str, folder: Path) -> tuple[Any, Any]:
    model, processor = tiny_siglip(kind, folder / "spiece") if kind in KINDS else tiny_family(kind)
    for tower in family_of(model).towers.values():  # one layer shows what is to be shown
        del model.get_submodule(tower.layers)[1:]
    model.config.text_config.num_hidden_layers = model.config.vision_config.num_hidden_layers = 1
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return clipft.load(folder / "model")


@pytest.fixture(scope="module", params=["metaclip_2", "chinese_clip", "siglip"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = made(request.param, folder)
    report = clipft.export_onnx(model, processor, folder / "onnx", int8=True, data=captioned(6))
    return model, processor, folder / "onnx", report


def test_the_encoders_compute_what_torch_computes(exported: tuple[Any, Any, Path, Any]) -> None:
    model, processor, folder, report = exported
    for way, least in (("fp32", 1 - 1e-6), ("int8", 0.99)):
        assert min(report[way][f"{part}_cosine"]["min"] for part in ("image", "text")) > least
    assert report["fp32"]["retrieval"] == report["torch"]["retrieval"]
    onnx, pictures = clipft.OnnxCLIP(folder), [picture(index)[0] for index in range(3)]
    np.testing.assert_allclose(onnx.encode_images(pictures), clipft.embed(model, processor, pictures), atol=2e-6)
    want = clipft.embed(model, processor, texts=TEXTS)
    assert torch.pdist(want).min() > 1e-4  # each has a vector of its own
    np.testing.assert_allclose(onnx.encode_texts(TEXTS), want, atol=2e-6)
    np.testing.assert_allclose(onnx.encode_texts(TEXTS[:1]), want[:1], atol=2e-6)  # without padding to the others


def test_tokens_and_inputs_are_those_of_the_family(exported: tuple[Any, Any, Path, Any]) -> None:
    model, processor, folder, _ = exported
    onnx, want = clipft.OnnxCLIP(folder), tokenize(processor, TEXTS, family=family_of(model))
    got = onnx.tokenize(TEXTS)
    assert {name: got[name].tolist() for name in want} == {name: ids.tolist() for name, ids in want.items()}
    assert {one.name for one in onnx._text.get_inputs()} == set(want)
    if "attention_mask" in want:
        with pytest.raises(ValueError, match="attention_mask: expected one"):
            onnx.run_texts(got["input_ids"])
    else:  # no shorter captions, which the model has not seen
        with pytest.raises(ValueError, match="ONNX Runtime cannot run it"):
            onnx.run_texts(got["input_ids"][:, :-1])


def test_captions_are_padded_where_the_tokenizer_says(exported: tuple[Any, Any, Path, Any], tmp_path: Path) -> None:
    folder, pad = shutil.copytree(exported[2], tmp_path / "onnx"), exported[1].tokenizer.pad_token_id
    assert clipft.OnnxCLIP(folder).tokenize(TEXTS)["input_ids"][1, -1] == pad
    info = json.loads((folder / "clipft_onnx.json").read_text())
    (folder / "clipft_onnx.json").write_text(json.dumps({key: info[key] for key in info if key != "files"}))
    config = folder / "tokenizer_config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps(described | {"padding_side": "left"}))
    assert clipft.OnnxCLIP(folder).tokenize(TEXTS)["input_ids"][1, 0] == pad
    config.write_text(json.dumps(described | {"padding_side": "up"}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: expected padding_side to be left or right, got 'up'"):
        clipft.OnnxCLIP(folder)


def test_siglip2_s_tokens_are_those_of_its_file(tmp_path: Path) -> None:
    """The model is a SigLIP's; letters are lowered by what stands in tokenizer.json."""
    model, processor = made("siglip2", tmp_path)
    info = {"padding": "max_length", "text_length": processor.tokenizer.model_max_length}
    want = tokenize(processor, TEXTS, family=family_of(model))["input_ids"].tolist()
    assert [own.ids for own in tokenizer_of(tmp_path / "model", info).encode_batch(TEXTS)] == want


def test_other_tokens_than_the_processor_s_are_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made("siglip", tmp_path)
    fast = fast_tokenizer(processor.tokenizer)
    fast.normalizer = None
    monkeypatch.setitem(vars(family_of(model)), "fast_tokenizer", lambda tokenizer: fast)
    with pytest.raises(ValueError, match=r"tokenizer.json makes other tokens of "):
        clipft.export_onnx(model, processor, tmp_path / "onnx", data=captioned(4))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    "text",
    ["", " a  RED\tsquare. ", "- 'red', \"blue\"!", "½ ﬁ Ⅳ — café e\u0301", "一张照片", "a▁b ▁ c", "x\x1cy\u00a0z"],
)
def test_sentencepiece_s_tokens_without_sentencepiece(text: str, lower: bool, spiece: Any) -> None:
    spiece.do_lower_case = lower
    assert fast_tokenizer(spiece).encode(text).ids == spiece(text)["input_ids"]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_siglip("siglip", tmp_path_factory.mktemp("spiece"))[1].tokenizer
