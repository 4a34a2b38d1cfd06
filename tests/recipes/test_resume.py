"""``resume`` goes on from checkpoints of the same run alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from rich.console import Console
from safetensors.torch import load_file
from tiny_clip import class_folders, picture
from transformers import TrainerCallback

import clipft

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "control_data": "none"}


class Killed(TrainerCallback):
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch == 1:
            raise KeyboardInterrupt


def train(model: Path, data: Path, output: Path, **options: Any) -> str:
    """What it said."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    clipft.train(str(model), str(data), output, console=console, **QUICK | options)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data", 20)


@pytest.fixture
def broken(base: Path, data: Path, tmp_path: Path) -> Path:
    """A run that was killed in its second epoch."""
    with pytest.raises(KeyboardInterrupt):
        train(base, data, tmp_path / "run", callbacks=[Killed()])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    return tmp_path / "run"


def test_another_runs_checkpoint_is_refused_with_what_differs(base: Path, data: Path, broken: Path) -> None:
    for options, words in (
        ({"lr": 1e-3}, "lr (None then, 0.001 now)"),
        ({"seed": 7}, "seed (42 then, 7 now)"),
        ({"epochs": 3}, "epochs (2 then, 3 now)"),
        ({"freeze": "text"}, "freeze (none then, text now)"),
        ({"training_args": {"adam_beta2": 0.9}}, "set (None then, ['adam_beta2=0.9'] now)"),
        ({"early_stopping_patience": 1}, "the rows of train (16 then, 14 now)"),
    ):
        with pytest.raises(ValueError, match="resume: expected checkpoints of this run") as caught:
            train(base, data, broken, resume=True, **options)
        assert words in str(caught.value) and "--force" in str(caught.value)
    result = run("train", "--model", "demo", "--data", data, "--output", broken, "--resume", "--batch-size", 8)
    assert result.exit_code == 2 and "error: --resume: expected checkpoints of this run" in result.output
    assert "the model it starts from" in result.output


def test_other_rows_are_another_run(base: Path, data: Path, broken: Path) -> None:
    for index, path in enumerate(sorted(data.rglob("*.png"))):
        picture(50 + index)[0].save(path)
    with pytest.raises(ValueError, match=r"the rows of train \(other pictures, captions or labels\)"):
        train(base, data, broken, resume=True)


def test_the_same_run_goes_on_elsewhere_and_with_what_changes_nothing(
    base: Path, data: Path, broken: Path, tmp_path: Path
) -> None:
    train(base, data, tmp_path / "whole")
    moved, gone = tmp_path / "moved", tmp_path / "elsewhere"
    broken.rename(moved)
    data.rename(gone)
    assert "resuming from" in train(base, gone, moved, resume=True, workers=1, gradient_checkpointing=True)
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", moved))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_force_insists_and_the_run_is_then_the_folders(base: Path, data: Path, broken: Path) -> None:
    with pytest.raises(ValueError, match="force: insists on resume"):
        train(base, data, broken, force=True, lr=1e-3)
    said = train(base, data, broken, resume=True, force=True, lr=1e-3)
    assert "resuming from" in said and "though lr (None then, 0.001 now)" in said
    assert "resuming from" in train(base, data, broken, resume=True, lr=1e-3)


def test_a_fresh_start_moves_another_runs_checkpoints_aside(base: Path, data: Path, broken: Path) -> None:
    assert "another run" not in train(base, data, broken)
    assert not (broken / "checkpoints.1").exists()
    for number in (1, 2):
        said = train(base, data, broken, lr=number * 1e-3)
        assert f"checkpoints of another run in this folder are now in {broken / f'checkpoints.{number}'}" in said
    (broken / "checkpoints" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"there is no run\.json, which says whose they are"):
        train(base, data, broken, resume=True, lr=2e-3)
