"""What public functions take for a model: a folder, a name, a pair, a run, or the model with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import captioned, labelled, tiny_clip

import clipft
from clipft.recipes.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_clip()
    clipft.add_head(model, processor, ["red", "green"])
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def forms(folder: Path) -> list[Any]:
    own = clipft.load(folder)
    return [folder, str(folder), own, Run(*own, before={}, after={}, gains={}, folder=folder, history=[])]


def test_pictures_texts_and_classes(folder: Path) -> None:
    model, processor = clipft.load(folder)
    pictures = [row["image"] for row in labelled(3)]
    texts = clipft.embed(model, processor, texts=["red", "a dog"])
    chances = clipft.classify(model, processor, pictures)
    for form in forms(folder):
        assert torch.equal(clipft.embed(form, texts=["red", "a dog"]), texts)
        assert torch.equal(clipft.classify(form, images=pictures), chances)


def test_onnx_folders(exported: tuple[Path, Any]) -> None:
    pictures = [row["image"] for row in labelled(3)]
    clip = clipft.OnnxCLIP(exported[0])
    assert torch.equal(clipft.embed(exported[0], images=pictures), clipft.embed(clip, images=pictures))
    assert torch.equal(clipft.classify(exported[0], images=pictures), clipft.classify(clip, images=pictures))


def test_int8_and_other_layouts(folder: Path, tmp_path: Path) -> None:
    run = forms(folder)[-1]
    reports = [clipft.quantize(form, data=captioned(4)).quantization_report for form in (folder, run)]
    assert reports[0] == reports[1] and reports[0]["image_cosine"]["mean"] > 0.99
    clipft.convert(run, tmp_path / "other", to="hf")
    assert (tmp_path / "other" / "model.safetensors").is_file()


def test_a_processor_that_is_given_takes_the_place_of_the_models_own(folder: Path) -> None:
    _, processor = clipft.load(folder)
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    pictures = [row["image"] for row in labelled(2)]
    assert not torch.equal(clipft.embed(folder, processor, images=pictures), clipft.embed(folder, images=pictures))


def test_errors_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    model, _ = clipft.load(folder)
    with pytest.raises(TypeError, match=r"processor: expected .* got \['a.jpg'\]; what comes after it goes by"):
        clipft.classify(folder, ["a.jpg"])
    with pytest.raises(TypeError, match=r"directory: expected a folder to write into, .*directory="):
        clipft.export_onnx(folder, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"processor: expected .* processor, as clipft\.load gives both"):
        clipft.embed(model, texts=["a"])
    with pytest.raises(ValueError, match=r"processor: expected .* processor, as clipft\.load gives both"):
        clipft.export_onnx(model, directory=tmp_path / "out")
    with pytest.raises(TypeError, match=r"model: expected a folder, .* or \(model, processor\), got CLIPModel"):
        clipft.evaluate(model, labelled(2))
    with pytest.raises(TypeError, match=r"model: expected a CLIPModel, .* got str 'run'; clipft.load gives a model"):
        clipft.freeze("run", "text")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        clipft.embed("./nowhere", texts=["a"])
    assert not list(tmp_path.iterdir())
