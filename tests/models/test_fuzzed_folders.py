"""Model folders with damage made at random: what loads holds what its files hold, all else ends in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import fuzz
from PIL import Image
from safetensors.torch import load_file

import clipft

SECONDS = 4.0


def works(loaded: Any) -> None:
    """A picture and a word go through; what weights may hold can overflow, which is told then."""
    model, processor = loaded
    try:
        clipft.embed(model, processor, images=[Image.new("RGB", (40, 50))])
        clipft.embed(model, processor, texts=["a b", "c"])
    except ValueError as error:
        assert "the model gives NaN or Inf" in str(error)


def test_configurations(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS, [".json"])


def test_weights(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model, processor = clipft.load(base)
    clipft.add_head(model, processor, ["red", "blue"])
    model.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)

    def equal(loaded: Any) -> None:
        works(loaded)
        state = loaded[0].state_dict()
        for path in folder.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                assert torch.equal(state[name].nan_to_num(1), tensor.float().nan_to_num(1)), name

    fuzz(folder, lambda: clipft.load(folder), equal, SECONDS, [".safetensors", "index.json"])


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "older"])
def test_pickled_weights(packed: bool, base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        own = dict(list(state.items())[number::2])
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save(own, folder / name, _use_new_zipfile_serialization=packed)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS / 2, [".bin", "index.json"])


def test_sentence_transformers(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(base, folder / "0_CLIPModel")
    kinds = {"0_CLIPModel": "CLIPModel", "1_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "a photo of "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS / 2)


def test_adapters(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    clipft.add_lora(clipft.load(base)[0], r=2).save_pretrained(folder)
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS)


def test_int8(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    model, processor = clipft.load(base)
    clipft.quantize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    fuzz(folder, lambda: clipft.load(folder), works, SECONDS, ["config.json", ".safetensors", "report.json"])
