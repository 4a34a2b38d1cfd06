"""Models resized to other pictures and longer captions, held against transformers, open_clip and Long-CLIP's rule."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from tiny_clip import LENGTH, PATCH, SIZE, picture, tiny_clip
from tiny_families import tiny_family
from tiny_siglip import tiny_siglip
from torch import Tensor
from transformers import AutoModel, AutoProcessor

import clipft
from clipft.data.collate import tokenize
from clipft.families.registry import family_of
from clipft.models.saving import save_model

LARGE, LONG = 3 * SIZE, 30
TEXTS = ["a red square", "twenty-nine bytes of a caption and more than that"]


def resized(model: Any, processor: Any, **sizes: int) -> tuple[Any, Any]:
    return clipft.resize(model, processor, **sizes), processor


def embedded(model: Any, processor: Any) -> tuple[Tensor, Tensor]:
    images = [picture(index)[0] for index in range(3)]
    return clipft.embed(model, processor, images=images), clipft.embed(model, processor, texts=TEXTS)


def check_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def tiny(kind: str, folder: Path) -> tuple[Any, Any]:
    return tiny_clip() if kind == "clip" else tiny_siglip(kind, folder)


# ---- the tables ----


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE, LARGE])
def test_as_transformers_interpolates(kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' ``interpolate_pos_encoding`` resizes the same grid in each forward, without antialiasing. In torch
    that is another cubic too (-0.75 in place of Pillow's -0.5), so random tables agree only with antialiasing off, at
    any size; as it is, a table that is the same everywhere on the grid must, since both kernels sum to one.
    """
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    def both(everywhere: float | None = None) -> tuple[Tensor, Tensor]:
        plain, (model, _) = tiny(kind, tmp_path)[0], resized(*tiny(kind, tmp_path), image_size=size)
        with torch.no_grad():
            for one in (plain, model) if everywhere is not None else ():
                vision = one.config.vision_config
                grid = (vision.image_size // vision.patch_size) ** 2
                one.vision_model.embeddings.position_embedding.weight[-grid:] = everywhere
            theirs = plain.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
            return model.get_image_features(pixels).pooler_output, theirs

    torch.testing.assert_close(*both(everywhere=0.3), atol=1e-6, rtol=1e-5)
    assert size < SIZE or not torch.allclose(*both(), atol=1e-6)
    interpolate = torch.nn.functional.interpolate

    def without_antialiasing(*args: Any, antialias: bool = False, **kwargs: Any) -> Tensor:
        return interpolate(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.interpolate", without_antialiasing)
    torch.testing.assert_close(*both(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE, 7 * PATCH])
def test_as_open_clip_resizes(size: int) -> None:
    resize_pos_embed = pytest.importorskip("open_clip.model").resize_pos_embed
    plain, (model, _) = tiny_clip()[0], resized(*tiny_clip(), image_size=size)
    key, grid = "visual.positional_embedding", size // PATCH
    state = {key: plain.vision_model.embeddings.position_embedding.weight.detach()}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    torch.testing.assert_close(model.vision_model.embeddings.position_embedding.weight.detach(), state[key])


def test_long_captions_as_long_clip_stretches() -> None:
    """Its rule for 77 to 248: four places for each position after the first 20, linear between two, and after the last
    on in the direction of the last two."""
    model, processor = tiny_clip(positions=77)
    old = model.text_model.embeddings.position_embedding.weight.detach().clone()
    clipft.resize(model, processor, max_tokens=248)
    new = model.text_model.embeddings.position_embedding.weight.detach()
    assert new.shape == (248, old.shape[1]) and torch.equal(new[:20], old[:20])
    for place in range(20, 77):
        ahead = old[place + 1] - old[place] if place < 76 else old[76] - old[75]
        for quarter in range(4):
            expected = old[place] + quarter / 4 * ahead
            torch.testing.assert_close(new[20 + 4 * (place - 20) + quarter], expected, atol=1e-6, rtol=0)
    assert processor.tokenizer.model_max_length == 248


def test_short_captions_stay_as_they_were() -> None:
    model, processor = tiny_clip()
    before = clipft.embed(model, processor, texts=["a red square"])
    clipft.resize(model, processor, max_tokens=LONG)
    torch.testing.assert_close(clipft.embed(model, processor, texts=["a red square"]), before, rtol=0, atol=1e-6)
    assert not torch.equal(*clipft.embed(model, processor, texts=["x" * (LENGTH - 2), "x" * LENGTH]))
    clipft.resize(short := tiny_clip()[0], processor := tiny_clip()[1], max_tokens=5)  # cut, and no weight changes
    torch.testing.assert_close(*clipft.embed(short, processor, texts=["abcd", "abce"]), rtol=0, atol=1e-6)
    assert len(short.text_model.embeddings.position_embedding.weight) == LENGTH


# ---- saved, loaded, deployed ----


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_a_saved_model_is_a_plain_one_of_the_new_size(kind: str, tmp_path: Path) -> None:
    if kind == "siglip":
        pytest.importorskip("sentencepiece")
    sizes = {"image_size": LARGE} | ({"max_tokens": LONG} if kind == "clip" else {})
    save_model(*tiny(kind, tmp_path / "tokens"), tmp_path / "base")
    model, processor = resized(*clipft.load(tmp_path / "base"), **sizes)
    save_model(model, processor, tmp_path / "saved")
    plain, theirs = AutoModel.from_pretrained(tmp_path / "saved"), AutoProcessor.from_pretrained(tmp_path / "saved")
    inputs = theirs(text=TEXTS, images=[picture(0)[0]] * 2, padding="max_length", truncation=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (LARGE, LARGE)
    assert inputs["input_ids"].shape[1] == (LONG if kind == "clip" else theirs.tokenizer.model_max_length)
    with torch.no_grad():
        assert plain(**inputs).logits_per_image.shape == (2, 2)
    check_same(embedded(*clipft.load(tmp_path / "saved")), embedded(model, processor))
    for tower in ("vision_model", "text_model"):
        ours, fresh = (vars(getattr(one, tower).embeddings) for one in (model, plain))
        numbers = [{name: value for name, value in own.items() if isinstance(value, int)} for own in (ours, fresh)]
        assert numbers[0] == numbers[1]


def test_a_resize_larger_than_the_crop_keeps_its_proportion() -> None:
    model, processor = tiny_clip()
    processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=40)
    clipft.resize(model, processor, image_size=LARGE)
    assert dict(processor.image_processor.size) == {"shortest_edge": 120}
    assert dict(processor.image_processor.crop_size) == {"height": LARGE, "width": LARGE}


def test_int8_of_a_resized_model(tmp_path: Path) -> None:
    model, processor = resized(*tiny_clip(), image_size=LARGE, max_tokens=LONG)
    save_model(clipft.quantize(model), processor, tmp_path)
    check_same(embedded(*clipft.load(tmp_path)), embedded(model, processor), 0.05)


# ---- adapters ----


def test_an_adapter_brings_its_size_back(base: Path, table: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("peft")
    options = {"image_size": LARGE, "max_tokens": LONG, "lora_r": 2, "lr": 0.01, "epochs": 1, "batch_size": 16}
    done = clipft.train(str(base), str(table), tmp_path / "run", control_data="none", **options)
    expected = embedded(done.model, done.processor)
    check_same(embedded(*clipft.load(tmp_path / "run")), expected, 1e-5)
    check_same(embedded(*clipft.load(tmp_path / "run" / "merged")), expected, 1e-5)
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    check_same(embedded(*clipft.load(checkpoint)), expected, 1e-5)
    assert json.loads((tmp_path / "run" / "clipft_files.json").read_text())["resized"] == {
        "image_size": LARGE,
        "max_tokens": LONG,
    }
    again = clipft.add_lora(clipft.resize(done.model, done.processor, image_size=SIZE), r=2)  # of the merged model
    save_model(again, done.processor, tmp_path / "again")
    check_same(embedded(*clipft.load(tmp_path / "again")), embedded(again, done.processor), 1e-5)
    save_model(tiny_clip(1)[0], tiny_clip()[1], tmp_path / "other")
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base.resolve()), str(tmp_path / "other")))
    monkeypatch.setattr("clipft.models.bases.Base.places", lambda self, name: [name])
    with pytest.raises(ValueError, match="has other weights"):
        clipft.load(tmp_path / "run")


