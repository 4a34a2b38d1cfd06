"""Classification heads on the command line: trained, evaluated, and options that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_clip import attributes_csv, class_folders, tiny_clip
from typer.testing import CliRunner

import clipft
from clipft.cli import app


def command(*options: str) -> None:
    result = CliRunner().invoke(app, list(options))
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model, processor = tiny_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_train_and_evaluate_a_head(base: Path, tmp_path: Path) -> None:
    data, run = str(class_folders(tmp_path / "data", 40)), tmp_path / "run"
    options = ["--head", "text", "--head-loss", "dice", "--class-weights", "balanced", "--early-stopping-patience", "2"]
    options += ["--epochs", "2", "--batch-size", "8", "--control-data", "none", "--wise-ft"]
    command("train", "--model", str(base), "--data", data, "--output", str(run), *options)
    report = json.loads((run / "report.json").read_text())
    assert list(report["before"]) == ["head", "zero_shot"]
    assert report["before"]["head"] == report["before"]["zero_shot"]
    assert {"eval_balanced_accuracy", "eval_loss"} <= {name for entry in report["history"] for name in entry}
    assert report["gain"]["head"].keys() >= {"accuracy", "balanced_accuracy"}
    assert report["wise_ft"]["metric"] == "balanced accuracy"
    assert "Classification head" in (run / "report.html").read_text()
    assert "| head, balanced accuracy |" in (run / "README.md").read_text()
    score, other = tmp_path / "score.json", class_folders(tmp_path / "other", 8)
    (other / "blue").rename(other / "navy")
    command("evaluate", "--model", str(run), "--data", str(other), "--output", str(score))
    assert list(json.loads(score.read_text())) == ["zero_shot", "calibration", "reading"]
    line = ["train", "--model", str(base), "--data", data, "--eval-data", str(other), "--output", str(run), *options]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "column 'label': expected classes among" in result.output and "found ['navy']" in result.output
    command("evaluate", "--model", str(run), "--data", data, "--output", str(score))
    model, processor = clipft.load(run)
    found = clipft.evaluate_heads(model, processor, clipft.load_pairs(data))
    assert json.loads(score.read_text())["head"] == found["label"]


def test_train_and_evaluate_attributes(base: Path, tmp_path: Path) -> None:
    data, run, score = str(attributes_csv(tmp_path)), tmp_path / "run", tmp_path / "score.json"
    options = ["--attribute", "color=0.5", "--attribute", "shape", "--head-loss", "focal", "--control-data", "none"]
    options += ["--epochs", "2"]
    command("train", "--model", str(base), "--data", data, "--eval-data", data, "--output", str(run), *options)
    after = json.loads((run / "report.json").read_text())["after"]
    assert list(after) == ["retrieval", "attribute_color", "attribute_shape"]
    assert after["attribute_shape"]["intervals"].keys() >= {"accuracy", "balanced_accuracy"}
    assert "Attribute: color" in (run / "report.html").read_text()
    config = (run / "config.yaml").read_text()
    assert "- color=0.5" in config and "head_loss: focal" in config
    line = ["evaluate", "--model", str(run), "--data", data, "--attribute"]
    result = CliRunner().invoke(app, [*line, "color", "--output", str(score)])
    assert "the model has more heads, for data with their columns: --attribute shape" in result.output
    result = CliRunner().invoke(app, ["evaluate", "--model", str(base), "--data", data, "--attribute", "color"])
    assert result.exit_code == 2 and "--attribute: expected heads of the model" in result.output
    again = json.loads(score.read_text())
    assert again["attribute_color"] == after["attribute_color"] and "attribute_shape" not in again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attribute", "color=much"], "--attribute: expected NAME or NAME=WEIGHT, got 'color=much'"),
        (["--attribute", "color", "--attribute", "color=2"], "--attribute: expected each column once"),
        (["--head", "text", "--class-weights", "some"], "--class-weights: expected balanced, or numbers"),
        (["--head", "text", "--metric", "image_to_text_R@1"], "--metric: expected one of loss, balanced_accuracy"),
        (["--head", "text", "--lora-r", "4"], "--head, --attribute: not with --lora-r"),
        (["--attribute", "size"], "error: --attribute: expected columns of "),
        (["--attribute", "color=0"], "--attribute: expected a weight above 0"),
        (["--head", "text", "--class-weights", "1,2"], "error: --head: 'text': expected a training set with a column"),
        (["--head-loss", "dice"], "error: --head-loss, --class-weights: there is no head"),
    ],
)
def test_wrong_options_are_one_line(base: Path, tmp_path: Path, options: list[str], message: str) -> None:
    data = str(attributes_csv(tmp_path, 8))
    arguments = ["train", "--model", str(base), "--data", data, "--output", str(tmp_path / "run"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
