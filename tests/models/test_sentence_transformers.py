"""Folders that sentence-transformers and clipft both load, with the same embeddings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tiny_clip import picture, tiny_clip
from tiny_siglip import tiny_siglip
from transformers import AutoModel

import clipft
from clipft.models.saving import save_model

MODULES = "modules.json"
TEXTS = ["a red square", "a yellow frame " * 9, "Blue"]
OLD = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]


def theirs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and texts by sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    images = [picture(index)[0] for index in range(3)]
    return model.encode(images, convert_to_tensor=True), model.encode(TEXTS, convert_to_tensor=True)


def ours(model: Any, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    images = [picture(index)[0] for index in range(3)]
    return clipft.embed(model, processor, images=images), clipft.embed(model, processor, texts=TEXTS)


def check_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **({"atol": 1e-6, "rtol": 1e-5} | tolerance))


def in_their_layout(folder: Path, modules: list[dict[str, Any]]) -> Path:
    """As sentence-transformers/clip-ViT-B-32 is."""
    model, processor = tiny_clip()
    place = folder / modules[0]["path"]
    model.save_pretrained(place)
    processor.save_pretrained(place)
    (folder / MODULES).write_text(json.dumps(modules))
    return folder


# ---- clipft's there ----


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "naflex"])
def test_a_saved_model_loads_there(kind: str, tmp_path: Path) -> None:
    if kind == "siglip":
        pytest.importorskip("sentencepiece")
    save_model(*(tiny_clip() if kind == "clip" else tiny_siglip(kind, tmp_path / "tokens")), tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    model, processor = clipft.load(tmp_path / "moved")
    assert len(list((tmp_path / "moved").rglob("*.safetensors"))) == 1
    check_same(theirs(tmp_path / "moved"), ours(model, processor))
    assert type(AutoModel.from_pretrained(tmp_path / "moved")) is type(model)


def test_a_head_does_not_hinder_it(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, ["red", "blue"])
    save_model(model, processor, tmp_path)
    check_same(theirs(tmp_path), ours(*clipft.load(tmp_path)))


def test_a_run_and_a_merged_adapter_load_there(base: Path, colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    done = clipft.train(str(base), str(colours), tmp_path / "run", lora_r=2, lr=0.1, epochs=1, control_data="none")
    check_same(theirs(tmp_path / "run" / "merged"), ours(done.model, done.processor))
    assert not (tmp_path / "run" / MODULES).exists()
    save_model(clipft.quantize(done.model), done.processor, tmp_path / "run" / "merged")
    assert not (tmp_path / "run" / "merged" / MODULES).exists()  # int8, which transformers does not load


# ---- theirs here ----


@pytest.mark.parametrize("place", ["0_CLIPModel", "0_Transformer", ""])
def test_their_folders_load(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    normalize = {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"}
    folder = in_their_layout(tmp_path / "theirs", [OLD[0] | {"path": place}, normalize])
    model, processor = clipft.load(folder)
    check_same(ours(model, processor), ours(*tiny_clip()))
    assert model.name_or_path == str(folder)
    vectors = tmp_path / "vectors.npy"
    assert run("embed", "--model", folder, "--data", folder, "--output", vectors).exit_code == 2  # no pictures
    prompts = {"prompts": {"query": "a photo of "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with caplog.at_level(logging.WARNING, "clipft"):
        clipft.load(folder)
    assert "without the prompt 'a photo of '" in caplog.text


@pytest.mark.parametrize("place", ["0_CLIPModel", ""])
def test_a_folder_that_they_load_gives_the_same_here(place: str, tmp_path: Path) -> None:
    folder = in_their_layout(tmp_path, [OLD[0] | {"path": place}])
    found = theirs(folder)
    lengths = [torch.nn.functional.normalize(part) for part in found]
    check_same(ours(*clipft.load(folder)), (lengths[0], lengths[1]))


def test_what_they_save_loads(base: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    library.SentenceTransformer(str(base), device="cpu", local_files_only=True).save(str(tmp_path))
    check_same(ours(*clipft.load(tmp_path)), ours(*clipft.load(base)))


def test_an_adapter_of_theirs_finds_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = in_their_layout(tmp_path / "theirs", OLD)
    model, processor = clipft.load(folder)
    save_model(clipft.add_lora(model, r=2), processor, tmp_path / "run")
    check_same(ours(*clipft.load(tmp_path / "run")), ours(*clipft.load(folder)))


def test_a_model_saved_over_theirs_takes_its_place(tmp_path: Path) -> None:
    folder = in_their_layout(tmp_path, OLD)
    for model in (tiny_clip(1)[0], clipft.quantize(tiny_clip(2)[0])):
        save_model(model, tiny_clip()[1], folder)
        check_same(ours(*clipft.load(folder)), ours(model, tiny_clip()[1]))


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--them--clip"
    in_their_layout(cache / "snapshots" / ("0" * 40), OLD)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, processor = clipft.load("them/clip")
    check_same(ours(model, processor), ours(*tiny_clip()))
    assert model.name_or_path == "them/clip"
    with pytest.raises(OSError, match="them/other"):
        clipft.load("them/other")


@pytest.mark.parametrize(
    "modules, message",
    [
        ([], "expected a list of modules"),
        ({"path": ""}, "expected a JSON list, found a dict"),
        ([OLD[0] | {"path": "../elsewhere"}], "path to be a sub-folder, found '../elsewhere'"),
        ([OLD[0], {"type": "sentence_transformers.models.Dense", "path": "1_Dense"}], "found CLIPModel, Dense, whose"),
        ([{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}], "found StaticEmbedding, whose"),
    ],
)
def test_modules_that_are_no_clip_are_refused(modules: Any, message: str, tmp_path: Path) -> None:
    folder = in_their_layout(tmp_path, OLD)
    (folder / MODULES).write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=message) as caught:
        clipft.load(folder)
    assert str(folder / MODULES) in str(caught.value)
