"""Weights that are stored in 16 bits: what trains is float32, averages and merges are, what is saved says its dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_clip import captioned, tiny_clip, tiny_model
from tiny_trainer import trainer_of
from torch import Tensor, nn

import clipft
from clipft.training.regularizers import StartingPoint
from clipft.training.schedules import WeightAverage

HALVES = [torch.float16, torch.bfloat16]


def half_clip(dtype: torch.dtype) -> Any:
    model, processor = tiny_clip()
    return model.to(dtype), processor


def saved(folder: Path) -> tuple[str, set[torch.dtype]]:
    """What config.json says, and what the weights are."""
    weights = load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text())["dtype"], {tensor.dtype for tensor in weights.values()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_trains_is_float32(dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = half_clip(dtype)
    options = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_steps": 1, "save_strategy": "steps"}
    before = {name: p.detach().float().clone() for name, p in loaded[0].named_parameters()}
    trainer = trainer_of(tmp_path, captioned(8), loaded=loaded, **options)
    assert str(dtype).removeprefix("torch.") in caplog.text
    trainer.train()
    moves = {name: (p.detach() - before[name]).abs() for name, p in trainer.model.named_parameters()}
    moved = sum(int((move > 0).sum()) for move in moves.values()) / sum(move.numel() for move in moves.values())
    assert moved > 0.5 and max(float(move.max()) for move in moves.values()) < 1e-5
    trainer.save_model(str(tmp_path))
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert saved(folder) == ("float32", {torch.float32})


def test_a_part_that_trains_takes_the_model_along(tmp_path: Path) -> None:
    loaded = half_clip(torch.float16)
    clipft.freeze(loaded[0], "text")
    assert trainer_of(tmp_path, captioned(8), loaded=loaded).model.text_model.dtype == torch.float32
    loaded = half_clip(torch.float32)
    loaded[0].vision_model.half().requires_grad_(False)
    model = trainer_of(tmp_path, captioned(8), loaded=loaded).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # one config.json cannot name two


def test_a_frozen_base_stays_as_it_is_under_an_adapter(tmp_path: Path) -> None:
    model, processor = half_clip(torch.bfloat16)
    trainer = trainer_of(tmp_path, captioned(8), loaded=(clipft.add_lora(model, r=2), processor), max_steps=1)
    trainer.train()
    kinds = {("lora_" in name, p.dtype) for name, p in trainer.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_16_bits_leaves_the_weights(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, captioned(8), captioned(8), **{name: True})
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    rounded = trainer.evaluate()
    after = trainer.model.state_dict()
    assert all(after[key].dtype == own.dtype and torch.equal(after[key], own) for key, own in before.items())
    assert rounded["eval_loss"] != trainer_of(tmp_path, captioned(8), captioned(8)).evaluate()["eval_loss"]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_averages_move_on_in_16_bits(dtype: torch.dtype) -> None:
    class State:
        global_step = 0

    layer = nn.Linear(4, 4).to(dtype)
    nn.init.zeros_(layer.weight)
    average = WeightAverage(lambda: layer, 0.999)
    average.on_train_begin(None, State, None)
    nn.init.ones_(layer.weight)
    for _ in range(3):
        for State.global_step in range(20000, 21000):
            average.on_step_end(None, State, None)
        with average.in_use():  # rounds what the model holds, not the average
            assert layer.weight.dtype == dtype and layer.weight.max() < 1.0
        assert (layer.weight == 1.0).all()
    assert average.average["weight"].sub(1 - 0.999**3000).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_l2_sp_pulls_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4).to(dtype)
    start = StartingPoint(layer, l2_sp=1.0, distillation=0.0)
    layer.weight.data.add_(1.0)
    for _ in range(2):
        start.add_l2_sp_gradient(layer, 1.0)
    assert layer.weight.grad is not None and layer.weight.grad.dtype == dtype
    torch.testing.assert_close(layer.weight.grad, torch.full_like(layer.weight, 2.0), rtol=0.01, atol=0.01)


def adapted(model: Any, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    return get_peft_model(model, config)


def delta(adapter: Any, layer: str) -> Tensor:
    module = adapter.get_submodule(f"base_model.model.{layer}")
    return 2.0 * module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()


LAYER = "vision_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_adapters_are_merged_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    exact = tiny_model().get_submodule(LAYER).weight.detach()
    model, processor = half_clip(dtype)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    first = adapted(clipft.load(tmp_path / "base")[0], 1)
    first.save_pretrained(tmp_path / "first")
    second = adapted(clipft.load(tmp_path / "first")[0], 2)  # an adapter of an adapter
    second.save_pretrained(tmp_path / "second")
    deltas = delta(first, LAYER), delta(second, LAYER)

    def weight(name: str, **options: Any) -> Tensor:
        return clipft.load(tmp_path / name, **options)[0].get_submodule(LAYER).weight.detach()

    stored = weight("base").float()
    assert weight("base").dtype == dtype
    one, two = ((stored + deltas[0]).to(dtype), stored + deltas[0] + deltas[1])
    assert torch.equal(weight("first"), one) and torch.equal(weight("second"), (one.float() + deltas[1]).to(dtype))
    assert torch.equal(weight("second", dtype="float32"), two)
    clipft.load(tmp_path / "first")[0].save_pretrained(tmp_path / "merged")
    assert saved(tmp_path / "merged") == (str(dtype).removeprefix("torch."), {dtype})
    tiny_model().save_pretrained(tmp_path / "base")  # float32, asked for in less
    assert torch.equal(weight("first", dtype=dtype), (exact + deltas[0]).to(dtype))


def test_an_adapter_in_16_bits_is_merged_in_float32(tmp_path: Path) -> None:
    adapter = adapted(tiny_model().half(), 1).half()
    want = (adapter.get_submodule(f"base_model.model.{LAYER}").base_layer.weight.float() + delta(adapter, LAYER)).half()
    from clipft.models.lora import merged_base

    assert torch.equal(merged_base(adapter).get_submodule(LAYER).weight, want)
