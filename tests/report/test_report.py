"""What a run leaves: report.json, report.html, config.yaml, the model card; --config, --wise-ft, clipft env."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run
from huggingface_hub import ModelCard
from rich.console import Console
from tiny_clip import captioned, labelled, tiny_clip

import clipft
from clipft.evaluation.scoring import Scorer, gains
from clipft.report.charts import _ticks, line_chart
from clipft.report.examples import examples

QUICK = ["--epochs", 1, "--batch-size", 8, "--control-data", "none"]


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what is loaded and what is read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_leaves_reports_and_repeats_from_its_config(base: Path, colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    options = ["--model", base, "--data", colours, "--epochs", 2, "--batch-size", 8, "--lr", 1e-3]
    extra = [
        "--wise-ft",
        "--report-to",
        "tensorboard",
        "--distillation",
        0.1,
        "--l2-sp",
        0.01,
        "--seed",
        7,
        "--template",
        "a {} <b>",
    ]
    result = run("train", *options, *extra, "--output", out, "--control-data", colours)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    swept = report["wise_ft"]
    assert swept["alpha"] in [point["alpha"] for point in swept["points"]]
    assert "within one standard error" in swept["rule"]
    assert f"alpha {swept['alpha']:g}" in result.output
    assert report["control"].keys() == {"data", "pictures", "before", "fine_tuned", "after", "gain"}
    for scores in (report, report["control"]):
        gain = scores["gain"]["zero_shot"]["accuracy"]
        after, before = (scores[stage]["zero_shot"]["accuracy"] for stage in ("after", "before"))
        assert gain["value"] == pytest.approx(after - before)
        assert gain["interval"][0] <= gain["value"] <= gain["interval"][1]
    assert [entry["step"] for entry in report["history"] if "learning_rate" in entry] == [5]
    assert report["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert list((out / "checkpoints" / "runs").rglob("events.out.tfevents*"))

    page = Page(out / "report.html")
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in re.sub(r"data:[^\"]*|https?://pypi[^ ]*", "", (out / "report.html").read_text())
    for words in (
        "balanced accuracy",
        "Confusion matrix",
        "Forgetting",
        "WiSE-FT",
        "Learning rate",
        "worst",
        "a {} <b>",
    ):
        assert words in page.text
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_value == round(report["after"]["zero_shot"]["accuracy"], 4)
    assert str(tmp_path) not in card.content
    assert str(colours.parent) not in card.content

    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["seed"], saved["lr"], saved["template"], saved["wise_ft"]) == (7, 1e-3, ["a {} <b>"], True)
    again = run("train", "--config", out / "config.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    weights = [folder / "model.safetensors" for folder in (out, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (tmp_path / "again" / "report.json").read_text() == (out / "report.json").read_text()


def test_the_command_line_overrides_the_config(base: Path, table: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    values = {"model": str(base), "data": str(table), "epochs": 9, "batch-size": 8, "lora-r": 2}
    config.write_text(yaml.safe_dump(values))
    result = run("train", "--config", config, "--output", tmp_path / "out", "--epochs", 1)
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["epochs"], saved["batch_size"], saved["lora_r"]) == (1.0, 8, 2)
    control = json.loads((tmp_path / "out" / "report.json").read_text())["control"]
    assert (control["pictures"], control["data"]) == (310, "drawings of emoji in the package")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "peft"
    assert ModelCard.load(tmp_path / "out" / "merged" / "README.md").data.library_name == "transformers"


ALIASES = ["template: [", "  &a0 [x],", *(f"  &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]," for n in range(1, 12)), "]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2024-99-99", "expected a YAML file with options (month must be"),
        ("seed: &a [*a]", "seed: expected one value, got one that holds others"),
        ("epoch: 3\nsede: 1", "no such option: epoch (did you mean epochs?), sede (did you mean seed?)"),
        ("learning_rate: 1\nxyzzy: 1", "no such option: learning_rate (did you mean lr?), xyzzy; there are"),
        ("epochs: [1, 2]", "epochs: expected one value, got [1, 2]"),
        ("template: a {}", "template: expected a list, got 'a {}'"),
        ("epochs: many", "epochs"),
        ("- epochs", "expected 'option: value' lines, got list"),
        ("a: b: c", "expected a YAML file with options"),
        ("seed: " + "[" * 5000, "expected a YAML file with options"),
        ("\n".join(ALIASES), "template: expected a list, got one that holds others"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = run("train", "--config", tmp_path / "run.yaml", "--model", "demo", "--data", "x", "--output", tmp_path)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_wise_ft_of_an_adapter(base: Path, table: Path, tmp_path: Path) -> None:
    """The adapter's file holds the chosen scale: it, the merged model and the report say the same."""
    pytest.importorskip("peft")
    options = ["--model", base, "--data", table, "--output", tmp_path, "--eval-data", table, "--wise-ft"]
    result = run("train", *options, *QUICK, "--lora-r", 4, "--lr", 3e-2)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    for folder in (tmp_path, tmp_path / "merged"):
        assert clipft.evaluate_retrieval(*clipft.load(folder), clipft.load_pairs(table)) == report["after"]["retrieval"]


