"""``frozen="int8"`` in a whole run: trained on codes, scored, merged and saved on the float base."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from rich.console import Console
from safetensors.torch import load_file
from test_resume import Killed
from tiny_clip import save_odd, tiny_clip
from transformers import CLIPModel, TrainerCallback

import clipft

pytest.importorskip("peft")

from peft_models import config

from clipft.models.float_base import check_place
from clipft.models.frozen import FrozenLinear

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "control_data": "none", "frozen": "int8"}


class Counted(TrainerCallback):
    """The int8 layers at each epoch's end."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.layers.append(sum(isinstance(module, FrozenLinear) for module in model.modules()))


def train(model: Any, data: Path, output: Path, **options: Any) -> Any:
    options = QUICK | ({} if "freeze" in options else {"lora_r": 4}) | options
    return clipft.train(model, str(data), output, console=Console(file=io.StringIO()), **options)


def test_a_run_is_trained_in_int8_and_scored_on_the_float_base(base: Path, colours: Path, tmp_path: Path) -> None:
    counted = Counted()
    found = train(str(base), colours, tmp_path / "run", callbacks=[counted], early_stopping_patience=2, wise_ft=True)
    assert counted.layers == [36, 36]
    loaded, merged = (clipft.load(folder)[0].state_dict() for folder in (found.folder, found.folder / "merged"))
    plain = clipft.load(base)[0].state_dict()
    assert all(torch.allclose(loaded[name], merged[name], atol=1e-6) for name in plain)
    moved = [name for name in plain if not torch.equal(plain[name], merged[name])]
    assert len(moved) == 36 and all(name.endswith("weight") for name in moved)
    assert all(torch.equal(merged[name], value) for name, value in found.model.state_dict().items())
    report = json.loads((found.folder / "report.json").read_text())
    assert report["frozen"]["layers"] == report["frozen"]["of"] == 36
    assert report["frozen"]["float_layers"] == {} and 0 < report["frozen"]["largest_error"] < 0.1
    for name in ("report.html", "README.md", "merged/README.md"):
        assert "36 of 36 frozen linear layers computed in int8" in (found.folder / name).read_text()


def test_without_an_adapter_what_is_frozen_stays_as_it_was(base: Path, colours: Path, tmp_path: Path) -> None:
    counted, options = Counted(), {"freeze": "text,vision:2", "early_stopping_patience": 2}
    found = train(str(base), colours, tmp_path / "run", callbacks=[counted], **options)
    assert counted.layers == [24, 24]
    plain, tuned = (CLIPModel.from_pretrained(folder).state_dict() for folder in (base, found.folder))
    assert all(torch.equal(tuned[name], value) for name, value in found.model.state_dict().items())
    stays = ("text_model.", "text_projection.", "vision_model.embeddings.", "vision_model.encoder.layers.0.")
    stays = (*stays, "vision_model.pre_layrnorm.")
    assert all(torch.equal(plain[name], tuned[name]) == name.startswith(stays) for name in plain)
    for checkpoint in (found.folder / "checkpoints").glob("checkpoint-*"):  # is a float model
        saved = clipft.load(checkpoint)[0].state_dict()
        assert all(torch.equal(plain[name], saved[name]) for name in plain if name.startswith(stays))
    for name in ("report.html", "README.md"):
        text = (found.folder / name).read_text()
        assert "24 of 24 frozen linear layers computed in int8 while the rest trained" in text
        assert "it is scored and saved in float" in text


def test_the_demos_model_twice(colours: Path, tmp_path: Path) -> None:
    first = train("demo", colours, tmp_path / "first", freeze="towers", epochs=1)
    second = train(first, colours, tmp_path / "second", freeze="text:1,vision:1", epochs=1)
    start, *tuned = (clipft.load(folder)[0].state_dict() for folder in ("demo", first.folder, second.folder))
    moved = [{name for name in start if not torch.equal(start[name], own[name])} for own in tuned]
    assert moved[0] <= {"logit_scale", "text_projection.weight", "visual_projection.weight"} < moved[1]
    assert all(torch.equal(tuned[1][name], value) for name, value in second.model.state_dict().items())
    assert json.loads((second.folder / "report.json").read_text())["frozen"]["float_layers"] == {}


