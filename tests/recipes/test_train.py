"""``clipft.train`` and ``clipft.evaluate``: the command line's recipes, from Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

import clipft
from clipft.data.drawings import control_drawings
from clipft.data.rows import read_stored
from clipft.recipes.options import EvaluateOptions, TrainOptions

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 8, "control_data": "none"}


def flags(options: dict[str, Any]) -> list[Any]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 20 drawings with their names, which the demo's model knows."""
    folder = tmp_path_factory.mktemp("drawings")
    rows = list(control_drawings().select(range(20)))
    for number, row in enumerate(rows):
        row["image"].save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{number}.png", "caption": row["caption"]}) for number, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("options", [{}, {"lora_r": 2, "lora_targets": "vision"}, {"freeze": "text"}])
def test_both_doors_give_the_same_weights(drawings: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    both_doors("demo", drawings, tmp_path, options)


def test_both_doors_train_the_same_head(base: Path, colours: Path, tmp_path: Path) -> None:
    both_doors(base, colours, tmp_path, {"head": "text", "l2_sp": 0.01})


def both_doors(model: Path | str, data: Path, folder: Path, options: dict[str, Any]) -> None:
    command = ["train", "--model", model, "--data", data, "--output", folder / "one", *flags(QUICK | options)]
    assert run(*command).exit_code == 0
    done = clipft.train(str(model), str(data), folder / "two", **QUICK, **options)
    name = "adapter_model.safetensors" if "lora_r" in options else "model.safetensors"
    one, two = (load_file(folder / door / name) for door in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    reports = [json.loads((folder / door / "report.json").read_text()) for door in ("one", "two")]
    assert reports[0]["after"] == reports[1]["after"] == done.after
    assert done.before == reports[1]["before"] and done.gains == reports[1]["gain"] and done.history


def test_a_run_shows_its_report_and_goes_on(base: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without transformers' bars, which are on as Python starts, and on again afterwards."""
    enable_progress_bar()
    first = clipft.train(str(base), str(colours), **QUICK)
    page = first._repr_html_()
    assert first.folder.is_dir() and "Results" in page and "</div>" in page
    assert "<html" not in page and "body {" not in page  # nor styles that reach out of it
    assert clipft.evaluate(first, str(colours))["zero_shot"]["accuracy"] >= 0.0
    second = clipft.train(first, str(colours), **QUICK)
    assert second.before["zero_shot"]["accuracy"] == first.after["zero_shot"]["accuracy"]
    assert "%|" not in capsys.readouterr().err and is_progress_bar_enabled()
    folder = second.folder
    del second
    assert not folder.exists()  # it lives as long as its run


def test_pictures_are_read_once_for_their_digests(base: Path, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("clipft.data.digests.read_stored", lambda image: seen.append(image) or read_stored(image))
    run = clipft.train(str(base), str(colours), **QUICK | {"epochs": 2, "freeze": "towers"})
    assert list((run.folder / "features").glob("vision-*")) and len(seen) == len(clipft.load_pairs(colours))


def test_rows_and_a_loaded_model(base: Path, colours: Path, tmp_path: Path) -> None:
    rows = clipft.load_pairs(colours)
    done = clipft.train(clipft.load(base), rows, tmp_path, eval_data=rows.select(range(0, 40, 4)), **QUICK)
    assert "10 pictures of a Dataset" in json.loads((tmp_path / "report.json").read_text())["test"]["data"]
    scores = clipft.evaluate((done.model, done.processor), rows, tmp_path / "score.json")
    assert scores["zero_shot"] == json.loads((tmp_path / "score.json").read_text())["zero_shot"]
    assert scores["zero_shot"]["accuracy"] >= 0.0
    assert scores._repr_html_() in (tmp_path / "score.html").read_text()


def test_callbacks_and_any_argument_of_transformers(base: Path, colours: Path, tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
            self.seen = args.adam_beta2, args.lr_scheduler_type

    watch = Watch()
    chosen = {"adam_beta2": 0.9, "lr_scheduler_type": "linear"}
    clipft.train(str(base), str(colours), tmp_path, training_args=chosen, callbacks=[watch], **QUICK)
    assert watch.seen == (0.9, "linear")
    result = run("train", "--model", base, "--data", colours, "--output", tmp_path / "two", "--set", "adam_beta3=1")
    assert result.exit_code == 2 and "--set: 'adam_beta3' is no field" in result.output
    assert "did you mean 'adam_beta" in result.output
    with pytest.raises(ValueError, match="set: 'learning_rate' has an option of its own, lr"):
        clipft.train(str(base), str(colours), tmp_path / "three", training_args={"learning_rate": 1.0})


@pytest.mark.parametrize("options", [{}, {"grad_cache_chunk_size": 4}])
def test_a_loss_of_ones_own(base: Path, colours: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    def own(image_embeds: torch.Tensor, text_embeds: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        assert image_embeds.shape == text_embeds.shape == (8, 16) and len(batch["labels"]) == 8
        return clipft.contrastive_loss(image_embeds, text_embeds, batch["logit_scale"], labels=batch["labels"])

    clipft.train(str(base), str(colours), tmp_path / "one", **QUICK, **options)
    clipft.train(str(base), str(colours), tmp_path / "two", loss=own, **QUICK, **options)
    one, two, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", tmp_path / "two", base))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], start[key]) for key in one)
    repeat = run("train", "--config", tmp_path / "two" / "config.yaml", "--output", tmp_path / "three")
    assert repeat.exit_code == 2 and "own" in repeat.output  # a file cannot hold it
    with pytest.raises(ValueError, match="loss: expected the function to give a 0-d tensor, got shape"):
        clipft.train(str(base), str(colours), tmp_path / "four", loss=lambda images, texts, batch: images, **QUICK)
    with pytest.raises(ValueError, match="loss: a function of your own takes the place"):
        clipft.train(str(base), str(colours), tmp_path / "five", loss=own, label_smoothing=0.1, **QUICK)


def test_a_configuration_repeats_the_run(base: Path, colours: Path, tmp_path: Path) -> None:
    options = QUICK | {"layer_decay": 0.5, "template": ["a {}."], "seed": 7}
    clipft.train(str(base), str(colours), tmp_path / "one", training_args={"adam_beta2": 0.9}, **options)
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["set"] == ["adam_beta2=0.9"] and config["layer_decay"] == 0.5
    result = run("train", "--config", tmp_path / "one" / "config.yaml", "--output", tmp_path / "two")
    assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_no_option_names_the_nearest() -> None:
    for name, ours in {"num_train_epochs": "epochs", "learning_rate": "lr", "output_dir": "output"}.items():
        with pytest.raises(TypeError, match=f"{name}: no such option; did you mean '{ours}'"):
            clipft.train("demo", "nowhere", **{name: 1})
    with pytest.raises(TypeError, match="epoch: no such option; did you mean 'epochs'"):
        clipft.train("demo", "nowhere", epoch=1)
    with pytest.raises(ValueError, match="loss: expected one of auto, contrastive, sigmoid, got 'contrastve'; did you"):
        clipft.train("demo", "nowhere", loss="contrastve")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        clipft.train("demo", "nowhere", batch_size=0)
    with pytest.raises(TypeError, match="workerz: no such option; did you mean 'workers'"):
        clipft.evaluate("demo", "nowhere", workerz=1)


def test_defaults_are_those_of_the_arguments() -> None:
    own = {field.name: field for field in dataclasses.fields(clipft.CLIPTrainingArguments)}
    for field in dataclasses.fields(TrainOptions):
        if argument := field.metadata.get("argument"):
            assert own[argument].default == field.default, argument


def test_every_option_has_its_help() -> None:
    for kind in (TrainOptions, EvaluateOptions):
        for field in dataclasses.fields(kind):
            assert field.metadata["help"].endswith("."), field.name
