"""Temperatures and thresholds of a run: fitted, saved, carried along, applied, told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tiny_clip import labelled, tiny_clip
from tiny_trainer import trainer_of

import clipft
from clipft.inference.encode import embed
from clipft.models.calibrated import Calibration, model_calibrations, set_calibrations
from clipft.models.heads import heads_of
from clipft.models.saving import save_model

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "control_data": "none", "lr": 1e-3}


@pytest.fixture(scope="module")
def trained(base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    clipft.train(str(base), str(colours), folder, eval_data=labelled(48), head="text", precision_at=0.3, **QUICK)
    return folder


def edited(folder: Path, place: Path, **change: Any) -> Path:
    copy = Path(shutil.copytree(folder, place))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    return copy


def test_a_run_saves_what_it_tells(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    stored = json.loads((trained / "config.json").read_text())["clipft_calibration"]
    assert report["calibration"].keys() == {"head", "zero_shot"} and stored.keys() == {"label", "zero_shot"}
    for part, name in (("head", "label"), ("zero_shot", "zero_shot")):
        told, kept = report["calibration"][part], stored[name]
        assert (told["temperature"], told["rows"], told["saved"]) == (kept["temperature"], 48, False)
        assert told["threshold"]["threshold"] == kept.get("threshold")
        assert told["threshold"]["wanted"] == 0.3
        for stage in ("before", "after"):
            low, high = told[stage]["interval"]
            assert 0 <= low <= told[stage]["ece"] <= high
            assert sum(row["rows"] for row in told[stage]["bins"]) == 48
    assert stored["zero_shot"]["classes"] == ["blue", "green", "red", "yellow"]
    assert stored["zero_shot"]["templates"] == ["a photo of a {}."] and "templates" not in stored["label"]
    page = (trained / "report.html").read_text()
    assert "<h2>Probabilities</h2>" in page and page.count("share that is right over probability") == 2


def test_a_saved_temperature_is_applied_and_another_one_is_not_guessed(trained: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(trained)
    pictures = labelled(6)
    found = clipft.classify(model, processor, pictures)
    logits = heads_of(model)["label"](embed(model, processor, pictures)).detach()
    temperature = model_calibrations(model)["label"].temperature
    assert temperature != 1.0
    torch.testing.assert_close(found, (logits / temperature).softmax(1))
    other = edited(trained, tmp_path / "other", clipft_calibration=None)
    torch.testing.assert_close(clipft.classify(*clipft.load(other), pictures), logits.softmax(1))
    set_calibrations(model, {"label": Calibration(9.0, classes=("a", "b"))})  # of a head with other classes
    torch.testing.assert_close(clipft.classify(model, processor, pictures), logits.softmax(1))


def test_evaluate_takes_the_saved_temperature_and_saves_none(trained: Path, base: Path, tmp_path: Path) -> None:
    rows, before = labelled(60), (trained / "config.json").read_bytes()
    scores = clipft.evaluate(str(trained), rows, tmp_path / "score.json")
    told = scores["calibration"]["zero_shot"]
    stored = json.loads((trained / "config.json").read_text())["clipft_calibration"]["zero_shot"]
    assert told["saved"] and told["temperature"] == stored["temperature"]
    assert told["threshold"]["wanted"] == 0.3 and "two_fold" not in told["threshold"]
    assert json.loads((tmp_path / "score.json").read_text())["calibration"] == scores["calibration"]
    assert "Probabilities" in (tmp_path / "score.html").read_text()
    fitted = clipft.evaluate(str(base), rows)["calibration"]["zero_shot"]
    assert not fitted["saved"] and fitted["temperature"] != 1.0 and "threshold" not in fitted
    other = clipft.evaluate(str(trained), rows, classes=["red", "green", "blue", "yellow", "pink"])["calibration"]
    assert other["head"]["saved"] and not other["zero_shot"]["saved"]  # it holds for its own classes alone
    words = clipft.evaluate(str(trained), rows, template=["the {} one"])["calibration"]
    assert words["head"]["saved"] and not words["zero_shot"]["saved"]  # and for its own words
    assert (trained / "config.json").read_bytes() == before


def test_the_command_shows_it_and_refuses_data_without_classes(trained: Path, table: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    labelled(48).save_to_disk(str(rows))
    result = run("evaluate", "--model", trained, "--data", rows, "--precision-at", 0.999)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "probabilities" in words and "temperature" in words
    assert "no threshold with 10 answers or more gives precision 0.999" in words
    for verb in ("train", "evaluate"):
        output = ["--output", tmp_path / "out"] if verb == "train" else []
        result = run(verb, "--model", "demo", "--data", table, *output, "--precision-at", 0.9)
        assert result.exit_code == 2 and "--precision-at: expected data with classes" in result.stderr
        result = run(verb, "--model", "demo", "--data", table, *output, "--precision-at", 2)
        assert result.exit_code == 2 and "precision-at" in result.stderr
    with pytest.raises(ValueError, match="precision_at: expected at least"):
        clipft.evaluate("demo", "nowhere", precision_at=0)


def test_it_goes_along_to_int8_and_other_layouts(trained: Path, tmp_path: Path) -> None:
    model, processor = clipft.load(trained)
    own = model_calibrations(model)
    assert own
    save_model(clipft.quantize(model), processor, tmp_path / "int8")
    assert model_calibrations(clipft.load(tmp_path / "int8")[0]) == own
    clipft.convert(str(trained), tmp_path / "hf", to="hf")
    assert model_calibrations(clipft.load(tmp_path / "hf")[0]) == own
    model.heads = torch.nn.ModuleList()
    del model.config.clipft_heads, model.heads
    clipft.convert((model, processor), tmp_path / "open_clip", to="open_clip")
    assert model_calibrations(clipft.load(tmp_path / "open_clip")[0]) == own


def test_onnx_folders_have_it(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported[0], tmp_path / "copy"))
    own = {"zero_shot": Calibration(2.5, 0.5, 0.9, ("a", "b"))}
    for int8 in (False, True):
        assert clipft.OnnxCLIP(folder, int8=int8).calibrations == own
    path = folder / "clipft_onnx.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"calibration": {"label": {"temperature": -1}}}))
    with pytest.raises(ValueError, match=r"json: calibration: label: temperature: expected") as caught:
        clipft.OnnxCLIP(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_and_its_merged_model_have_it(base: Path, colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    given = {"clipft_calibration": {"zero_shot": {"temperature": 7.0}}}
    start = edited(base, tmp_path / "base", **given)
    done = clipft.train(str(start), str(colours), tmp_path / "run", eval_data=labelled(40), lora_r=2, **QUICK)
    own = model_calibrations(done.model)
    assert own["zero_shot"].temperature not in (1.0, 7.0)
    for folder in ("run", "run/merged"):
        assert model_calibrations(clipft.load(tmp_path / folder)[0]) == own
    manifest = tmp_path / "run" / "clipft_files.json"
    stored = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(stored | {"clipft_calibration": [1]}))
    with pytest.raises(ValueError, match=r"clipft_files.json: clipft_calibration: expected an object"):
        clipft.load(tmp_path / "run")
    weights = tmp_path / "run" / "adapter_model.safetensors"
    manifest.write_text(json.dumps({key: value for key, value in stored.items() if key != "clipft_calibration"}))
    assert weights.exists() and not model_calibrations(clipft.load(tmp_path / "run")[0])


def test_a_trainer_forgets_what_its_start_had(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    set_calibrations(model, {"zero_shot": Calibration(2.0)})
    trainer_of(tmp_path, labelled(8), loaded=(model, processor), max_steps=1).train()
    assert not model_calibrations(model)


def test_other_weights_have_none(base: Path, colours: Path, table: Path, tmp_path: Path) -> None:
    for change in (
        lambda model, _: clipft.wise_ft(model, model, 0.5),
        lambda model, processor: clipft.resize(model, processor, max_tokens=12),
    ):
        model, processor = clipft.load(base)
        set_calibrations(model, {"zero_shot": Calibration(2.0)})
        assert model_calibrations(model) and not model_calibrations(change(model, processor))
    start = edited(base, tmp_path / "base", clipft_calibration={"zero_shot": {"temperature": 7.0}})
    clipft.train(str(start), str(table), tmp_path / "run", **QUICK)  # captions alone: nothing to fit on
    assert "clipft_calibration" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert "calibration" not in json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "expected an object with a calibration a head"),
        ({"label": 2}, "label: expected a calibration, an object with a temperature"),
        ({"label": {"temperature": 0}}, "label: temperature: expected a number from .*, got 0"),
        ({"label": {"temperature": 10**400}}, "label: temperature: expected a number"),
        ({"label": {"temperature": float("nan")}}, "label: temperature: expected a number from .*, got nan"),
        ({"label": {"temperature": 1, "threshold": 2}}, "label: threshold: expected a number from 0 to 1, got 2"),
        ({"zero_shot": {"temperature": 1, "classes": [1]}}, "zero_shot: expected classes to be a list of texts"),
        ({"zero_shot": {"temperature": 1, "templates": "a {}"}}, "zero_shot: expected templates to be a list of texts"),
    ],
)
def test_rubbish_in_a_configuration_is_refused(base: Path, tmp_path: Path, stored: Any, message: str) -> None:
    folder = edited(base, tmp_path / "model", clipft_calibration=stored)
    with pytest.raises(ValueError, match=message) as caught:
        clipft.load(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder / 'config.json'}: clipft_calibration: ") and "\n" not in text
