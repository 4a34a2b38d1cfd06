"""What clipft writes beside a model, damaged at random: sets of files, bases of adapters, heads and calibrations, rows
that were seen, whose checkpoints and shards there are. Each is read, or ends in one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run
from fuzzing import LIARS, fuzz, lies_under
from rich.console import Console
from tiny_clip import COLOURS

import clipft
from clipft.inference.shards import claimed
from clipft.models.calibrated import Calibration, model_calibrations, set_calibrations
from clipft.models.saving import save_model
from clipft.recipes.checkpoint_owner import identity_of_run, resume_point
from clipft.recipes.hold_out import Seen

SECONDS = 1.0
CALIBRATIONS = {"zero_shot": Calibration(2.5, 0.5, 0.9, ("a", "b")), "label": Calibration(0.5)}


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """Of a model with a head and calibrations."""
    model, processor = clipft.load(base)
    clipft.add_head(model, processor, list(COLOURS))
    set_calibrations(model, CALIBRATIONS)
    save_model(model, processor, tmp_path / "model")
    return tmp_path / "model"


def test_heads_and_calibrations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".json", lies_under("clipft_heads", "clipft_calibration"))

    def equal(loaded: tuple[Any, Any]) -> None:
        model, _ = loaded
        assert all(1e-6 <= own.temperature <= 1e6 for own in model_calibrations(model).values())

    forms = {"config.json": [(folder / "config.json").read_bytes()]}
    fuzz(folder, lambda: clipft.load(folder), equal, SECONDS, forms=forms)


def test_sets_of_files(folder: Path) -> None:
    """A manifest that is no longer true is a warning, of a model that anybody may edit."""
    fuzz_whole(folder, lambda: clipft.load(folder))


def fuzz_whole(folder: Path, load: Callable[[], Any]) -> None:
    """Of a manifest: one that is damaged is as none, so that most inputs load."""
    fuzz(folder, load, lambda loaded: None, SECONDS, ["clipft_files.json"], refused=False)


def test_records_of_adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setitem(LIARS, ".json", lies_under("base", "resized", "clipft_calibration", "files"))
    model, processor = clipft.load(base)
    clipft.resize(model, processor, max_tokens=30)
    set_calibrations(model, CALIBRATIONS)
    save_model(clipft.add_lora(model, r=2), processor, tmp_path / "adapter")
    fuzz_whole(tmp_path / "adapter", lambda: clipft.load(tmp_path / "adapter"))


def test_rows_that_were_seen(tmp_path: Path) -> None:
    Seen(frozenset([b"a" * 16]), frozenset(), frozenset([b"b" * 16, b"c" * 16])).save(tmp_path)

    def equal(seen: Seen) -> None:
        assert all(isinstance(row, bytes) for row in (*seen.train, *seen.validation, *seen.test))

    fuzz(tmp_path, lambda: Seen.of_model(tmp_path), equal, SECONDS / 2)


def test_options_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 3\nlr: 1e-3\ntemplate:\n- a photo of {}\n")

    def load() -> bool:
        nothing = tmp_path / "nothing"
        result = run("train", "--config", path, "--model", nothing, "--data", nothing, "--output", tmp_path / "run")
        assert result.exit_code == 2
        said = " ".join(result.output.replace("│", "").split())
        if "nothing" not in said:
            raise ValueError(f"{path}: {said[:300]}")
        return True

    fuzz(tmp_path, load, lambda found: None, SECONDS / 2)


def test_an_interrupted_runs_work(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    parts = tmp_path / ".v.npy.parts"
    parts.mkdir()
    work = {"rows": 3, "digest": "abc"}
    (parts / "work.json").write_text(json.dumps(work))

    def load() -> bool:
        try:
            with claimed(path, work):
                raise KeyError  # so that the folder stays
        except KeyError:
            return True
        except ValueError as error:
            if f"{parts}: an interrupted run is there" in str(error):
                raise ValueError(f"{parts}/work.json: {error}") from error  # a run goes by its folder
            raise

    fuzz(parts, load, lambda found: None, SECONDS / 2, ["work.json"])


def test_whose_checkpoints_they_are(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rows = {"train": {"count": 3, "digest": "a"}, "validation": None}
    own = identity_of_run({"lr": 1e-3, "tags": ["a"]}, "digest", rows, adapter=None, processes=1)
    path.write_text(json.dumps(own))
    (tmp_path / "checkpoint-1").mkdir()

    def load() -> bool:
        try:
            resume_point(tmp_path, own, Console(quiet=True), force=False)
        except ValueError as error:
            if "found another's" in str(error):
                raise ValueError(f"{path}: {str(error)[:300]}") from error  # of its folder
            if "run.json" in str(error):
                raise
        return True  # the checkpoint is empty, which is told later

    fuzz(tmp_path, load, lambda found: None, SECONDS / 2)
