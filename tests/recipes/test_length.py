"""How long a run is: as asked, else five epochs, and on few pictures so many that there are enough steps."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

import clipft
from clipft.evaluation.resampling import Resampled
from clipft.recipes.length import length_of_run

FEW = 7  # steps in place of LEAST_STEPS; 32 pictures are one batch
WHY = "32 pictures make 1 step an epoch: 7 epochs instead of 5, for at least 7 steps; --epochs decides otherwise"


class Watch(TrainerCallback):
    """What a run planned, how far it came, and the epochs after which it saved and evaluated; kills it at one."""

    def __init__(self, kill: float = 0.0) -> None:
        self.kill = kill
        self.saved: list[int] = []
        self.evaluated: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.planned = state.max_steps, args.num_train_epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kill and state.epoch == self.kill:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(round(state.epoch))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(round(state.epoch))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    drawing = Resampled._drawing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resampled, "_drawing", lambda self, resamples, seed: drawing(self, min(resamples, 20), seed))
        yield


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipft.recipes.length.LEAST_STEPS", FEW)


@pytest.fixture(scope="module")
def longer(base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch, str]:
    """A run that is longer for its few pictures: folder, what was watched, what it said."""
    folder, watch = tmp_path_factory.mktemp("longer"), Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipft.recipes.length.LEAST_STEPS", FEW)
        return folder, watch, train(base, colours, folder, watch)


def train(model: Path, data: Path, output: Path, watch: Watch, **options: Any) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True)
    options = {"control_data": "none", "lr": 1e-3} | options
    clipft.train(str(model), str(data), output, console=console, callbacks=[watch], **options)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_few_pictures_come_round_until_there_are_enough_steps(longer: tuple[Path, Watch, str]) -> None:
    folder, watch, said = longer
    assert WHY in said and watch.planned == (7, 7.0) and watch.steps == 7
    report = json.loads((folder / "report.json").read_text())
    assert report["length"] == {"pictures": 32, "steps_an_epoch": 1, "epochs": 7.0, "steps": 7, "note": WHY}
    assert all(WHY in (folder / name).read_text() for name in ("report.html", "README.md"))
    assert "epochs: 7.0" in (folder / "README.md").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] is None  # other data may need other ones
    assert watch.saved == [2, 4, 6, 7]  # not in every short epoch


@pytest.mark.usefixtures("few_steps")
def test_a_step_of_one_pair_is_none(base: Path, colours: Path, tmp_path: Path) -> None:
    watch = Watch()
    said = train(base, colours, tmp_path, watch, batch_size=31)
    assert WHY in said and watch.planned == (7, 7.0) and watch.steps == 7


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("options", "planned"), [({"epochs": 2}, (2, 2)), ({"training_args": {"max_steps": 3}}, (3, 5.0))]
)
def test_what_is_asked_for_is_done(
    base: Path, colours: Path, tmp_path: Path, options: dict[str, Any], planned: tuple[int, float]
) -> None:
    watch = Watch()
    assert "instead of" not in train(base, colours, tmp_path, watch, **options)
    assert watch.planned == planned and watch.steps == planned[0] and watch.saved == list(range(1, planned[0] + 1))
    length = json.loads((tmp_path / "report.json").read_text())["length"]
    assert length == {"pictures": 32, "steps_an_epoch": 1, "epochs": planned[0], "steps": planned[0]}


@pytest.mark.usefixtures("few_steps")
def test_early_stopping_has_patience_for_more_than_a_step(base: Path, colours: Path, tmp_path: Path) -> None:
    watch = Watch()
    said = train(base, colours, tmp_path, watch, early_stopping_patience=2, lr=0.0)
    assert watch.evaluated == [2, 4, 6] and "kept the model of step 2 of 6" in said


@pytest.mark.usefixtures("few_steps")
def test_a_resumed_run_keeps_its_length(
    base: Path, colours: Path, tmp_path: Path, longer: tuple[Path, Watch, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(base, colours, tmp_path, Watch(kill=5))
    watch = Watch()
    assert "resuming from" in train(base, colours, tmp_path, watch, resume=True)
    assert watch.planned == (7, 7.0) and watch.saved == [6, 7]
    one, other = (load_file(folder / "model.safetensors") for folder in (longer[0], tmp_path))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    monkeypatch.setattr("clipft.recipes.length.LEAST_STEPS", 2 * FEW)  # of another version
    with pytest.raises(ValueError, match=r"epochs \(7\.0 then, 14\.0 now\)"):
        train(base, colours, tmp_path, Watch(), resume=True)


@pytest.mark.parametrize(
    ("pictures", "options", "found"),
    [
        (52, {}, (2, 50, 100)),
        (1, {}, (1, 100, 100)),
        (600, {}, (19, 6, 114)),
        (640, {}, (20, 5, 100)),
        (100_000, {}, (3125, 5, 15_625)),
        (600, {"gradient_accumulation_steps": 4}, (5, 20, 100)),
        (52, {"dataloader_drop_last": True}, (1, 100, 100)),
        (20, {"dataloader_drop_last": True}, (1, 100, 100)),
        (52, {"per_device_train_batch_size": 2}, (26, 5, 130)),
    ],
)
def test_a_hundred_steps_at_least(
    tmp_path: Path, pictures: int, options: dict[str, Any], found: tuple[int, float, int]
) -> None:
    args = clipft.CLIPTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    length = length_of_run(args, pictures, asked=False)
    assert (length.steps_an_epoch, length.epochs, length.steps) == found
    assert bool(length.note) == (found[1] != 5) and not length_of_run(args, pictures, asked=True).note
