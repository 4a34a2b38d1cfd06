"""Texts beside a model, damaged at random: sets of files, options and scores of a run, classes of an export. Each is
read, or ends in one line that names the file. Nothing here imports torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import LIARS, fuzz, lies_under

from clipft.files import check_set, read_json, write_json, write_manifest
from clipft.inference.classifier import Calibration, Classifier
from clipft.inference.stored_classifiers import read_classifiers, write_classifiers
from clipft.models.calibrated import calibrations_of
from clipft.models.run_folder import classes_of_run, templates_of_run

SECONDS = 0.25
DIM = 4


def test_sets_of_files(tmp_path: Path) -> None:
    """A manifest that is damaged is as none."""
    (tmp_path / "model.txt").write_text("weights")
    write_manifest(tmp_path, "files.json")
    path = tmp_path / "files.json"

    def load() -> bool:
        try:
            check_set(tmp_path, path.name)
        except ValueError as error:
            assert "files that were written together" in str(error)
            raise
        return True

    fuzz(tmp_path, load, lambda found: None, SECONDS, [path.name])


def test_a_name_is_no_line_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: a\\nb\\x1b\[2J: expected a calibration"):
        calibrations_of({"a\nb\x1b[2J": 3}, "config.json")
    write_json(tmp_path / "files.json", {"files": {"a\nb\x1b[2J": [1, "digest"]}})
    with pytest.raises(ValueError, match=r"written together: a\\nb\\x1b\[2J not as files\.json"):
        check_set(tmp_path, "files.json")


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "folder/" * 200 + "x"])
def test_a_manifest_with_a_name_that_no_file_has_is_damaged(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "files.json", {"files": {name: [1, "digest"]}})
    check_set(tmp_path, "files.json")


@pytest.mark.parametrize("value", [1e39, 1e308, 10**400])
def test_a_scale_that_makes_no_numbers_is_refused(value: float, tmp_path: Path) -> None:
    own = Classifier(["a", "b"], np.eye(2, DIM, dtype=np.float32), 5.0)
    stored = write_classifiers({"label": own}, tmp_path)
    stored[0]["scale"] = value
    with pytest.raises(ValueError, match=r"info\.json and .*class_vectors\.npy: label: .*export it again"):
        read_classifiers(stored, tmp_path, DIM, {}, "info.json")


def test_options_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 3\nlr: 1e-3\ntemplate:\n- a photo of {}\nnote: {a: [1, 2]}\n")

    def load() -> list[str]:
        found = templates_of_run(tmp_path)
        if found is None:  # taken for another program's
            raise ValueError(f"{path}: no templates")
        return found

    fuzz(tmp_path, load, lambda found: None, SECONDS)


def test_scores_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".json", lies_under("after"))
    path = tmp_path / "report.json"
    rows = [{"class": name, "accuracy": 0.5} for name in ("red", "blue")]
    path.write_text(json.dumps({"after": {"zero_shot": {"per_class": rows}}}))

    def load() -> list[str]:
        if (found := classes_of_run(tmp_path)) is None:
            raise ValueError(f"{path}: no classes")
        return found

    fuzz(tmp_path, load, lambda found: None, SECONDS)


def test_classes_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIARS, ".json", lies_under("calibration", "classifiers"))
    path = tmp_path / "clipft_onnx.json"
    vectors = np.eye(3, DIM, dtype=np.float32)
    own = {"label": Classifier(["a", "b", "c"], vectors, 10.0), "zero_shot": Classifier(["d", "e"], vectors[:2], 5.0)}
    known = {"label": Calibration(2.5, 0.5, 0.9, ("a", "b", "c")).to_json()}
    path.write_text(json.dumps({"classifiers": write_classifiers(own, tmp_path), "calibration": known}))

    def load() -> Any:
        info = read_json(path)
        calibrations = calibrations_of(info.get("calibration"), f"{path}: calibration")
        return read_classifiers(info.get("classifiers"), tmp_path, DIM, calibrations, str(path))

    def equal(found: dict[str, Classifier]) -> None:
        for classifier in found.values():
            assert np.isfinite(classifier.probabilities(np.eye(2, DIM, dtype=np.float32))).all()

    fuzz(tmp_path, load, equal, 2 * SECONDS)
