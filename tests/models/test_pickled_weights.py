"""Weights that were pickled, as older versions of transformers and peft did: read as those in safetensors are."""

from __future__ import annotations

import _codecs
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import Runs
from safetensors.torch import load_file
from torch import Tensor
from torch._utils import _rebuild_device_tensor_from_cpu_tensor as _rebuild

import clipft

State = dict[str, Any]


@pytest.fixture
def state(base: Path) -> State:
    return dict(load_file(base / "model.safetensors"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    found = Path(shutil.copytree(base, tmp_path / "model"))
    (found / "model.safetensors").unlink()
    return found


def refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        clipft.load(folder)
    assert str(caught.value).startswith(f"{folder / name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "older"])
def test_a_pickle_loads_as_safetensors_do(packed: bool, base: Path, folder: Path, state: State) -> None:
    ids = {"text_model.embeddings.position_ids": torch.arange(24)[None]}  # which older versions saved
    torch.save(state | ids, folder / "pytorch_model.bin", _use_new_zipfile_serialization=packed)
    model, _ = clipft.load(folder)
    expected, _ = clipft.load(base)
    assert type(model) is type(expected) and not model.training and model.name_or_path == str(folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    half, _ = clipft.load(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"
    model.save_pretrained(folder)  # beside the pickle, which is not looked at then
    (folder / "pytorch_model.bin").write_bytes(b"cut")
    assert torch.equal(clipft.load(folder)[0].logit_scale, expected.logit_scale)


def test_shards(base: Path, folder: Path, state: State) -> None:
    parts = [dict(list(state.items())[number::2]) for number in range(2)]
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for part, name in zip(parts, names, strict=True):
        torch.save(part, folder / name)
    weight_map = {key: name for part, name in zip(parts, names, strict=True) for key in part}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert torch.equal(clipft.load(folder)[0].text_projection.weight, state["text_projection.weight"])
    lie = weight_map | {"logit_scale": names[1 - names.index(weight_map["logit_scale"])]}
    index.write_text(json.dumps({"metadata": {}, "weight_map": lie}))
    refused(folder, lie["logit_scale"], "expected logit_scale in it, as pytorch_model.bin.index.json says")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"logit_scale": "model.safetensors"}}))
    refused(folder, index.name, r"names of \.bin files in its own folder, found 'model\.safetensors'")


def test_a_name_of_the_hub(folder: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.save(state, folder / "pytorch_model.bin")
    repo = tmp_path / "hub" / "models--org--old"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    model, _ = clipft.load("org/old")
    assert model.name_or_path == "org/old" and torch.equal(model.logit_scale, state["logit_scale"])


def test_an_adapter_of_an_older_peft(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = tmp_path / "adapter"
    model = clipft.add_lora(clipft.load(base)[0], r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(adapter)
    expected = peft.PeftModel.from_pretrained(clipft.load(base)[0], adapter).merge_and_unload().state_dict()
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    merged = clipft.load(adapter)[0].state_dict()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in expected.items())
    torch.save({"a": Runs(print, "ran")}, adapter / "adapter_model.bin")
    refused(adapter, "adapter_model.bin", "asks to run print")


def views(state: State) -> State:
    """The first layer's matrices as parts of one, the second's twice, the third's turned."""
    names = [name for name in state if name.endswith("q_proj.weight") and name.startswith("vision")]
    whole = torch.stack([state[names[0]], state[names[0]] + 1])
    changed = {names[0]: whole[0], names[0].replace("q_proj", "k_proj"): whole[1]}
    changed |= {names[1].replace("q_proj", "k_proj"): state[names[1]]}
    return state | changed | {names[2]: state[names[2]].t().contiguous().t()}


def test_tensors_get_memory_of_their_own(folder: Path, state: State) -> None:
    torch.save(views(state), folder / "pytorch_model.bin")
    model, _ = clipft.load(folder)
    tensors: dict[str, Tensor] = model.state_dict()
    for name, tensor in views(state).items():
        assert torch.equal(tensors[name], tensor) and tensors[name].is_contiguous(), name
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("logit_scale"), "config.json asks for are missing: logit_scale"),
        (lambda state: state.update(other=torch.zeros(2)), "found others too: other"),
        (lambda state: state.update(logit_scale=torch.tensor(1)), "float type, found logit_scale INT64"),
        (lambda state: state.update(logit_scale=torch.zeros(3)), r"found logit_scale \[3\] in place of \[\]"),
        (lambda state: state.update(logit_scale=torch.zeros(1).expand(10**9)), "whole tensors .*: logit_scale"),
        (
            lambda state: state.update(dict.fromkeys(map(str, range(3000)), state["text_projection.weight"])),
            r"numbers of their own, found \d+ bytes",
        ),
        (lambda state: state.update(logit_scale=1.0), "whole tensors .*: logit_scale"),
        (lambda state: state.update(a=Runs(print, "ran")), "asks to run print, which clipft does not"),
        (lambda state: state.update(a=Runs(bytearray, 1 << 30)), "found a bytearray"),
        (lambda state: state.update(a=Runs(_codecs.encode, b"ab", "hex")), "found the codec hex to encode"),
        (lambda state: state.update(a=Runs(_codecs.encode, "a" * 10**6, "latin1")), "found a long string to encode"),
        (lambda state: state.update(a=Runs(_rebuild, torch.ones(1), torch.float64, "cpu", False)), "found a _rebuild"),
        (lambda state: state.clear(), "expected a state dict"),
    ],
)
def test_what_is_wrong_is_said(
    change: Callable[[State], Any], message: str, folder: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    change(state)
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", message)
    assert "ran" not in capsys.readouterr().out


def test_numbers_of_numpy_beside_the_weights(folder: Path, state: State) -> None:
    extra = {str(number): torch.zeros(1) for number in range(500)}  # storages with keys that are names of codecs: 437
    torch.save({"state_dict": state, "best": np.float64(0.5), "extra": extra}, folder / "pytorch_model.bin")
    assert torch.equal(clipft.load(folder)[0].logit_scale, state["logit_scale"])


def test_members_are_not_compressed(folder: Path, state: State) -> None:
    torch.save(state, folder / "good.bin")
    with (
        zipfile.ZipFile(folder / "good.bin") as good,
        zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    refused(folder, "pytorch_model.bin", "its members are compressed")


def test_a_pickle_is_replaced_with_its_model(base: Path, folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    clipft.convert(str(base), folder, to="hf")
    assert not list(folder.glob("*.bin")) and (folder / "model.safetensors").is_file()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder of its own for an int8 model, found pytorch_model\.bin in it"):
        clipft.quantize(clipft.load(base)[0]).save_pretrained(folder)
