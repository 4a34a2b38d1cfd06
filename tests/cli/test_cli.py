"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import run
from tiny_clip import captioned, class_folders, picture
from transformers import CLIPModel
from typer.testing import CliRunner

import clipft
from clipft.cli import app
from clipft.recipes.arguments import RETRIEVAL
from clipft.recipes.options import GROUPS, TrainOptions


def test_uneven_classes_are_balanced_unless_the_user_says_otherwise(base: Path, tmp_path: Path) -> None:
    uneven = class_folders(tmp_path / "uneven", 40)
    few = sorted((uneven / "red").iterdir())[4:]
    for file in few:
        file.unlink()

    def trained(*options: str) -> tuple[list[Any], str]:
        command = ["train", "--model", base, "--data", uneven, "--epochs", 2, "--batch-size", 8, *options]
        output = tmp_path / "-".join(["run", *options])
        printed = run(*command, "--output", output).stdout
        report = json.loads((output / "report.json").read_text())
        return [entry["loss"] for entry in report["history"] if "loss" in entry], printed

    default, said = trained()
    assert "classes are uneven" in said
    balanced, said = trained("--class-balanced")
    assert default == balanced and "classes are uneven" not in said
    assert trained("--no-class-balanced")[0] != default
    assert "classes are uneven" not in trained("--hard-negatives", "1")[1]
    assert "classes are uneven" not in trained("--head", "text", "--head-loss", "focal")[1]
    assert "classes are uneven" not in trained("--head", "text", "--class-weights", "balanced")[1]
    assert "classes are uneven" in trained("--head", "text")[1]
    assert "class_balanced: true" in (tmp_path / "run" / "config.yaml").read_text()  # what was done