def test_the_command_says_what_is_int8_and_what_stays_float(base: Path, colours: Path, tmp_path: Path) -> None:
    save_odd(*clipft.load(base), tmp_path / "odd")
    command = ("train", "--data", colours, "--output", tmp_path / "run", "--epochs", 1, "--control-data", "none")
    result = run(*command, "--model", tmp_path / "odd", "--lora-r", 2, "--frozen", "int8")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "frozen: 35 of 36 frozen linear layers computed in int8" in said
    assert "frozen: text_model.encoder.layers.1.mlp.fc1 stays float: int8 would move its outputs by" in said
    result = run(*command, "--model", base, "--frozen", "int8")
    assert result.exit_code == 2 and "--frozen: int8 is for what does not train: expected freeze, or" in result.output
    result = run(*command, "--model", base, "--frozen", "int8", "--freeze", "text:3,vision:3")
    assert result.exit_code == 2 and "--frozen: expected linear layers that do not train" in result.output


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9, "l2_sp": 0.01, "distillation": 1.0, "grad_cache_chunk_size": 4},
        {"hard_negatives": 2, "gradient_checkpointing": True, "lora_targets": ["vision"]},
        {"freeze": "text:1,vision:1", "ema_decay": 0.9, "l2_sp": 0.01, "distillation": 1.0, "grad_cache_chunk_size": 4},
        {"freeze": "vision", "hard_negatives": 2, "gradient_checkpointing": True, "layer_decay": 0.8},
        {"freeze": "vision:2,text:2", "gradual_unfreezing": 0.5},
        {"freeze": "vision:1", "head": "text", "augmentation": "light"},
    ],
    ids=["lora-penalties", "lora-mined", "penalties", "mined", "gradual", "head"],
)
def test_a_killed_run_resumes_to_the_bit(base: Path, colours: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    train(str(base), colours, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(str(base), colours, tmp_path / "killed", callbacks=[Killed()], **options)
    train(str(base), colours, tmp_path / "killed", resume=True, **options)
    file = "model.safetensors" if "freeze" in options else "adapter_model.safetensors"
    one, other = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"frozen \(int8 then, float now\)"):
        train(str(base), colours, tmp_path / "killed", resume=True, **options | {"frozen": "float"})


def test_a_model_without_a_place_or_with_other_weights_is_refused(base: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frozen: int8 expects a model that was loaded from a folder or by name"):
        train(tiny_clip(), colours, tmp_path / "run")
    model, processor = clipft.load(base)
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    with pytest.raises(ValueError, match=rf"as it lies in {base}, this one has other weights"):
        train((model, processor), colours, tmp_path / "run")
    with pytest.raises(ValueError, match="frozen: int8 is for models that are whole on each process, not with fsdp"):
        train(str(base), colours, tmp_path / "run", training_args={"fsdp": True})
    assert train(clipft.load(base), colours, tmp_path / "run", epochs=1).after


def test_an_interrupted_run_leaves_a_float_model(base: Path, colours: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(base)
    with pytest.raises(KeyboardInterrupt):
        train((model, processor), colours, tmp_path / "run", callbacks=[Killed()])
    assert not any(isinstance(module, FrozenLinear) for module in model.modules())
    half, _ = clipft.load(base, dtype=torch.bfloat16)
    check_place(half, compare=True)  # the weights are those that lie there, rounded


class Overwritten(TrainerCallback):
    """Another model in the base's folder, as training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, _ = tiny_clip()
        with torch.no_grad():
            model.text_model.encoder.layers[0].mlp.fc1.weight += 1
        model.save_pretrained(self.folder)


@pytest.mark.parametrize("options", [{"lora_r": 4}, {"freeze": "text"}], ids=["lora", "freeze"])
def test_a_base_that_changes_meanwhile_loses_nothing(
    base: Path, colours: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    shutil.copytree(base, tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"int8 codes were made of, got another; the last whole checkpoint is .*checkpoint-\d+$"
    ) as caught:
        train(str(tmp_path / "base"), colours, tmp_path / "run", callbacks=[Overwritten(tmp_path / "base")], **options)
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / ("model.safetensors" if "freeze" in options else "adapter_model.safetensors")).is_file()


def test_an_adapter_that_changes_its_base_is_refused(base: Path, colours: Path, tmp_path: Path) -> None:
    adapter = config(init_lora_weights="pissa", target_modules=["fc1"])
    with pytest.raises(ValueError, match="peft_config: expected, with frozen int8, an adapter that leaves its base"):
        train(str(base), colours, tmp_path / "run", lora_r=None, peft_config=adapter)
