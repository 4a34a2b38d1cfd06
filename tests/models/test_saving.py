"""Models saved: into folders that had another set, found as a mix, edited by hand; adapters and their bases."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from tiny_clip import captioned, tiny_clip

import clipft
from clipft.files import note_changes, replace_set
from clipft.inference.vectors import Description, VectorFile
from clipft.models.bases import digest_of_base
from clipft.models.formats import MODEL_MANIFEST, ONNX_INFO, ONNX_MODELS
from clipft.models.loading import load
from clipft.models.saving import save_model

V0_1 = Path(__file__).parents[1] / "data" / "v0_1"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---- folders that had another set ----


def same(model: Any, other: Any) -> bool:
    states = model.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def adapter(base: Path, folder: Path) -> None:
    model, processor = clipft.load(base)
    save_model(clipft.add_lora(model, r=2), processor, folder)


def test_a_full_run_after_a_lora_run(base: Path, colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out, quick = tmp_path / "out", {"epochs": 1, "batch_size": 8, "control_data": "none"}
    clipft.train(str(base), str(colours), out, lora_r=2, **quick)
    assert {"adapter_config.json", "merged/model.safetensors", "merged/README.md", "report.json"} <= names(out)
    assert "# out" in (out / "README.md").read_text()
    (out / "mine.txt").write_text("stays")
    (out / MODEL_MANIFEST).unlink()  # as of 0.1
    done = clipft.train(str(base), str(colours), out, lr=1e-3, **quick)
    left = names(out)
    assert "mine.txt" in left and not {"adapter_config.json", "adapter_model.safetensors"} & left
    assert "merged/model.safetensors" not in left and "merged/config.json" not in left
    assert same(clipft.load(out)[0], done.model)


def test_a_merged_model_into_the_folder_of_an_adapter(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter(base, tmp_path / "one")
    adapter(base, tmp_path / "two")
    assert run("merge", "--model", tmp_path / "one", "--output", tmp_path / "two").exit_code == 0
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names(tmp_path / "two")
    assert same(clipft.load(tmp_path / "two")[0], clipft.load(tmp_path / "one")[0])


def test_retrained_after_int8_and_int8_after_that(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    save_model(clipft.quantize(model), processor, tmp_path)
    other = tiny_clip(1)[0]
    save_model(other, processor, tmp_path)
    assert same(clipft.load(tmp_path)[0], other) and "clipft_int8.safetensors" not in names(tmp_path)
    save_model(clipft.quantize(other), processor, tmp_path / "int8")
    clipft.quantize(model).save_pretrained(tmp_path / "int8")  # alone: the processor stays
    assert same(clipft.load(tmp_path / "int8")[0], clipft.quantize(model))


def test_a_processor_of_an_earlier_model_does_not_decide_what_loads(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "size": 48}')
    (tmp_path / "added_tokens.json").write_text('{"new": 514}')
    model, processor = tiny_clip()
    save_model(model, processor, tmp_path)
    assert not {"preprocessor_config.json", "added_tokens.json"} & names(tmp_path)
    assert clipft.load(tmp_path)[1].image_processor.crop_size == processor.image_processor.crop_size


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as a word each."""

    def write(model: Any, folder: Path, kind: str, *rest: Any) -> None:
        for side in ("image", "text"):
            (folder / f"{side}_encoder{kind}.onnx").write_text(f"{model.name_or_path} {side}{kind}")

    monkeypatch.setattr("clipft.deploy.export._require_onnx", lambda: None)
    monkeypatch.setattr("clipft.deploy.export._write_encoders", write)
    monkeypatch.setattr("clipft.deploy.export._compare", lambda *rest: {})