@pytest.mark.filterwarnings("error:.gradient_checkpointing")  # deprecated, and nobody asks for it here
def test_train_on_class_folders(base: Path, colours: Path, tmp_path: Path) -> None:
    options = ["--epochs", 8, "--batch-size", 8, "--lr", 3e-3, "--horizontal-flip", 0.5, "--workers", 1]
    result = run("train", "--model", base, "--data", colours, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "training on 32 pictures" in result.output
    assert f"testing on 8 pictures of {colours}, held out of training (seed 42)" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    stages, about = {"before", "after", "gain"}, {"calibration", "test", "length", "reading", "history", "environment"}
    assert report.keys() == stages | about
    assert report["after"].keys() == {"zero_shot"}  # class names are not captions
    zero_shot = report["after"]["zero_shot"]
    numbers = {"accuracy", "balanced_accuracy", "macro_f1", "top5"}
    parts = {"classes", "classes_with_pictures", "per_class", "confusion_matrix", "confusions", "intervals"}
    assert zero_shot.keys() == numbers | parts
    assert [row["class"] for row in zero_shot["per_class"]] == ["blue", "green", "red", "yellow"]
    assert [row["support"] for row in zero_shot["per_class"]] == [2, 2, 2, 2]  # each class's share
    assert zero_shot["accuracy"] >= report["before"]["zero_shot"]["accuracy"] + 0.25
    assert type(CLIPModel.from_pretrained(tmp_path / "out")) is CLIPModel
    again = run("evaluate", "--model", tmp_path / "out", "--data", colours, "--output", tmp_path / "all.json")
    assert again.exit_code == 0
    assert "balanced accuracy" in again.output
    assert json.loads((tmp_path / "all.json").read_text())["zero_shot"]["accuracy"] >= 0.5


def test_train_on_captions_with_a_test_set(base: Path, table: Path, tmp_path: Path) -> None:
    captioned(12).to_parquet(tmp_path / "test.parquet")
    out = tmp_path / "out"
    options = ["--eval-data", tmp_path / "test.parquet", "--epochs", 1, "--batch-size", 10, "--freeze", "vision:1"]
    result = run("train", "--model", base, "--data", table, "--output", out, *options)
    assert result.exit_code == 0, result.output
    assert "training on 30 pictures" in result.output
    assert "testing on 12 pictures" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["before"].keys() == report["after"].keys() == {"retrieval"}
    assert report["after"]["retrieval"].keys() > set(RETRIEVAL)
    model, processor = clipft.load(out)
    expected = clipft.evaluate_retrieval(model, processor, clipft.load_pairs(tmp_path / "test.parquet"))
    assert report["after"]["retrieval"] == expected
    start = clipft.load(base)[0]
    assert torch.equal(model.vision_model.embeddings.class_embedding, start.vision_model.embeddings.class_embedding)


def test_large_batches_and_precision(base: Path, table: Path, tmp_path: Path) -> None:
    losses = []
    for name, options in {"whole": [], "chunks": ["--grad-cache-chunk-size", 3], "auto": ["--auto-batch"]}.items():
        result = run(
            *("train", "--model", base, "--data", table, "--output", tmp_path / name, "--epochs", 2),
            *("--batch-size", 8, "--gradient-checkpointing", *options),
        )
        assert result.exit_code == 0, result.output
        losses.append(json.loads((tmp_path / name / "report.json").read_text())["after"]["retrieval"])
    for name in RETRIEVAL:
        assert losses[1][name] == pytest.approx(losses[0][name]) == losses[2][name]
    both = run(
        "train", "--model", base, "--data", table, "--output", tmp_path / "x", *options, "--grad-cache-chunk-size", 3
    )
    assert both.exit_code == 2 and "--auto-batch: chooses --grad-cache-chunk-size" in both.output
    result = run(
        "train", "--model", base, "--data", table, "--output", tmp_path / "p", "--epochs", 1, "--precision", "auto"
    )
    assert result.exit_code == 0 and "--precision auto: " in result.output


def test_the_held_out_split_is_the_same_each_time(base: Path, colours: Path, tmp_path: Path) -> None:
    reports = []
    for name in ("one", "two"):
        run("train", "--model", base, "--data", colours, "--output", tmp_path / name, "--epochs", 1)
        reports.append((tmp_path / name / "report.json").read_text())
    assert reports[0] == reports[1]


def test_a_loader_process_that_was_killed_is_said_in_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(message: str) -> None:
        def raises(*args: Any, **options: Any) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr("clipft.recipes.evaluate.evaluate", raises)

    fails("DataLoader worker (pid 7) is killed by signal: Killed. ")
    result = run("evaluate", "--model", "demo", "--data", "pairs.csv")
    assert result.exit_code == 2 and "error: a process that loads pictures has died (DataLoader worker" in result.stderr
    assert "take fewer workers" in result.stderr
    fails("something else")
    with pytest.raises(RuntimeError, match="something else"):
        run("evaluate", "--model", "demo", "--data", "pairs.csv")


def test_early_stopping_looks_at_rows_of_its_own(base: Path, colours: Path, tmp_path: Path) -> None:
    options = ["--early-stopping-patience", 1, "--epochs", 9, "--lr", 0.0]
    result = run("train", "--model", base, "--data", colours, "--output", tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "training on 28 pictures" in result.output
    assert "4 more pictures, held out of training, choose the epoch" in result.output
    assert "kept the model of step 1 of 2" in result.output


def test_resume_goes_on_to_the_same_model(base: Path, table: Path, tmp_path: Path) -> None:
    """The run's last checkpoint and its result are taken away, as if it had been killed after the first epoch."""
    options = ["--model", base, "--data", table, "--epochs", 2, "--batch-size", 8, "--random-resized-crop", 0.5]
    run("train", *options, "--output", tmp_path / "whole")
    run("train", *options, "--output", tmp_path / "broken")
    whole, broken = (tmp_path / name / "model.safetensors" for name in ("whole", "broken"))
    last = tmp_path / "broken" / "checkpoints" / "checkpoint-6"
    (last / "optimizer.pt").unlink()
    broken.unlink()
    result = run("train", *options, "--output", tmp_path / "broken", "--resume")
    assert "resuming from" in result.output
    assert "checkpoint-3" in result.output
    assert broken.read_bytes() == whole.read_bytes()
    first = run("train", *options, "--output", tmp_path / "new", "--resume")
    assert "no checkpoint in" in first.output


def test_train_lora(base: Path, table: Path, tmp_path: Path) -> None:
    """What is left is an adapter that plain peft loads, and the same model merged; all three score the same."""
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    options = ["--epochs", 4, "--batch-size", 8, "--lora-r", 4, "--lora-targets", "vision", "--lr", 3e-2]
    options += ["--eval-data", table, "--lora-dropout", 0.05, "--lora-targets", "text:q_proj"]
    result = run("train", "--model", base, "--data", table, "--output", out, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["retrieval"] != report["before"]["retrieval"]
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.05)
    assert not (out / "model.safetensors").exists()
    data, processor = clipft.load_pairs(table), clipft.load(base)[1]
    plain = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(base), out).eval()
    for model in (plain, CLIPModel.from_pretrained(out / "merged"), clipft.load(out)[0]):
        assert clipft.evaluate_retrieval(model, processor, data) == report["after"]["retrieval"]
    assert run("evaluate", "--model", out, "--data", table, "--output", tmp_path / "again.json").exit_code == 0
    assert json.loads((tmp_path / "again.json").read_text())["retrieval"] == report["after"]["retrieval"]

    assert run("merge", "--model", out, "--output", tmp_path / "merged").exit_code == 0
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert [(tmp_path / "merged" / name).is_file() for name in names] == [True] * 3
    assert torch.equal(
        CLIPModel.from_pretrained(tmp_path / "merged").visual_projection.weight,
        CLIPModel.from_pretrained(base).visual_projection.weight,
    )
    for arguments, message in (
        (["--model", base, "--output", tmp_path / "x"], "--model: expected an adapter folder"),
        (["--model", out, "--output", out], "--output: expected a folder other than the adapter's"),
    ):
        failed = run("merge", *arguments)
        assert failed.exit_code == 2
        assert message in failed.stderr


def test_resume_of_an_adapter(base: Path, table: Path, tmp_path: Path) -> None:
    options = ["--model", base, "--data", table, "--epochs", 2, "--batch-size", 8, "--lora-r", 2]
    run("train", *options, "--output", tmp_path / "whole")
    run("train", *options, "--output", tmp_path / "broken")
    whole, broken = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "broken"))
    (tmp_path / "broken" / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    broken.unlink()
    assert "checkpoint-3" in run("train", *options, "--output", tmp_path / "broken", "--resume").output
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/no/model"], "--model: expected a folder or a model name, but there is no folder '/no/model'"),
        (["--data", "/no/data.csv"], "error: --data: expected a file, a folder or a data set's name, there is no"),
        (["--eval-data", "/no/data.csv"], "error: --eval-data: expected a file, a folder or a data set's name, there"),
        (["--data", "no/such/data"], "a folder or a data set's name, there is no 'no/such/data'"),
        (
            ["--data", "no_such_data"],
            "--data: there is no file or folder 'no_such_data' here, and as a data set it does",
        ),
        (["--freeze", "all"], 'expected one of "none", "text"'),
        (["--metric", "f1"], "--metric: expected one of loss, image_to_text_R@1"),
        (["--random-resized-crop", "2"], "--random-resized-crop: expected a share"),
        (["--template", "no place"], "exactly one {}"),
        (["--output", __file__], "--output: expected a folder"),
        (["--lora-r", "4", "--lora-targets", "query"], "--lora-targets: 'query': 'query' matches nothing; there are"),
        (["--lora-r", "4", "--freeze", "text"], "--freeze: expected none with --lora-r"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    base: Path, colours: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = dict(zip(options[::2], options[1::2], strict=True))
    arguments = {"--model": base, "--data": colours, "--output": tmp_path} | given
    result = run("train", *(part for option in arguments.items() for part in option))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_with_nearly_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    result = run("train", "--model", "demo", "--output", tmp_path / "run", "--data", tmp_path / "pictrues/")
    assert result.exit_code == 2 and f"did you mean {str(tmp_path / 'pictures')!r}?" in result.stderr


@pytest.mark.parametrize(
    ("of_others", "own"),
    [
        ("--learning-rate", "--lr"),
        ("--num-train-epochs", "--epochs"),
        ("--per-device-train-batch-size", "--batch-size"),
    ],
)
def test_the_names_of_options_in_transformers_lead_to_our_own(of_others: str, own: str) -> None:
    result = run("train", "--model", "demo", of_others, "1")
    assert result.exit_code == 2 and f"(Possible options: {own})" in result.output


def test_probe_data_is_read_as_the_options_say(base: Path, tmp_path: Path) -> None:
    for number in range(4):
        picture(number)[0].save(tmp_path / f"{number}.png")
    (tmp_path / "in").mkdir()
    tables = {"test": "../0.png,a\n../1.png,b\n", "probe": "../2.png,a\n../none.png,b\n../3.png,b\n"}
    for name, rows in tables.items():
        (tmp_path / "in" / f"{name}.csv").write_text("image,label\n" + rows)
    command = ["evaluate", "--model", base, "--data", tmp_path / "in" / "test.csv", "--knn-k"]
    probe = ["--probe-data", tmp_path / "in" / "probe.csv"]
    outside = run(*command, 1, *probe)
    assert "if that is meant, --allow-outside-paths" in outside.stderr and "allow_outside" not in outside.stderr
    broken = run(*command, 1, *probe, "--allow-outside-paths")
    assert "probe.csv, row 1: there is no image" in broken.stderr
    both = ["--allow-outside-paths", "--on-bad-row", "skip"]
    assert run(*command, 2, *probe, *both).exit_code == 0
    assert "--knn-k: expected 1 to 2, the number of training pictures, got 3" in run(*command, 3, *probe, *both).stderr
    same = ["--probe-data", tmp_path / "in" / "test.csv"]
    assert run(*command, 1, *same).stderr.startswith("error: --probe-data: expected other pictures than data")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(base: Path, tmp_path: Path, workers: int) -> None:
    class_folders(tmp_path, 8)
    (tmp_path / "red" / "broken.png").write_bytes(b"")
    result = run("evaluate", "--model", base, "--data", tmp_path, "--workers", workers)
    assert result.exit_code == 2
    assert "error: row " in result.stderr
    assert "broken.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_command_shows_examples_that_parse() -> None:
    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    for name, command in {"": group, **commands}.items():
        lines = str(command.epilog).splitlines()[2:]
        assert len(lines) == 3 if not name else 1 <= len(lines) <= 4, name
        for line in lines:
            program, verb, *words = shlex.split(line)
            assert program == "clipft" and verb == (name or verb)
            commands[verb].make_context(verb, words)
        shown = CliRunner().invoke(app, [name, "--help"] if name else ["--help"], env={"COLUMNS": "100"}).output
        assert all(line in shown for line in lines), shown


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"clipft {clipft.__version__}\n"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from clipft.cli import app;"
        "[print(CliRunner().invoke(app, words).output) for words in (['train', '--help'], ['help', 'bad-row'])];"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--early-stopping-patience" in done.stdout and "A row that cannot be used" in done.stdout


def test_help_has_every_option_of_train_in_a_group() -> None:
    options = typer.main.get_command(app).commands["train"].params  # type: ignore[attr-defined]
    assert {field.metadata["group"] for field in dataclasses.fields(TrainOptions)} <= set(GROUPS)
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "70"}).output
    sections = [section.split(":\n", 1) for section in shown.split("\n\n") if ":\n" in section]
    assert [heading for heading, _ in sections][: len(GROUPS)] == list(GROUPS)
    assert "--lr " in dict(sections)["Schedule"]
    assert all(option.opts[0] in shown for option in options)


