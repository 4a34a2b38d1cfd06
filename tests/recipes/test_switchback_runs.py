"""``precision="int8"`` in a whole run: layers that train compute in int8 while they do; what is scored and saved is an
ordinary float model."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from rich.console import Console
from safetensors.torch import load_file
from test_resume import Killed
from tiny_clip import save_odd
from transformers import CLIPModel, TrainerCallback

import clipft
from clipft.models.frozen import FrozenLinear
from clipft.models.switchback import SwitchBackLinear
from clipft.recipes.options import TrainOptions
from clipft.recipes.switchback import check_precision
from clipft.training import precision

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "control_data": "none", "precision": "int8"}


class Counted(TrainerCallback):
    """The layers of a kind at each epoch's end, and whether they have made codes."""

    def __init__(self, kind: type = SwitchBackLinear) -> None:
        self.kind = kind
        self.layers: list[int] = []
        self.codes: list[int] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = [module for module in model.modules() if isinstance(module, self.kind)]
        self.layers.append(len(found))
        self.codes.append(sum(getattr(module, "_codes", None) is not None for module in found))


def train(model: Any, data: Path, output: Path, **options: Any) -> Any:
    return clipft.train(model, str(data), output, console=Console(file=io.StringIO()), **QUICK | options)


def test_a_run_trains_in_int8_and_leaves_a_float_model(base: Path, colours: Path, tmp_path: Path) -> None:
    counted = Counted()
    found = train(str(base), colours, tmp_path / "run", callbacks=[counted], early_stopping_patience=2)
    assert counted.layers == counted.codes == [36, 36]
    plain, tuned = (CLIPModel.from_pretrained(folder) for folder in (base, found.folder))
    state = tuned.state_dict()
    assert state.keys() == plain.state_dict().keys() == found.model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in found.model.state_dict().items())
    assert {type(module) for module in found.model.modules()} == {type(module) for module in plain.modules()}
    assert not any(torch.equal(value, state[name]) for name, value in plain.named_parameters())
    checkpoints = list((found.folder / "checkpoints").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert load_file(checkpoint / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    report = json.loads((found.folder / "report.json").read_text())
    assert report["precision"]["layers"] == report["precision"]["of"] == 36
    assert report["precision"]["float_layers"] == {} and 0 < report["precision"]["largest_error"] < 0.1
    for name in ("report.html", "README.md"):
        assert "36 of 36 linear layers that train computed forward and" in (found.folder / name).read_text()


def test_losses_are_near_those_of_float_but_others(base: Path, colours: Path, tmp_path: Path) -> None:
    found = [train(str(base), colours, tmp_path / kind, precision=kind, epochs=4) for kind in ("int8", "fp32")]
    own, plain = ([entry["loss"] for entry in run.history if "loss" in entry] for run in found)
    assert len(own) == len(plain) > 1 and own != plain
    assert own == pytest.approx(plain, rel=0.05)
    assert "precision" not in json.loads((tmp_path / "fp32" / "report.json").read_text())


def test_with_a_frozen_part_in_int8(base: Path, colours: Path, tmp_path: Path) -> None:
    counted = [Counted(), Counted(FrozenLinear)]
    options: dict[str, Any] = {"freeze": "vision:2", "frozen": "int8", "augmentation": "light"}
    found = train(str(base), colours, tmp_path / "run", callbacks=counted, **options)
    assert [own.layers for own in counted] == [[30, 30], [6, 6]]
    plain, tuned = (CLIPModel.from_pretrained(folder).state_dict() for folder in (base, found.folder))
    stays = ("vision_model.embeddings.", "vision_model.encoder.layers.0.", "vision_model.pre_layrnorm.")
    assert all(torch.equal(plain[name], tuned[name]) == name.startswith(stays) for name in plain)
    report = json.loads((found.folder / "report.json").read_text())
    assert (report["precision"]["layers"], report["frozen"]["layers"]) == (30, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9, "l2_sp": 0.01, "distillation": 1.0, "grad_cache_chunk_size": 4},
        {"hard_negatives": 2, "gradient_checkpointing": True, "layer_decay": 0.8},
        {"gradual_unfreezing": 0.5, "training_args": {"gradient_accumulation_steps": 2}},
        {"freeze": "text,vision:1", "head": "text", "frozen": "int8", "training_args": {"optim": "sgd"}, "lr": 0.1},
    ],
    ids=["penalties", "mined", "gradual", "head"],
)
def test_a_killed_run_resumes_to_the_bit(base: Path, colours: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    train(str(base), colours, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(str(base), colours, tmp_path / "killed", callbacks=[Killed()], **options)
    train(str(base), colours, tmp_path / "killed", resume=True, **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match=r"precision \(int8 then, fp32 now\)"):
        train(str(base), colours, tmp_path / "killed", resume=True, **options | {"precision": "fp32"})


def test_weights_of_16_bits_train_in_float32(base: Path, colours: Path, tmp_path: Path) -> None:
    counted = Counted()
    half = clipft.load(base, dtype=torch.bfloat16)
    found = train(half, colours, tmp_path / "run", epochs=1, callbacks=[counted])
    assert counted.codes == [36] and found.model.dtype == torch.float32


def test_a_killed_run_leaves_float_layers(base: Path, colours: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(base)
    with pytest.raises(KeyboardInterrupt):
        train((model, processor), colours, tmp_path / "run", callbacks=[Killed()])
    assert not any(isinstance(module, SwitchBackLinear) for module in model.modules())


def test_a_compiled_run(base: Path, colours: Path, tmp_path: Path) -> None:
    counted, options = Counted(), {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 1}
    train(str(base), colours, tmp_path / "run", freeze="text,vision:1", callbacks=[counted], training_args=options)
    assert counted.codes == [6]


# ---- what it says ----


def test_the_command_says_what_is_int8_and_what_stays_float(base: Path, colours: Path, tmp_path: Path) -> None:
    save_odd(*clipft.load(base), tmp_path / "odd")
    command = ("train", "--data", colours, "--output", tmp_path / "run", "--epochs", 1, "--control-data", "none")
    result = run(*command, "--model", tmp_path / "odd", "--precision", "int8")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "precision: 35 of 36 linear layers that train computed forward and their input's gradient in int8" in said
    assert "precision: text_model.encoder.layers.1.mlp.fc1 stays float: int8 would move its outputs by" in said
    counted = Counted()
    train(str(tmp_path / "odd"), colours, tmp_path / "again", epochs=1, callbacks=[counted])
    assert counted.layers == [35]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora-r", 4), "beneath an adapter none do: expected frozen='int8' (--frozen int8)"),
        (("--freeze", "towers"), "freeze 'towers' leaves none: expected frozen='int8' (--frozen int8)"),
        (("--set", "bf16=true"), "int8 is float32 outside of int8 products, not with bf16"),
    ],
    ids=["adapter", "freeze", "bf16"],
)
def test_what_does_not_go_with_it_is_one_line(
    options: tuple[Any, ...], words: str, base: Path, colours: Path, tmp_path: Path
) -> None:
    command = ("train", "--data", colours, "--model", base, "--output", tmp_path / "run", "--precision", "int8")
    result = run(*command, *options)
    line = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and line.startswith("error: --precision: int8 is ") and words in line
    assert line.endswith("(clipft help options-together)")


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"fsdp": True}, "int8 is for models that are whole on each process, not with fsdp"),
        ({"deepspeed": "zero.json"}, "int8 is for models that are whole on each process, not with deepspeed"),
        ({"device": torch.device("cuda", 0)}, "int8 is for a model on the CPU, got cuda"),
    ],
)
def test_shards_and_gpus_are_refused(about: dict[str, Any], words: str) -> None:
    plain = {"fsdp": False, "deepspeed": None, "bf16": False, "fp16": False, "device": torch.device("cpu")}
    options = TrainOptions(precision="int8")
    check_precision(options, SimpleNamespace(**plain), adapted=False)
    with pytest.raises(ValueError, match=f"precision: {words}"):
        check_precision(options, SimpleNamespace(**plain | about), adapted=False)
    check_precision(TrainOptions(), SimpleNamespace(**plain | about), adapted=True)


class Broken(TrainerCallback):
    """A weight that is no number, after the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.vision_model.encoder.layers[2].mlp.fc2.weight[1, 1] = float("inf")


def test_weights_that_are_not_finite_are_named(base: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: vision_model.encoder.layers.2.mlp.fc2: .*weight must be finite"):
        train(str(base), colours, tmp_path / "run", callbacks=[Broken()])


def test_a_machine_that_gains_little_says_so(
    base: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    assert 0.01 < precision.int8_speedup() < 100
    for gain, warned in ((0.8, True), (2.0, False)):
        monkeypatch.setattr("clipft.training.precision.int8_speedup", lambda gain=gain: gain)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "clipft"):
            train(str(base), colours, tmp_path / str(gain), epochs=1)
        assert ("precision: int8 takes 1.25 of float32's time on this CPU" in caplog.text) == warned