@pytest.mark.usefixtures("encoders")
def test_an_export_without_int8_after_one_with_it(tmp_path: Path) -> None:
    folder, rows = tmp_path / "onnx", captioned(4)
    clipft.export_onnx(*tiny_clip(), folder, data=rows, int8=True)
    first = names(folder)
    (folder / "mine").write_text("")
    clipft.export_onnx(*tiny_clip(1), folder, data=rows)
    assert names(folder) == first - {"image_encoder.int8.onnx", "text_encoder.int8.onnx"} | {"mine"}
    save_model(*tiny_clip(2), folder)  # a run into an export's folder
    assert not list(folder.glob("*.onnx")) and ONNX_INFO not in names(folder)
    clipft.export_onnx(*tiny_clip(2), folder, data=rows)  # and an export into a model's
    assert same(clipft.load(folder)[0], tiny_clip(2)[0]) and (folder / "image_encoder.onnx").is_file()


# ---- mixes ----


def encoder_set(folder: Path, doc: str) -> None:
    """As an export leaves it; encoders with another ``doc`` are other files."""
    onnx = pytest.importorskip("onnx")
    with replace_set(folder, ONNX_INFO, obsolete=ONNX_MODELS) as staging:
        shutil.copytree(V0_1 / "onnx", staging, dirs_exist_ok=True)
        for side in ("image", "text"):
            model = onnx.load(staging / f"{side}_encoder.onnx")
            model.doc_string = doc
            for kind in ("", ".int8"):
                onnx.save(model, staging / f"{side}_encoder{kind}.onnx")


