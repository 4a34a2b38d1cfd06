"""A loss is one row: training, arguments, messages and the command line read it, and nothing else names a loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clip import captioned, tiny_clip
from tiny_siglip import tiny_siglip
from tiny_trainer import arguments, losses, trainer_of
from torch import Tensor

import clipft
from clipft.families.losses import LOSSES, PairLoss

CALLS: list[dict[str, Any]] = []


def toy_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, *bias: Tensor, **options: Any) -> Tensor:
    CALLS.append({"bias": len(bias), **options})
    return logit_scale * (image_embeds - text_embeds).square().sum(1).mean()


def add(patch: pytest.MonkeyPatch, **options: Any) -> None:
    CALLS.clear()
    patch.setitem(LOSSES, "toy", PairLoss("toy", toy_loss, **options))


@pytest.mark.parametrize("smooths", [False, True])
def test_a_row_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smooths: bool) -> None:
    add(monkeypatch, smooths=smooths)
    model, processor = tiny_clip()
    start = model.logit_scale.exp().item()
    trainer = trainer_of(
        tmp_path,
        captioned(16),
        loaded=(model, processor),
        loss="toy",
        label_smoothing_factor=0.125 if smooths else 0.0,
        num_train_epochs=3,
    )
    trainer.train()
    seen = losses(trainer)
    assert seen[-1] < seen[0] - 0.01 * start
    assert len(CALLS) == len(seen)
    for call in CALLS:
        assert call.keys() == {"bias", "labels", "group"} | ({"label_smoothing"} if smooths else set())
        assert (call["bias"], call["group"], call.get("label_smoothing")) == (0, None, 0.125 if smooths else None)
        assert call["labels"].shape == (8,) and call["labels"].dtype == torch.int64


def test_a_row_that_needs_the_bias_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece")
    for needs_bias in (True, False):
        add(monkeypatch, needs_bias=needs_bias)
        loaded = tiny_siglip("siglip", tmp_path)
        trainer_of(tmp_path, captioned(8), loaded=loaded, loss="toy", num_train_epochs=1).train()
        assert [call["bias"] for call in CALLS] == [int(needs_bias)]


def test_a_model_without_a_bias_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, needs_bias=True)
    with pytest.raises(ValueError, match=r"'toy' needs the logit bias .* CLIPModel has none: choose 'contrastive'$"):
        trainer_of(tmp_path, captioned(8), loss="toy")
    add(monkeypatch)
    with pytest.raises(ValueError, match=r"'sigmoid' needs the logit bias .* choose 'contrastive' or 'toy'"):
        trainer_of(tmp_path, captioned(8), loss="sigmoid")


def test_smoothing_is_refused_where_a_row_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)
    with pytest.raises(ValueError, match=r"the toy loss has no distribution to smooth, expected 0.0, got 0.1"):
        trainer_of(tmp_path, captioned(8), loss="toy", label_smoothing_factor=0.1)
    add(monkeypatch, smooths=True)
    trainer_of(tmp_path, captioned(8), loss="toy", label_smoothing_factor=0.1)


def test_a_fused_model_computes_the_row_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the family's own name, hence without arguments of the trainer."""
    monkeypatch.setitem(LOSSES, "contrastive", PairLoss("contrastive", toy_loss))
    model, processor = tiny_clip()
    tokens = processor.tokenizer(["red", "blue"], padding=True, return_tensors="pt")
    outputs = clipft.fuse(model)(**tokens, pixel_values=torch.randn(2, 3, 32, 32), return_loss=True)
    want = toy_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    assert torch.equal(outputs.loss, want)


def test_an_unknown_name_lists_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="loss: expected one of auto, contrastive, sigmoid, got 'toy'"):
        arguments(tmp_path, loss="toy")
    add(monkeypatch)
    with pytest.raises(ValueError, match="loss: expected one of auto, contrastive, sigmoid, toy, got 'other'"):
        arguments(tmp_path, loss="other")


def test_the_command_line_has_the_rows() -> None:
    """It reads them as it is imported, without torch and without looking their functions up."""
    code = (
        "import sys; from clipft.families.losses import LOSSES, PairLoss;"
        "LOSSES['toy'] = PairLoss('toy', 'nowhere:to_be_found');"
        "from typer.testing import CliRunner; from clipft.cli import app;"
        "run = lambda *words: CliRunner().invoke(app, ['train', *words], env={'COLUMNS': '200'});"
        "print(run('--help').output); print(run('--model', 'm', '--data', 'd', '--output', 'o', '--loss', 'x').output);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "auto|contrastive|sigmoid|toy" in done.stdout.replace(" ", "")
    assert "'auto', 'contrastive', 'sigmoid', 'toy'" in done.stdout