def test_train_on_real_pictures(base: Path, data_folder: Path, tmp_path: Path) -> None:
    """A random model of a hundred thousand parameters learns to tell radiographs in two epochs."""
    options = ["--epochs", 2, "--lr", 1e-3, "--batch-size", 32, "--template", "a radiograph, {}"]
    result = run("train", "--model", base, "--data", data_folder / "chest_xray", "--output", tmp_path, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    gain = report["after"]["zero_shot"]["balanced_accuracy"] - report["before"]["zero_shot"]["balanced_accuracy"]
    assert gain > 0.1


def test_bad_rows_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "data", 12)
    (tmp_path / "data" / "red" / "broken.png").write_bytes(b"")
    options = ["--model", base, "--data", tmp_path / "data", "--output", tmp_path / "out.json"]
    assert run("evaluate", *options).exit_code == 2
    result = run("evaluate", *options, "--on-bad-row", "skip")
    assert result.exit_code == 0, result.output
    assert "on 12 pictures" in result.output


def test_rows_left_out_of_training_are_in_the_report(base: Path, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 20)
    (data / "red" / "broken.png").write_bytes(b"")
    options = ["--model", base, "--data", data, "--epochs", 1, "--control-data", "none", "--on-bad-row", "skip"]
    result = run("train", *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    skipped = json.loads((tmp_path / "run" / "report.json").read_text())["skipped"]
    assert list(skipped) == [str(data)]
    assert skipped[str(data)]["count"] == 1
    assert "the image cannot be read" in skipped[str(data)]["rows"][0]