def test_an_adapter_without_its_record_is_refused(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, processor = resized(*clipft.load(base), image_size=LARGE)
    clipft.add_lora(model, r=2).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)  # as plain peft has it
    with pytest.raises(ValueError, match=rf"pictures of {LARGE} pixels, and its base takes {SIZE}: save"):
        clipft.load(tmp_path)
    (tmp_path / "clipft_files.json").write_text('{"resized": {"image_size": "large"}}')
    with pytest.raises(ValueError, match="image_size: expected a number from 1 to 8192, got 'large'"):
        clipft.load(tmp_path)


# ---- runs ----


def test_a_run_at_another_size(base: Path, table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["train", "--model", base, "--data", table, "--output", tmp_path, "--epochs", 2, "--freeze", "vision"]
    sizes = ["--image-size", LARGE, "--max-tokens", LONG]
    assert run(*arguments, *sizes).exit_code == 0
    with caplog.at_level(logging.WARNING, "clipft"):
        model, processor = clipft.load(tmp_path)
    assert not caplog.records
    assert model.config.vision_config.image_size == LARGE
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings == LONG
    assert "image_size: 96" in (tmp_path / "config.yaml").read_text()
    cached = {path.name for path in (tmp_path / "features").iterdir()}
    refused = run(*arguments, "--max-tokens", LONG, "--resume")
    assert refused.exit_code == 2 and "image-size (96 then, None now)" in " ".join(refused.output.split())
    assert run(*arguments, *sizes, "--resume").exit_code == 0
    assert {path.name for path in (tmp_path / "features").iterdir()} == cached


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"image_size": SIZE + 1}, r"image_size: expected a multiple of the model's patches of 16 .* 32 or 48, got 33"),
        ({"image_size": 0}, "image_size: expected a number from 1 to 8192, got 0"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2"),
        ({"max_tokens": 10**9}, "max_tokens: expected a number from 1 to 8192"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipft.resize(*tiny_clip(), **sizes)


def test_what_cannot_be_resized(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    again = resized(*tiny_clip(), image_size=LARGE)
    with pytest.raises(ValueError, match="image_size: the model was resized before, to 96: load it again"):
        clipft.resize(*again, image_size=SIZE)
    with pytest.raises(ValueError, match="image_size: not for a Siglip2Model"):
        clipft.resize(*tiny_siglip("naflex", tmp_path), image_size=LARGE)
    with pytest.raises(ValueError, match="max_tokens: expected at least the model's 16 tokens"):
        clipft.resize(*tiny_siglip("siglip2", tmp_path), max_tokens=8)
    with pytest.raises(ValueError, match=r"at least 22 tokens, .* this one has 16"):
        clipft.resize(*tiny_siglip("siglip2", tmp_path), max_tokens=32)
    with pytest.raises(ValueError, match="max_tokens: 77 is what every tokenizer"):
        clipft.resize(*tiny_clip(positions=100), max_tokens=77)
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="expected a float model"):
        clipft.resize(clipft.quantize(model), processor, image_size=LARGE)
    with pytest.raises(TypeError, match="expected a CLIPModel"):
        clipft.resize(clipft.add_lora(model, r=2), processor, image_size=LARGE)


def test_chinese_clips_captions_are_cut(tmp_path: Path) -> None:
    """Its BERT has a table of its own, for more tokens than captions in training had."""
    model, processor = tiny_family("chinese_clip")
    with pytest.raises(ValueError, match="max_tokens: expected at most the 24 tokens that this ChineseCLIPModel has"):
        clipft.resize(model, processor, max_tokens=LENGTH + 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clipft.resize(model, processor, max_tokens=8)
    save_model(model, processor, tmp_path)
    saved, its = clipft.load(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.state_dict().items())
    assert tokenize(its, ["a" * 20], family=family_of(saved))["input_ids"].shape == (1, 8)


def test_doctor_looks_at_the_new_size(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for index, caption in enumerate(["red", "x" * 25, "y" * 40, "y" * 23 + "z"]):
        picture(index)[0].save(folder / f"{index}.png")  # 50 x 40
        lines.append(json.dumps({"image": f"{index}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    look = functools.partial(clipft.doctor, str(folder / "pairs.jsonl"), model=str(base))

    def said(**sizes: int) -> dict[str, str]:
        return {finding["check"]: finding["summary"] for finding in look(**sizes)["findings"]}

    assert said()["caption length"].startswith(f"3 captions are longer than {LENGTH} tokens (75 % of 4)")
    found = said(image_size=3 * PATCH, max_tokens=LONG)
    assert found["caption length"].startswith("1 captions are longer than 30 tokens (25 % of 4)")
    assert found["size"] == "4 pictures are smaller than the model's 48 pixels and are enlarged (100 % of 4)"
    assert said()["size"].startswith("all pictures have at least the model's 32")
    assert "1 captions" in said(max_tokens=LONG)["caption length"]
    refused = run("doctor", folder / "pairs.jsonl", "--model", base, "--image-size", 33)
    assert refused.exit_code == 2 and "--image-size: expected a multiple" in " ".join(refused.output.split())