@pytest.mark.parametrize("name", ["image_encoder.onnx", "text_encoder.int8.onnx", "processor_config.json"])
def test_encoders_of_two_models(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for doc in ("one", "other"):
        encoder_set(tmp_path / doc, doc)
    folder = tmp_path / "one"
    assert clipft.OnnxCLIP(folder, int8="int8" in name)
    if name.endswith("json"):
        (folder / name).write_text((folder / name).read_text() + " ")
    else:
        shutil.copy(tmp_path / "other" / name, folder)
    with pytest.raises(
        ValueError, match=rf"written together: {name} not as clipft_onnx.json knows it, with which .*onnx"
    ):
        clipft.OnnxCLIP(folder, int8="int8" in name)
    info = json.loads((folder / ONNX_INFO).read_text())
    del info["files"]
    (folder / ONNX_INFO).write_text(json.dumps(info))
    assert clipft.OnnxCLIP(folder, int8="int8" in name)  # as of 0.1


def test_int8_weights_of_another_model(tmp_path: Path) -> None:
    for seed in range(2):
        model, processor = tiny_clip(seed)
        save_model(clipft.quantize(model), processor, tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "clipft_int8.safetensors", tmp_path / "0")
    with pytest.raises(
        ValueError, match=r"clipft_int8.safetensors not as clipft_files.json knows it, with which config.json"
    ):
        clipft.load(tmp_path / "0")
    (tmp_path / "0" / MODEL_MANIFEST).unlink()
    clipft.load(tmp_path / "0")


def test_vectors_and_ids_of_two_runs(tmp_path: Path) -> None:
    for number in range(2):
        what = VectorFile(["a"], np.full((1, 2), number, np.float32), Description("images", "m", f"{number}", "s"))
        what.write(tmp_path / f"{number}.npy")
    shutil.copy(tmp_path / "1.npy", tmp_path / "0.npy")
    with pytest.raises(ValueError, match=r"0.npy not as 0.npy.json knows it"):
        VectorFile.read(tmp_path / "0.npy")
    beside = json.loads((tmp_path / "0.npy.json").read_text())
    del beside["files"]
    (tmp_path / "0.npy.json").write_text(json.dumps(beside))
    assert VectorFile.read(tmp_path / "0.npy").vectors.tolist() == [[1, 1]]  # as of 0.1


def test_an_adapter_and_other_weights_of_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model, processor = tiny_clip()
    save_model(model, processor, base)
    adapter(base, folder)
    merged = clipft.load(folder)[0]
    assert clipft.load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    model.save_pretrained(base, max_shard_size="100KB")  # the same weights, in other files
    (base / "model.safetensors").unlink()
    assert same(clipft.load(folder)[0], merged)
    for file in base.glob("model*"):
        file.unlink()
    save_model(tiny_clip(1)[0], processor, base)
    for options in ({}, {"dtype": torch.bfloat16}):
        with pytest.raises(
            ValueError, match=r"clipft_files.json: knows the base model .* trained on; '.*base' has other"
        ):
            clipft.load(folder, **options)
    plain = peft.PeftModel.from_pretrained(clipft.load(base)[0], folder)
    plain.save_pretrained(tmp_path / "plain")
    assert load(tmp_path / "plain")
    with pytest.raises(ValueError, match="output: expected a folder other than that of the base model"):
        save_model(clipft.add_lora(clipft.load(base)[0], r=2), processor, base)
    refused = run("train", "--model", base, "--data", base, "--output", base, "--lora-r", 2)
    assert refused.exit_code == 2 and "--output: expected a folder other than that of the base" in refused.output


def test_biases_that_were_trained_are_no_part_of_the_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_model(*tiny_clip(), tmp_path / "base")
    model, processor = clipft.load(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["visual_projection"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.add_(0.01 * weight.requires_grad)
    save_model(adapted, processor, tmp_path / "run")
    assert same(clipft.load(tmp_path / "run")[0], adapted.merge_and_unload())


def test_an_adapter_finds_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    home, moved = tmp_path / "home", tmp_path / "moved"
    save_model(*tiny_clip(), home / "base")
    monkeypatch.chdir(home)
    adapter(Path("base"), Path("run"))
    merged = clipft.load("run")[0]
    monkeypatch.chdir(tmp_path)  # another working folder
    assert same(clipft.load(home / "run")[0], merged)
    shutil.move(home / "run", tmp_path / "run")  # the adapter alone
    assert same(clipft.load(tmp_path / "run")[0], merged)
    shutil.move(tmp_path / "run", home / "run")
    shutil.copytree(home, moved)  # both, and the old place has another model now
    save_model(tiny_clip(1)[0], tiny_clip()[1], home / "base")
    assert same(clipft.load(moved / "run")[0], merged)
    shutil.rmtree(moved / "base")
    with pytest.raises(ValueError, match="has other weights: put"):
        clipft.load(moved / "run")
    adapter(Path("demo"), tmp_path / "of-demo")
    assert json.loads((tmp_path / "of-demo" / "adapter_config.json").read_text())["base_model_name_or_path"] == "demo"
    assert clipft.load(tmp_path / "of-demo")


def test_an_adapter_that_peft_saved_finds_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    save_model(*tiny_clip(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    clipft.add_lora(clipft.load("base")[0], r=2).save_pretrained("run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert clipft.load("../run")
    clipft.add_lora(clipft.load("demo")[0], r=2).save_pretrained("of-demo")
    config = json.loads(Path("of-demo/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/another/machine/site-packages/clipft/demo/model"
    Path("of-demo/adapter_config.json").write_text(json.dumps(config))
    assert clipft.load("of-demo")


def test_a_base_is_known_with_and_without_an_adapter() -> None:
    pytest.importorskip("peft")
    model = tiny_clip()[0]
    expected = digest_of_base(model)
    assert digest_of_base(clipft.add_lora(tiny_clip()[0], r=2)) == expected != digest_of_base(tiny_clip(1)[0])
    assert digest_of_base(tiny_clip()[0].to(torch.bfloat16)) == digest_of_base(
        tiny_clip()[0].to(torch.bfloat16).float()
    )


def test_a_plain_folder_loads_edited_or_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(*tiny_clip(), tmp_path)
    with caplog.at_level(logging.WARNING, "clipft"):
        clipft.load(tmp_path)
        assert not caplog.records
        tiny_clip(1)[0].save_pretrained(tmp_path)
        assert same(clipft.load(tmp_path)[0], tiny_clip(1)[0])
    (record,) = caplog.records
    assert "model.safetensors changed since clipft_files.json was written" in record.getMessage()
    (tmp_path / MODEL_MANIFEST).write_text('{"files": {"../x": [1, "0"]}}')
    note_changes(tmp_path, MODEL_MANIFEST)
