"""What fits into memory, and which precision pays."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import import_paths
from tiny_clip import captioned, tiny_clip, tiny_model
from tiny_trainer import losses, trainer_of
from transformers import CLIPConfig, CLIPModel

import clipft
from clipft.training import auto_batch, precision


def model_of(layers: int = 4, width: int = 256, side: int = 96) -> CLIPModel:
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(text_config=tower | {"vocab_size": 100}, vision_config=tower | {"image_size": side, "patch_size": 8})
    ).train()


def forward_of(model: Any) -> Any:
    def forward(pairs: int) -> Any:
        pixels = torch.zeros(pairs, 3, 96, 96)
        return model(torch.full((pairs, 8), 99), pixels, torch.ones(pairs, 8), return_loss=True, return_logits=False)

    return forward


PEAK = """
import re, sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_auto_batch import auto_batch, clipft, forward_of, model_of
def read(name):
    return int(re.findall(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
model = clipft.fuse(model_of())
forward = forward_of(model)
forward(1).loss.backward()  # the gradients are there
{checkpointing} and model.gradient_checkpointing_enable()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = read("VmRSS")
forward(64).loss.backward()
measured = read("VmHWM") - before
model.gradient_checkpointing_disable()
print(auto_batch.step_bytes(model, forward, 64, {checkpointing}), measured)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be read on Linux only")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_is_what_a_step_takes(checkpointing: bool) -> None:
    """In a process of its own, whose allocator holds nothing back."""
    script = PEAK.format(tests=import_paths(__file__), checkpointing=checkpointing)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    counted, measured = map(float, done.stdout.split())
    assert 0.8 * measured < counted < 1.6 * measured


def test_the_most_pairs_that_fit() -> None:
    model = clipft.fuse(tiny_model()).train()

    def forward(pairs: int) -> Any:
        return model(torch.ones(pairs, 8, dtype=torch.int64), torch.zeros(pairs, 3, 32, 32), return_logits=False)

    fixed = 3 * sum(p.numel() * 4 for p in model.parameters())
    for pairs in (1, 7, 40):
        room = fixed + auto_batch.step_bytes(model, forward, pairs)
        fits = auto_batch.fitting_chunk(model, forward, 64, memory=int(room / auto_batch._MARGIN) + 1)
        assert abs(fits - pairs) <= 1
    assert auto_batch.fitting_chunk(model, forward, 64) == 64
    with pytest.raises(ValueError, match=r"auto_batch: one pair needs .* GB beside gradients and optimiser"):
        auto_batch.fitting_chunk(model, forward, 64, memory=fixed)


@pytest.mark.parametrize("strategy", ["none", "towers"])
def test_the_trainer_takes_what_fits(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: Any) -> tuple[Any, list[float]]:
        model, processor = tiny_clip()
        loaded = (clipft.freeze(model, strategy), processor)
        trainer = trainer_of(tmp_path, captioned(24), loaded=loaded, per_device_train_batch_size=12, **options)
        trainer.train()
        return trainer, losses(trainer)

    whole, expected = run(auto_batch=True)
    assert whole.args.grad_cache_chunk_size is None
    monkeypatch.setattr(auto_batch, "available_memory", lambda device: 2_500_000)
    small, same = run(auto_batch=True)
    if strategy == "none":  # features are small
        assert 1 <= small.args.grad_cache_chunk_size < 12
    assert same == pytest.approx(expected, rel=1e-5)


def test_arguments_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="auto_batch: chooses grad_cache_chunk_size, expected one of the two"):
        clipft.CLIPTrainingArguments(output_dir="x", auto_batch=True, grad_cache_chunk_size=4, use_cpu=True)


def test_precision_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    assert 0.01 < precision.bf16_speedup("cpu") < 20
    assert precision.fastest_precision("cpu") == ("bf16" if precision.bf16_speedup("cpu") >= 1.2 else "fp32")
    for gain, warned in ((0.11, True), (1.5, False)):
        monkeypatch.setattr("clipft.training.precision.bf16_speedup", lambda device, gain=gain: gain)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "clipft"):
            trainer_of(tmp_path, captioned(4), bf16=True, max_steps=1).train()
        assert ("takes 9.1 times as long in bfloat16 as in float32" in caplog.text) == warned