def test_evaluate_writes_a_page_and_probes(base: Path, colours: Path, tmp_path: Path) -> None:
    data = tmp_path / "test"
    labelled(12).save_to_disk(str(data))
    other = tmp_path / "train"
    labelled(40).save_to_disk(str(other))
    options = ["--model", base, "--data", data, "--probe-data", other, "--knn-k", 5]
    result = run("evaluate", *options, "--output", tmp_path / "x" / "score.json")
    assert result.exit_code == 0, result.output
    score = json.loads((tmp_path / "x" / "score.json").read_text())
    assert score.keys() == {"zero_shot", "linear_probe", "knn", "calibration", "reading"}
    expected = clipft.evaluate_knn(*clipft.load(base), labelled(40), labelled(12), k=5)
    assert score["knn"] == expected
    text = Page(tmp_path / "x" / "score.html").text
    assert "Nearest neighbours" in text
    assert "where the model finds a right answer" in text
    for wrong, message in (
        (["--probe-data", data], "--probe-data: expected other pictures"),
        (["--output", tmp_path / "a.html"], "--output: expected the name of the JSON file"),
    ):
        failed = run("evaluate", "--model", base, "--data", data, *wrong)
        assert failed.exit_code == 2
        assert message in failed.stderr


def test_env() -> None:
    found = json.loads(run("env", "--json").output)
    assert found["clipft"] == clipft.__version__
    assert found["kernels"] in found["kernels_available"]
    lines = run("env").output
    assert f"clipft: {clipft.__version__}" in lines
    assert re.search(r"^  transformers: \d", lines, re.M)


def test_examples_are_the_extremes_by_margin() -> None:
    model, processor = tiny_clip()
    data = captioned(20, captions=2)
    found = Scorer(model, processor, data, ["{}"], 8, 0, Console(quiet=True))("test")
    groups = {group["title"]: group["queries"] for group in examples(found, data)}
    scores = found.image_embeds @ found.text_embeds.t()
    own = torch.zeros_like(scores, dtype=torch.bool)
    for row, texts in enumerate(found.texts_of):
        own[row, texts] = True
    margin = scores.masked_fill(~own, -9).amax(1) - scores.masked_fill(own, -9).amax(1)
    worst = int(margin.argmin())
    assert groups["Pictures, worst texts found"][0]["right"] == data[worst]["caption"]
    hits = groups["Pictures, worst texts found"][0]["hits"]
    assert [hit["score"] for hit in hits] == pytest.approx(scores[worst].topk(3).values.tolist())
    for query in groups["Texts, worst pictures found"]:
        assert not query["hits"][0]["right"]
    assert all(query["hits"][0]["right"] for query in groups.get("Pictures, best texts found", []))
    both = gains(found, found)
    assert both["retrieval"]["text_to_image_mAP"] == {"value": 0.0, "interval": [0.0, 0.0]}


def test_the_worst_pictures_have_maps_of_what_is_right_and_what_it_was_taken_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = tiny_clip()
    data = captioned(8)
    found = Scorer(model, processor, data, ["{}"], 8, 0, Console(quiet=True))("test")
    nearest = (found.image_embeds @ found.text_embeds.t()).argsort(1)
    own = [[int(nearest[row, -1 if row < 4 else 0])] for row in range(8)]  # four are right
    found = dataclasses.replace(found, texts_of=own)

    def maps(*of: Any) -> dict[str, list[Any]]:
        groups = {group["title"]: group["queries"] for group in examples(found, data, *of)}
        return {title: [query.get("maps") for query in queries] for title, queries in groups.items()}

    drawn = maps(model, processor)
    assert {title for title, own in drawn.items() if any(own)} == {"Pictures, worst texts found"}
    assert "Pictures, best texts found" in drawn
    queries = next(group for group in examples(found, data) if group["title"] == "Pictures, worst texts found")
    for query, own in zip(queries["queries"], drawn["Pictures, worst texts found"], strict=True):
        assert [one["text"] for one in own] == [query["right"][0], query["hits"][0]["text"]]
        assert own[0]["picture"] != own[1]["picture"]
        assert all(one["picture"].startswith("data:image/jpeg;base64,") for one in own)
    assert not any(any(own) for own in maps().values())
    monkeypatch.setattr("clipft.report.examples.Locator", lambda *given, **how: 1 / 0)
    assert not any(any(own) for own in maps(model, processor).values())
    assert caplog.messages == ["the report is without maps of where things are: division by zero"]


def test_ticks_and_charts() -> None:
    for values in ([0.0, 1.0], [3.0], [-1e-5, 2e-5], [17.0, 4503.0], [0.0]):
        ticks = _ticks(values)
        assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
        assert 2 <= len(ticks) <= 9
    assert line_chart({"a": [(1, float("nan"))]}, "x") == ""
    assert "<script" not in line_chart({"<script>": [(0, 1), (1, 2)]}, "x")
