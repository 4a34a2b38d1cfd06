"""Model folders of strangers: nothing in them runs, and what is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipft
from clipft.data.classes import read_class_names


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def edit(path: Path, **change: Any) -> None:
    config = json.loads(path.read_text())
    for name, value in change.items():
        part, _, key = name.rpartition("__")
        (config[part] if part else config)[key] = value
    path.write_text(json.dumps(config))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        clipft.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_config__hidden_size": 1 << 20}, "shapes that config.json asks for"),
        ({"text_config__hidden_size": 1 << 31}, "hidden_size to be a number from 1 to"),
        ({"text_config__num_hidden_layers": 10**6}, "asks for 1000000 layers"),
        ({"text_config__num_hidden_layers": 4}, "missing: text_model.encoder.layers.3"),
        ({"text_config__num_attention_heads": -2}, "num_attention_heads to be a number from 1 to .*, found -2"),
        ({"vision_config__patch_size": 0}, "patch_size to be a number from 1 to .*, found 0"),
        ({"text_config__eos_token_id": 7}, "all texts would have one embedding"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "no kernel of the hub"),
        ({"transformers_weights": "other.safetensors"}, "expected no transformers_weights"),
        ({"quantization_config": {"quant_method": "fp8"}}, "found 'fp8'"),
        ({"clipft_heads": [{"name": "label"}]}, "clipft_heads to be a list of heads"),
        ({"clipft_heads": [{"name": "label", "classes": ["a"]}]}, "missing: heads.0.weight"),
    ],
)
def test_a_configuration_that_lies(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **change)
    refused(folder, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.clear() or tensors.update(x=torch.zeros(2)), "are missing: .* and 1.. more"),
        (
            lambda tensors: tensors.update({"visual_projection.weight": torch.zeros(3, 3)}),
            r"visual_projection.weight \[3",
        ),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "found others too: other"),
        (lambda tensors: tensors.update(logit_scale=torch.tensor(1)), "float type, found logit_scale I64"),
    ],
)
def test_weights_that_are_not_whole(folder: Path, change: Callable[..., Any], message: str) -> None:
    weights(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", {"dtype": "int8"}),
        ("config.json", {"text_config__hidden_act": "nothing"}),
        ("processor_config.json", {"image_processor": 3}),
        ("processor_config.json", {"image_processor__size": {"height": -1, "width": 5}}),
        ("processor_config.json", {"image_processor__image_mean": "x"}),
        ("processor_config.json", {"image_processor__size": {"shortest_edge": 8000}}),
        ("tokenizer_config.json", {"unk_token": 0.5}),
        ("tokenizer_config.json", {"model_max_length": "many"}),
        ("tokenizer.json", {"model": {"type": "None"}}),
    ],
)
def test_the_file_at_fault_is_named(folder: Path, name: str, change: dict[str, Any]) -> None:
    edit(folder / name, **change)
    refused(folder, f"^{folder}/.*{name}")
    (folder / name).write_text("{")
    refused(folder, f"^{folder / name}: expected a JSON object; the file is damaged")


def test_an_index_and_its_files(base: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(base)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    described = json.loads(index.read_text())
    name, file = next(iter(described["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": described["weight_map"]}))
    refused(tmp_path, f"^{index}: expected metadata to be an object")
    index.write_text(json.dumps(described))
    tensors = load_file(tmp_path / file)
    save_file({"x" if key == name else key: own for key, own in tensors.items()}, tmp_path / file, {"format": "pt"})
    refused(tmp_path, f"^{tmp_path / file}: expected {name} in it, as model.safetensors.index.json says")
    save_file(tensors | {"x": tensors[name].clone()}, tmp_path / file, {"format": "pt"})
    refused(tmp_path, f"^{tmp_path / file}: expected only the weights .* others too: x")
    save_file(tensors | {name: tensors[name].int()}, tmp_path / file, {"format": "pt"})
    refused(tmp_path, f"^{tmp_path / file}: expected weights of a float type, found {name} I32")


def test_what_older_versions_saved_loads(folder: Path) -> None:
    ids = torch.arange(24).view(1, -1)
    weights(
        folder,
        lambda tensors: tensors.update({"text_model.embeddings.position_ids": ids, "logit_bias": torch.zeros(1)}),
    )
    assert clipft.load(folder)[0].config.projection_dim == 16


def test_files_that_are_none(folder: Path) -> None:
    good = (folder / "model.safetensors").read_bytes()
    for data in (good[:-100], b""):
        (folder / "model.safetensors").write_bytes(data)
        refused(folder, "damaged or was cut")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "../model.safetensors"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        refused(folder, "safetensors files in its own folder")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(good)
    (folder / "config.json").write_text('{"a":' * 100_000)
    refused(folder, "config.json: expected a JSON object")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "a pipe or a device")


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, "expected the model's tokenizer, tokenizer.json or vocab.json and merges.txt, which is missing")


def test_code_of_a_folder_never_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass P: pass\n")
    config = json.loads((folder / "processor_config.json").read_text())
    auto = {"AutoImageProcessor": "own.P"}
    config["image_processor"] |= {"image_processor_type": "Other", "auto_map": auto}
    (folder / "processor_config.json").write_text(json.dumps(config | {"auto_map": auto}))
    refused(folder, "code of its own folder")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="trust_remote_code"):
        clipft.load(folder, trust_remote_code=True)


def test_captions_are_cut_at_the_models_positions(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for stated, cut in ((12, 12), (77, 24), (10**30, 24)):
        edit(folder / "tokenizer_config.json", model_max_length=stated)
        assert clipft.load(folder)[1].tokenizer.model_max_length == cut
    assert [line for line in caplog.messages if "captions are cut at 12" in line]


def test_adapters_of_strangers(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    clipft.add_lora(clipft.load(base)[0], r=2).save_pretrained(adapter)
    good = (adapter / "adapter_config.json").read_text()
    edit(adapter / "adapter_config.json", target_modules=r".*encoder.*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)")
    clipft.load(adapter)
    for change, message in (
        ({"target_modules": r"(([a-z_.0-9]+)+)+X"}, "target_modules"),
        ({"base_model_name_or_path": str(adapter)}, "leads back to"),
        ({"r": 10**9}, "asks for rank 1000000000"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "imports a module"),
        ({"lora_alpha": float("nan")}, "lora_alpha to be a number above 0"),
        ({"base_model_name_or_path": "9" * 5000}, "to name the base model"),
        ({"base_model_name_or_path": "x\ud800"}, "to name the base model"),
        ({"alora_invocation_tokens": [1]}, "expected no alora_invocation_tokens"),
        ({"monteclora_config": {}}, "expected no monteclora_config"),
        ({"init_lora_weights": "pissa_niter_999999999"}, "expected at most 64 iterations"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}},
            "expected at most 64 iterations",
        ),
        ({"task_type": "24"}, "adapter_config.json.*Invalid task type"),
    ):
        (adapter / "adapter_config.json").write_text(good)
        edit(adapter / "adapter_config.json", **change)
        refused(adapter, message)


def test_an_int8_folder_that_lies(base: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(base)
    clipft.quantize(model).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "clipft_int8.safetensors"
    good = load_file(path)
    layer = next(name for name in good if name.endswith("qkv_proj.weight_int8")).removesuffix("weight_int8")
    for name, change, message in (
        ("bias", torch.Tensor.long, "bias in float32, found int64"),
        ("weight_scale", torch.Tensor.half, "weight_scale in float32, found float16"),
        ("weight_scale", lambda scale: scale * float("nan"), "weight_scale, found NaN"),
    ):
        save_file(good | {layer + name: change(good[layer + name])}, path, metadata={"format": "pt"})
        refused(tmp_path, message)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"^{tmp_path}/config.json: of a float model, whose model.safetensors is missing")


def test_the_home_of_nobody_is_no_folder() -> None:
    for call in (clipft.load, clipft.load_pairs, clipft.OnnxCLIP, read_class_names):
        with pytest.raises((ValueError, OSError), match="no-such-user"):
            call("~no-such-user-here/x")
